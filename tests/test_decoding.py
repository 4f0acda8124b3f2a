"""The batched, cached decoder beside the brute force, and the promises that it makes."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests import brute_force
from tests.models_for_tests import CONFIGS, VOCAB, causal_lm, value_model
from utils.cached_models import attention_window
from utils.costs import forward_flops
from utils.decoding import decode, score_texts
from utils.errors import DataError
from utils.models import stop_tokens
from utils.policies import MavisPolicy, MixturePolicy, PromptTablePolicy, ReferencePolicy, TokenTablePolicy

EOS = 2


def make_prompts(n, seed=0, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (n,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def assert_same(completion, expected, tolerance=1e-6):
    """Tokens equal; values, probabilities and the log-ratio within `tolerance`."""
    tokens, log_ratio, steps = expected
    assert completion.token_ids == tokens
    assert completion.log_ratio == pytest.approx(log_ratio, abs=tolerance * 25)
    assert len(completion.steps) == len(steps)
    for ours, (ids, p_ref, u, p_tilt, chosen) in zip(completion.steps, steps, strict=True):
        assert ours["token_ids"].tolist() == ids and ours["chosen"] == chosen
        assert ours["p_ref"].tolist() == pytest.approx(p_ref, abs=tolerance)
        assert ours["p_tilt"].tolist() == pytest.approx(p_tilt, abs=tolerance)
        if u is not None:
            assert ours["values"].tolist() == pytest.approx(u, abs=25 * tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_brute_force_on_every_architecture(name):
    reference, values = causal_lm(name), {"a": value_model(name, 1), "b": value_model(name, 2)}
    policy = MavisPolicy(reference, values, {"a": 0.3, "b": 0.7}, beta=3.0, top_k=8, temperature=0.8)
    prompts, keys = make_prompts(5), [(0, i, 1) for i in range(5)]
    completions = decode(policy, prompts, keys=keys, max_new_tokens=9, eos_token_id=EOS, batch_size=2, trace=True)
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        settings = dict(beta=3.0, k=8, temperature=0.8)
        expected = brute_force.decode(
            reference, list(values.values()), [0.3, 0.7], prompt, key, max_new_tokens=9, eos=EOS, **settings
        )
        assert_same(completion, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["llama_grouped_tied", "gpt2"])
def test_values_that_are_means_over_the_response_equal_brute_force(name, shared):
    """Of three models the first two pool, and may share a backbone with the third between them; rows are refilled."""
    reference, pooled = causal_lm(name), [value_model(name, i, pooling="mean") for i in (1, 2)]
    if shared:
        setattr(pooled[1], pooled[1].base_model_prefix, getattr(pooled[0], pooled[0].base_model_prefix))
    values = {"a": pooled[0], "b": value_model(name, 3), "c": pooled[1]}
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    policy = MavisPolicy(reference, values, weights, beta=3.0, top_k=6, normalization="none")
    assert len(policy.value_readers) == (2 if shared else 3)
    prompts, keys = make_prompts(6, seed=8), [(2, i) for i in range(6)]
    run = dict(max_new_tokens=9, eos_token_id=[EOS, *range(9, 61, 6)])
    completions = decode(policy, prompts, keys=keys, batch_size=2, trace=True, **run)
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        end = completion.token_ids[-1] if completion.finished else None
        settings = dict(beta=3.0, k=6, temperature=1.0, normalization="none", max_new_tokens=9, eos=end)
        models, w = list(values.values()), list(weights.values())
        assert_same(completion, brute_force.decode(reference, models, w, prompt, key, **settings))
    assert len({len(c.token_ids) for c in completions}) > 1


@pytest.mark.parametrize("normalization", ["minmax", "zscore", "none"])
def test_every_normalisation_equals_brute_force(normalization):
    reference, value = causal_lm("llama_grouped_tied"), value_model("llama_grouped_tied")
    policy = MavisPolicy(reference, [value], [1.0], beta=8.0, top_k=5, normalization=normalization)
    prompt, key = make_prompts(1)[0], (4, 4)
    [completion] = decode(policy, [prompt], keys=[key], max_new_tokens=8, eos_token_id=None, batch_size=1, trace=True)
    settings = dict(beta=8.0, k=5, temperature=1.0, normalization=normalization)
    assert_same(
        completion, brute_force.decode(reference, [value], [1.0], prompt, key, max_new_tokens=8, eos=None, **settings)
    )


def eager_to_end(name, seed=0, by=4.0):
    """A model whose likeliest token is often EOS, so that forbidding it changes most texts."""
    model = causal_lm(name, seed)
    head = model.get_output_embeddings()
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[EOS] = by
    head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return model


@pytest.mark.parametrize("normalization", ["minmax", "none"])
@pytest.mark.parametrize("name", ["llama_grouped_tied", "gpt2"])
def test_the_first_token_is_never_eos_where_that_is_forbidden(name, normalization):
    """EOS is taken out before the top k, p_ref stays the full softmax, and the second token may be EOS."""
    reference, value = eager_to_end(name), value_model(name)
    settings = dict(beta=2.0, k=5, temperature=0.9, normalization=normalization, clip=None)
    policy = MavisPolicy(
        reference, [value], [1.0], beta=2.0, top_k=5, temperature=0.9, normalization=normalization, clip=None
    )
    prompts, keys = make_prompts(8, seed=1), [(3, i) for i in range(8)]
    run = dict(max_new_tokens=6, batch_size=3, trace=True)
    free = decode(policy, prompts, keys=keys, eos_token_id=EOS, **run)
    held = decode(policy, prompts, keys=keys, eos_token_id=EOS, suppress_first_eos=True, **run)
    for prompt, key, completion in zip(prompts, keys, held, strict=True):
        expected = brute_force.decode(
            reference, [value], [1.0], prompt, key, max_new_tokens=6, eos=EOS, suppress_first_eos=True, **settings
        )
        assert_same(completion, expected)
    assert any(c.token_ids[0] == EOS for c in free) and not any(c.token_ids[0] == EOS for c in held)
    assert any(len(c.token_ids) == 2 and c.finished for c in held)  # the ban is the first token's alone


def test_forbidding_the_first_eos_costs_its_probability_and_holds_for_every_policy():
    reference = eager_to_end("llama_full")
    table = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    everything = dict(top_k=VOCAB - 1)
    for policy in (
        ReferencePolicy(reference, **everything),
        MixturePolicy([reference, eager_to_end("llama_full", 1)], [0.5, 0.5], **everything),
        TokenTablePolicy(reference, [table], [1.0], beta=0.0, **everything),
        PromptTablePolicy(reference, lambda prompt: table, beta=0.0, **everything),
    ):
        run = dict(keys=[(i,) for i in range(6)], max_new_tokens=1, eos_token_id=[EOS], batch_size=4, trace=True)
        for completion in decode(policy, [[5, 6, 7]] * 6, suppress_first_eos=True, **run):
            [step] = completion.steps
            assert EOS not in step["token_ids"].tolist() and len(step["token_ids"]) == VOCAB - 1
            if policy.follows_reference:  # no cut and no tilt: what is left is the ban's own price
                p_eos = float(brute_force.next_token_probs(reference, [5, 6, 7], 1.0)[EOS])
                assert completion.log_ratio == pytest.approx(-math.log(1 - p_eos), abs=1e-6) and p_eos > 0.1
    with pytest.raises(ValueError, match="61 candidates of 61 tokens, 1 of them forbidden"):
        too_many = ReferencePolicy(reference, top_k=VOCAB)
        decode(too_many, [[5]], suppress_first_eos=True, **run | {"keys": [(0,)]})


def test_float32_is_within_2e_5_of_brute_force():
    reference, value = causal_lm("llama_full", dtype=torch.float32), value_model("llama_full", dtype=torch.float32)
    policy = MavisPolicy(reference, {"a": value}, {"a": 1.0}, beta=3.0)
    prompts = make_prompts(3, seed=5)
    completions = decode(
        policy, prompts, keys=[(i,) for i in range(3)], max_new_tokens=8, eos_token_id=EOS, batch_size=3, trace=True
    )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        settings = dict(beta=3.0, k=15, temperature=1.0)
        assert_same(
            completion,
            brute_force.decode(reference, [value], [1.0], prompt, (i,), max_new_tokens=8, eos=EOS, **settings),
            2e-5,
        )


def test_the_reference_policy_is_the_top_k_cut_renormalised():
    reference = causal_lm("gpt2")
    [completion] = decode(
        ReferencePolicy(reference, top_k=4),
        [[5, 6, 7]],
        keys=[(1,)],
        max_new_tokens=10,
        eos_token_id=EOS,
        batch_size=1,
        trace=True,
    )
    assert_same(
        completion,
        brute_force.decode(
            reference, [], [], [5, 6, 7], (1,), max_new_tokens=10, eos=EOS, beta=0.0, k=4, temperature=1.0
        ),
    )
    assert completion.log_ratio == pytest.approx(completion.log_prob - completion.reference_log_prob, abs=1e-9)
    assert completion.log_ratio > 0


def test_a_key_gives_the_same_tokens_in_any_company_and_any_batch():
    """In float64 a batch's shape changes a probability by 1e-15: a flip would need a uniform that near to an edge."""
    name = "llama_grouped_tied"
    policy = MavisPolicy(causal_lm(name), {"a": value_model(name)}, {"a": 1.0}, beta=4.0, top_k=6)
    prompts, keys = make_prompts(11, seed=3), [(7, i, 0) for i in range(11)]
    run = dict(max_new_tokens=17, eos_token_id=[EOS, 9, 11, 13])
    together = decode(policy, prompts, keys=keys, batch_size=11, **run)
    for batch_size, order in ((1, range(11)), (3, range(11)), (4, [10, 3, 5, 1, 0, 2, 4, 9, 8, 7, 6])):
        again = decode(policy, [prompts[i] for i in order], keys=[keys[i] for i in order], batch_size=batch_size, **run)
        for i, completion in zip(order, again, strict=True):
            assert completion.token_ids == together[i].token_ids
            assert completion.finished == together[i].finished
            assert completion.log_ratio == pytest.approx(together[i].log_ratio, abs=1e-9)
    assert {c.finished for c in together} == {True, False}  # rows did end early and were refilled


def test_looking_rarely_at_the_device_changes_nothing():
    from collections import deque

    from utils.decoding import Job, Prefix, run_jobs

    policy = ReferencePolicy(causal_lm("llama_full"), top_k=6)
    prompts = make_prompts(7, seed=3)

    def run(sync_every):
        queue = deque(Job((i,), Prefix(p), 5 + 3 * i, tag=i) for i, p in enumerate(prompts))
        done = run_jobs(policy, queue, eos_token_id=[EOS, 9, 11, 13], batch_size=3, sync_every=sync_every)
        return {job.tag: (c.token_ids, c.finished, round(c.log_ratio, 9)) for job, c, _ in done}

    assert run(1) == run(5) == run(16)


def test_equal_prompts_are_read_once(monkeypatch):
    policy = ReferencePolicy(causal_lm("llama_full"))
    read, prefill = [], policy.prefill
    monkeypatch.setattr(policy, "prefill", lambda prompts, *more: read.extend(prompts) or prefill(prompts, *more))
    decode(
        policy,
        [[5, 6, 7]] * 6 + [[8, 9]] * 6,
        keys=[(i,) for i in range(12)],
        max_new_tokens=3,
        eos_token_id=None,
        batch_size=4,
    )
    assert read == [[5, 6, 7], [8, 9]]


def test_no_token_passes_a_model_twice():
    """Of one prompt and n new tokens the reference reads all but the last, a value model reads k candidates a step."""
    reference, value = causal_lm("llama_full"), value_model("llama_full")
    seen = {"reference": 0, "value": 0}
    reference.model.register_forward_hook(
        lambda m, a, kw, o: seen.__setitem__("reference", seen["reference"] + kw["input_ids"].numel()), with_kwargs=True
    )
    value.model.register_forward_hook(
        lambda m, a, kw, o: seen.__setitem__("value", seen["value"] + kw["input_ids"].numel()), with_kwargs=True
    )
    policy = MavisPolicy(reference, {"a": value}, {"a": 1.0}, beta=1.0, top_k=5)
    decode(policy, [[5, 6, 7, 8]], keys=[(0,)], max_new_tokens=10, eos_token_id=None, batch_size=1)
    assert seen == {"reference": 4 + 9, "value": 4 + 5 * 10}


def test_models_of_one_precision_share_a_steps_mask(monkeypatch):
    from utils.cached_models import Layout

    made, step_mask = [], Layout.step_mask
    monkeypatch.setattr(Layout, "step_mask", lambda *a: made.append(a[1]) or step_mask(*a))
    models = [causal_lm("llama_full", i) for i in range(3)]
    policy = MixturePolicy(models, [0.2, 0.3, 0.5], top_k=5)
    decode(policy, make_prompts(2), keys=[(0, 0), (0, 1)], max_new_tokens=4, eos_token_id=None, batch_size=2)
    assert made == [1] * 3, "one for each token that is read"


def test_samples_follow_the_exact_distribution():
    """4,000 two-token texts from a vocabulary cut to 3: by Hoeffding's inequality and a union bound over the 9 texts, a
    frequency is off by more than 0.0390 with probability below 9 * 2 * exp(-2 * 4000 * 0.039^2) = 1e-4."""
    name = "llama_full"
    reference, value = causal_lm(name), value_model(name)
    prompt, n = [5, 6, 7], 4000
    policy = MavisPolicy(reference, {"a": value}, {"a": 1.0}, beta=2.0, top_k=3)
    completions = decode(
        policy, [prompt] * n, keys=[(1, i) for i in range(n)], max_new_tokens=2, eos_token_id=None, batch_size=500
    )
    exact = {}
    settings = dict(beta=2.0, k=3, temperature=1.0)
    ids, _, _, first = brute_force.step(reference, [value], [1.0], prompt, **settings)
    for a, pa in zip(ids, first, strict=True):
        ids2, _, _, second = brute_force.step(reference, [value], [1.0], [*prompt, a], **settings)
        exact.update({(a, b): pa * pb for b, pb in zip(ids2, second, strict=True)})
    for text, p in exact.items():
        assert abs(sum(tuple(c.token_ids) == text for c in completions) / n - p) < 0.039
    assert sum(exact.values()) == pytest.approx(1)


def test_the_token_table_policy_tilts_by_the_candidate_alone():
    reference = causal_lm("llama_full")
    table = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)[
        torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    ]
    policy = TokenTablePolicy(reference, {"a": table, "b": -2 * table}, {"a": 0.75, "b": 0.25}, beta=2.0, top_k=6)
    [completion] = decode(
        policy, [[5, 6, 7]], keys=[(0,)], max_new_tokens=6, eos_token_id=None, batch_size=1, trace=True
    )
    text = [5, 6, 7]
    for step in completion.steps:
        ids, p_ref, _, _ = brute_force.step(reference, [], [], text, beta=0, k=6, temperature=1.0)
        v = [0.25 * float(table[i]) for i in ids]
        u = [(x - min(v)) / (max(v) - min(v) + 1e-6) for x in v]
        odds = [p * math.exp(2 * x) for p, x in zip(p_ref, u, strict=True)]
        assert step["p_tilt"].tolist() == pytest.approx([o / sum(odds) for o in odds], abs=1e-6)
        text.append(completion.token_ids[len(text) - 3])


def test_the_prompt_table_policy_gives_each_row_its_own_prompts_table():
    """A prompt's table is a multiple of one table, so that each row must equal the table policy of that multiple."""
    reference, table = causal_lm("llama_full"), torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    prompts, keys = make_prompts(6, seed=8), [(i,) for i in range(6)]
    run = dict(max_new_tokens=8, eos_token_id=[2, 9, 11, 13, 17])
    own = dict(top_k=6, normalization="none", beta=2.0)
    policy = PromptTablePolicy(reference, lambda prompt: table * len(prompt) / 10, **own)
    together = decode(policy, prompts, keys=keys, batch_size=2, **run)
    for prompt, key, completion in zip(prompts, keys, together, strict=True):
        single = TokenTablePolicy(reference, [table * len(prompt) / 10], [1.0], **own)
        assert decode(single, [prompt], keys=[key], batch_size=1, **run)[0].token_ids == completion.token_ids


def test_a_mixture_adds_logits_and_takes_its_log_ratio_against_the_reference():
    a, b, reference = causal_lm("llama_full", 0), causal_lm("llama_full", 1), causal_lm("llama_full", 2)
    policy = MixturePolicy([a, b], [0.25, 0.75], top_k=5)
    [c] = decode(
        policy,
        [[5, 6, 7]],
        keys=[(0,)],
        max_new_tokens=5,
        eos_token_id=None,
        batch_size=1,
        trace=True,
        reference=reference,
    )
    text, total = [5, 6, 7], 0.0
    for step, token in zip(c.steps, c.token_ids, strict=True):
        with torch.no_grad():
            logits = [m(input_ids=torch.tensor([text])).logits[0, -1] for m in (a, b)]
        p = torch.softmax(0.25 * logits[0] + 0.75 * logits[1], -1)
        top = p.topk(5)
        assert step["token_ids"].tolist() == top.indices.tolist()
        assert step["p_ref"].tolist() == pytest.approx(top.values.tolist(), abs=1e-6)
        q = (top.values / top.values.sum())[step["chosen"]]
        total += math.log(q) - math.log(brute_force.next_token_probs(reference, text, 1.0)[token])
        text.append(token)
    assert c.log_ratio == pytest.approx(total, abs=1e-5)
    [without] = decode(policy, [[5, 6, 7]], keys=[(0,)], max_new_tokens=5, eos_token_id=None, batch_size=1)
    assert math.isnan(without.log_ratio) and without.token_ids == c.token_ids


def test_texts_are_scored_as_one_at_a_time():
    model = causal_lm("gpt_neox")
    prompts, responses = make_prompts(5), make_prompts(5, seed=9)
    scores = score_texts(model, prompts, responses, temperature=0.7, batch_size=2)
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        logs = [
            math.log(brute_force.next_token_probs(model, prompt + response[:t], 0.7)[response[t]])
            for t in range(len(response))
        ]
        assert score == pytest.approx(sum(logs), abs=1e-6)


# ------------------------------------------------------------------------- a Markov language model, enumerated exactly


class MarkovLM(torch.nn.Module):
    """Logits depend on the last token alone."""

    def __init__(self, transition):
        super().__init__()
        self.logits = torch.nn.Parameter(transition.log())
        self.config = SimpleNamespace(num_hidden_layers=0)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits[input_ids[:, -1:]])


class ExactValue(torch.nn.Module):
    """Soft values of (position, token), as a value model whose backbone looks them up."""

    base_model_prefix = "backbone"

    def __init__(self, table):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=0)
        self.table = torch.nn.Parameter(table)  # (positions, V)
        self.score = torch.nn.Identity()

    def backbone(self, input_ids, position_ids, **_):
        return SimpleNamespace(last_hidden_state=self.table[position_ids, input_ids].unsqueeze(-1))


def test_with_exact_soft_values_the_tilted_policy_is_the_kl_regularised_optimum():
    """max E[R] - KL / beta is solved by p_ref(text) exp(beta R(text)) / Z: found here by enumerating all texts."""
    v, horizon, beta = 4, 3, 2.5
    generator = torch.Generator().manual_seed(0)
    transition = torch.rand(v, v, generator=generator, dtype=torch.float64).softmax(-1)
    reward = torch.rand((v,) * horizon, generator=generator, dtype=torch.float64)  # of the whole text, but see below
    reward = (
        reward.sum(dim=(0, 1), keepdim=True).expand_as(reward) / v
    )  # a reward of the last token: values fit a table
    start = 1

    p_text = {}
    for text in itertools.product(range(v), repeat=horizon):
        path = (start, *text)
        p_text[text] = math.prod(float(transition[a, b]) for a, b in itertools.pairwise(path))
    weight = {t: p * math.exp(beta * float(reward[t])) for t, p in p_text.items()}
    z = sum(weight.values())

    table = torch.zeros(horizon + 1, v, dtype=torch.float64)  # position 0 is the prompt
    table[horizon] = reward[0, 0]
    for t in range(horizon - 1, 0, -1):  # soft Bellman: V_t(a) = 1/beta log sum_b p(b|a) exp(beta V_{t+1}(b))
        table[t] = torch.log(transition @ torch.exp(beta * table[t + 1])) / beta
    policy = MavisPolicy(
        MarkovLM(transition), {"r": ExactValue(table)}, {"r": 1.0}, beta=beta, top_k=v, normalization="none", clip=None
    )
    completions = decode(
        policy,
        [[start]] * 400,
        keys=[(0, i) for i in range(400)],
        max_new_tokens=horizon,
        eos_token_id=None,
        batch_size=400,
        trace=True,
    )
    seen = set()
    for c in completions:
        probability = math.prod(float(s["p_tilt"][s["chosen"]]) for s in c.steps)
        assert probability == pytest.approx(weight[tuple(c.token_ids)] / z, rel=1e-9)
        assert c.log_ratio == pytest.approx(math.log(probability / p_text[tuple(c.token_ids)]), abs=1e-9)
        seen.add(tuple(c.token_ids))
    assert len(seen) > 30  # of 64 texts
    # Both estimate the KL of whole texts, within 4.5 standard errors; the exact steps with less noise.
    exact = sum(w / z * math.log(w / z / p_text[t]) for t, w in weight.items())
    spread = {}
    for name in ("log_ratio", "kl_exact"):
        values = torch.tensor([getattr(c, name) for c in completions], dtype=torch.float64)
        assert abs(values.mean() - exact) < 4.5 * values.std() / len(values) ** 0.5
        spread[name] = float(values.std())
    assert spread["kl_exact"] < 0.7 * spread["log_ratio"]


@pytest.mark.parametrize("first_eos", [False, True])
def test_the_exact_kl_of_an_answer_is_the_sum_over_its_steps_distributions(first_eos):
    """Beside its definition, in the steps' own numbers; a mixture of other policies has none."""
    reference, value = eager_to_end("llama_grouped_tied"), value_model("llama_grouped_tied")
    prompts, keys = make_prompts(9, seed=2), [(5, i) for i in range(9)]
    run = dict(keys=keys, max_new_tokens=6, eos_token_id=EOS, batch_size=4, suppress_first_eos=first_eos)
    for policy in (ReferencePolicy(reference, top_k=6), MavisPolicy(reference, [value], [1.0], beta=3.0, top_k=6)):
        for c in decode(policy, prompts, trace=True, **run):
            full = cut = 0.0
            for step in c.steps:
                p, q = step["p_tilt"].tolist(), step["p_ref"].tolist()
                full += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
                cut += sum(a * math.log(a / (b / sum(q))) for a, b in zip(p, q, strict=True) if a)
            assert c.kl_exact == pytest.approx(full, abs=1e-9) and c.kl_top_k == pytest.approx(cut, abs=1e-9)
            assert isinstance(policy, MavisPolicy) or abs(c.kl_top_k) < 1e-9
    [c] = decode(MixturePolicy([reference], [1.0], top_k=6), [[5]], **run | {"keys": [(0,)]})
    assert math.isnan(c.kl_exact) and math.isnan(c.kl_top_k)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[5], [5] * 90], {}, "prompt 1 has 90 tokens.*context of 96"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[5]], {"batch_size": 0}, "batch_size"),
        ([[5]], {"keys": []}, "1 prompts but 0 keys"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_named(prompts, kwargs, message):
    arguments = (
        dict(keys=[(i,) for i in range(len(prompts))], max_new_tokens=10, eos_token_id=EOS, batch_size=2) | kwargs
    )
    with pytest.raises(ValueError, match=message):
        decode(ReferencePolicy(causal_lm("llama_full")), prompts, **arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"normalization": "max"}, "normalization"),
        ({"weights": {"a": 1.0, "c": 0.5}}, "no value model for c"),
        ({"weights": {"a": 0.0}}, "every weight is 0"),
        ({"weights": {"a": math.nan}}, "weights must be finite"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_cannot_tilt_are_refused(kwargs, message):
    arguments = dict(weights={"a": 1.0}, beta=1.0) | kwargs
    with pytest.raises(ValueError, match=message):
        MavisPolicy(causal_lm("llama_full"), {"a": value_model("llama_full")}, arguments.pop("weights"), **arguments)


def test_a_weight_of_zero_drops_its_value_model():
    policy = MavisPolicy(causal_lm("llama_full"), {"a": value_model("llama_full")}, {"a": 1.0, "b": 0.0}, beta=1.0)
    assert len(policy.value_readers) == 1


def test_a_text_that_a_window_would_cut_is_refused_and_a_shorter_one_is_read_as_without_it():
    """The project's masks know of no windows. Beside transformers' own reading, without caches."""
    reference = causal_lm("mistral_window")
    policy = ReferencePolicy(reference, top_k=6)
    prompt, run = [5, 6, 7, 8], dict(keys=[(0, 0)], eos_token_id=None, batch_size=1)
    with pytest.raises(ValueError, match="over the context of 12 tokens"):
        decode(policy, [prompt], max_new_tokens=9, **run)
    [completion] = decode(policy, [prompt], max_new_tokens=8, trace=True, **run)
    for t, step in enumerate(completion.steps):
        probs = brute_force.next_token_probs(reference, prompt + completion.token_ids[:t], 1.0)
        assert torch.allclose(step["p_ref"], probs[step["token_ids"]], atol=1e-9)


@pytest.mark.parametrize(("config", "window"), [
    (transformers.MistralConfig(sliding_window=7), 7),
    (transformers.MistralConfig(sliding_window=None), None),
    (transformers.LlamaConfig(), None),
    (transformers.Qwen2Config(use_sliding_window=False, sliding_window=8), None),
    (transformers.Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=2), 8),
    (transformers.Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=99), None),
    (transformers.Gemma3TextConfig(sliding_window=9), 9),
    (transformers.Gemma2Config(sliding_window=10), 10),
    (transformers.Phi3Config(sliding_window=11), 11),
    (transformers.GPTNeoConfig(window_size=12), 12),
    (transformers.GPT2Config(), None),
])  # fmt: skip
def test_the_window_of_an_attention_is_known_by_its_configuration(config, window):
    assert attention_window(config) == window


def test_biases_in_the_place_of_positions_are_refused():
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(DataError, match="ALiBi"):
        ReferencePolicy(model)


def test_a_policy_of_several_models_cannot_stand_for_the_reference():
    mixture = MixturePolicy([causal_lm("llama_full", 3), causal_lm("llama_full")], [2.0, -1.0], top_k=6)
    for use in (lambda: MavisPolicy(mixture, [value_model("llama_full")], [1.0], beta=1.0),
                lambda: score_texts(mixture, [[5]], [[6]])):  # fmt: skip
        with pytest.raises(ValueError, match="MixturePolicy cannot stand for it"):
            use()


def test_answers_end_at_each_of_the_models_stop_tokens():
    """The tokenizer's, and the special tokens of the generation configuration; a word of that number is none."""
    tokens = {
        0: special("<pad>"),
        2: special("</s>"),
        7: special("<end_of_turn>"),
        8: special("<img>"),
        9: special("a", False),
    }
    tokenizer = SimpleNamespace(eos_token_id=2, added_tokens_decoder=tokens)
    model = causal_lm("llama_full")
    found = {}
    for named in (None, 2, 7, [7, 2], [9, 7, 30]):
        model.generation_config.eos_token_id = named
        found[str(named)] = stop_tokens(model, tokenizer)
    assert found == {"None": [2], "2": [2], "7": [2, 7], "[7, 2]": [2, 7], "[9, 7, 30]": [2, 7]}
    tokenizer.eos_token_id = None
    assert stop_tokens(model, tokenizer) == [7]


def special(text, is_special=True):
    return SimpleNamespace(content=text, special=is_special)


def test_the_work_of_a_token_is_what_a_step_reads():
    """Counted by watching the models' forward passes of one step."""
    reference, values = causal_lm("llama_full"), {"a": value_model("llama_full", 1), "b": value_model("llama_full", 2)}
    policies = [
        ReferencePolicy(reference, top_k=6),
        MixturePolicy([causal_lm("llama_full", 3), reference], [0.5, 0.5], top_k=6),
        MavisPolicy(reference, values, {"a": 0.5, "b": 0.5}, beta=1.0, top_k=6),
        MavisPolicy(reference, values, {"a": 0.0, "b": 1.0}, beta=1.0, top_k=6),
    ]
    for policy in policies:
        policy.open(1)
        policy.load([0], policy.prefill([[5, 6, 7]]))
        read = {"language_tokens": 0, "value_tokens": 0}
        hooks = []
        for kind, readers in (("language_tokens", policy.languages), ("value_tokens", policy.value_readers)):
            for reader in readers:
                backbone = getattr(reader.model, reader.model.base_model_prefix)

                def count(module, args, inputs, kind=kind, read=read):
                    read[kind] += inputs["input_ids"].shape[1]

                hooks.append(backbone.register_forward_pre_hook(count, with_kwargs=True))
        policy.distribution()
        policy.advance(torch.tensor([0]))
        for hook in hooks:
            hook.remove()
        work = policy.work()
        assert {k: work[k] for k in read} == read
        language = work["language_tokens"] * forward_flops(reference.config, 1, head_tokens=1)
        value = sum(forward_flops(r.model.config, 6) for r in policy.value_readers)
        assert work["gflop"] == pytest.approx((language + value) / 1e9)
