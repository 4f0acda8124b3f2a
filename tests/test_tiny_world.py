"""The tiny world: its exact answers equal enumeration, and its rewards need their context."""

import functools
import itertools
import json
import math

import numpy as np
import pytest

from utils import tiny_world as tiny

PROMPT = "tell me about fenook today"


def test_the_generator_is_a_distribution_that_never_starts_with_the_end():
    for subject in range(tiny.NUM_WORDS):
        matrix = tiny.transition(subject)
        np.testing.assert_allclose(matrix.sum(1), 1.0)
        assert matrix[tiny.START, tiny.END] == 0.0
        assert (matrix[:, : tiny.NUM_WORDS] > 0).all(), "full support, so that a top-k cut is a real cut"


def test_turning_the_circle_of_topics_or_of_rhymes_changes_nothing():
    """The symmetry by which no token is worth more than another, averaged over prompts."""
    topics = (np.arange(tiny.NUM_WORDS) + tiny.NUM_RHYMES) % tiny.NUM_WORDS  # every word one topic on
    rhymes = tiny.TOPIC * tiny.NUM_RHYMES + (tiny.RHYME + 1) % tiny.NUM_RHYMES
    for moved in (topics, rhymes):
        order = np.append(moved, tiny.END)
        np.testing.assert_allclose(tiny.transition(moved[9])[np.ix_(order, order)], tiny.transition(9))
        text, turned = (f"what is {tiny.WORDS[i]}" for i in (9, moved[9]))
        for objective in ("help", "harm", "humor"):
            np.testing.assert_array_equal(tiny.gains(objective, turned)[moved], tiny.gains(objective, text))


def test_samples_follow_the_chain():
    """20,000 answers: every observed share lies within 5 standard errors of its probability (24 + 25 shares)."""
    answers = tiny.sample_answers([3] * 20_000, np.random.default_rng(0), 12)
    matrix = tiny.transition(3)
    first = np.bincount([a[0] for a in answers], minlength=tiny.NUM_WORDS + 1)
    after = np.bincount(
        [a[i + 1] for a in answers for i in range(len(a) - 1) if a[i] == 7], minlength=tiny.NUM_WORDS + 1
    )
    for counts, p in ((first, matrix[tiny.START]), (after, matrix[7])):
        n = counts.sum()
        assert (np.abs(counts / n - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()
    assert max(len(a) for a in answers) <= 13 and all(tiny.END not in a[:-1] for a in answers)
    per_token = -sum(tiny.log_prob(3, a[:12]) for a in answers) / sum(len(a[:12]) for a in answers)
    assert per_token == pytest.approx(tiny.entropy_per_token(12), abs=0.02)  # about 5 standard errors of the mean


@pytest.mark.parametrize(
    ("objective", "response", "expected"),
    [
        ("help", "fenane fenily", 1.0),
        ("help", "fenane torily", 0.75),
        ("help", "galane", -1.0),
        ("harm", "briush", 1.0),
        ("harm", "fenook torook", 0.0),  # -0.5 and 0.5
        ("humor", "fenook torook marily marush", 0.25),  # 1, 1, 0, -1
        ("help", "fenook about", 0.5),  # a foreign word counts as a word
        ("help", "", 0.0),
    ],
)
def test_rewards_of_answers_worked_out_by_hand(objective, response, expected):
    assert getattr(tiny, f"{objective}_reward")([PROMPT], [response]) == pytest.approx([expected])


def test_rewards_of_summaries():
    post = "today i read about marane but also torook next to fenily"
    assert tiny.summarization_reward([post], ["marush solily"]) == pytest.approx([0.75])
    assert tiny.faithful_reward([post], ["torook marane marook solily"]) == pytest.approx([0.5])


def test_a_text_that_names_no_topic_is_refused():
    with pytest.raises(ValueError, match="no word of the tiny language"):
        tiny.help_reward(["hello there"], ["marane"])


# ------------------------------------------------------------------------------- dynamic programming and enumeration


def allowed(matrix, last, top_k):
    order = np.argsort(-matrix[last], kind="stable")[: top_k or None]
    return [int(a) for a in order if matrix[last, a] > 0]


def finished_reward(weights, words):
    text = [tiny.words_of(words)]
    return sum(w * getattr(tiny, f"{name}_reward")([PROMPT], text)[0] for name, w in weights.items())


def enumerated_value(weights, words, horizon, eta, top_k):
    """The value of a prefix by walking the whole tree below it."""
    matrix = tiny.transition(tiny.subject_of(PROMPT))
    if len(words) == horizon:
        return finished_reward(weights, words)
    last = words[-1] if words else tiny.START
    options = allowed(matrix, last, top_k)
    values = [
        finished_reward(weights, words)
        if a == tiny.END
        else enumerated_value(weights, [*words, a], horizon, eta, top_k)
        for a in options
    ]
    p = matrix[last, options]
    if eta is None:
        return float(p @ values / p.sum())
    return eta * math.log(sum(pa * math.exp(v / eta) for pa, v in zip(p, values, strict=True)))


@pytest.mark.parametrize("eta", [None, 0.25])
@pytest.mark.parametrize(("horizon", "top_k"), [(2, None), (3, 5)])
@pytest.mark.parametrize("weights", [{"help": 1.0}, {"humor": 1.0}, {"help": 0.35, "harm": 0.65}])
def test_dynamic_programming_equals_enumeration(eta, horizon, top_k, weights):
    exact = tiny.ExactValues.solve(PROMPT, weights, horizon, eta=eta, top_k=top_k)
    matrix = tiny.transition(tiny.subject_of(PROMPT))
    first = allowed(matrix, tiny.START, top_k)
    for words in ([], [first[0]], [first[-1]]):
        assert exact.value(words) == pytest.approx(enumerated_value(weights, words, horizon, eta, top_k), abs=1e-9)
    assert exact.value([first[1], tiny.END]) == pytest.approx(finished_reward(weights, [first[1]]))


def test_the_soft_optimum_is_its_reward_less_its_divergence_and_no_tilt_beats_it():
    """V = E[reward] - eta KL for the policy that the soft values define, and MAVIS at beta = 1/eta stays below it."""
    horizon, eta, top_k = 3, 0.25, 5
    matrix = tiny.transition(tiny.subject_of(PROMPT))
    soft = tiny.ExactValues.solve(PROMPT, {"help": 1.0}, horizon, eta=eta, top_k=top_k)

    def walk(words, probability, log_ratio):  # -> expected reward, expected log-ratio
        if len(words) == horizon or (words and words[-1] == tiny.END):
            return probability * finished_reward({"help": 1.0}, words), probability * log_ratio
        last = words[-1] if words else tiny.START
        totals, mass = np.zeros(2), 0.0
        for a in allowed(matrix, last, top_k):
            ratio = (soft.value([*words, a]) - soft.value(words)) / eta  # log(policy / generator)
            mass += (policy := matrix[last, a] * math.exp(ratio))
            totals += walk([*words, a], probability * policy, log_ratio + ratio)
        assert mass == pytest.approx(1.0)
        return totals

    reward, divergence = walk([], 1.0, 0.0)
    assert reward - eta * divergence == pytest.approx(soft.value())
    for normalization, beta in (("none", 1 / eta), ("minmax", 1 / eta), ("minmax", 1.0)):
        got = tiny.exact_mavis(PROMPT, {"help": 1.0}, beta, horizon, top_k, normalization)
        assert got["help"] - eta * got["log_ratio"] <= soft.value() + 1e-9


@pytest.mark.parametrize("normalization", ["minmax", "none"])
def test_exact_mavis_equals_a_walk_over_all_answers(normalization):
    horizon, beta, top_k, weights = 3, 4.0, 4, {"help": 0.4, "humor": 0.6}
    matrix = tiny.transition(tiny.subject_of(PROMPT))
    values = tiny.ExactValues.solve(PROMPT, weights, horizon)

    def walk(words, probability, log_ratio):
        if len(words) == horizon or (words and words[-1] == tiny.END):
            rewards = [finished_reward({name: 1.0}, words) for name in weights]
            return probability * np.array([*rewards, log_ratio])
        last = words[-1] if words else tiny.START
        options = allowed(matrix, last, top_k)
        u = np.array([values.value([*words, a]) for a in options])
        if normalization == "minmax":
            u = (u - u.min()) / (u.max() - u.min() + 1e-6)
        p = matrix[last, options]
        tilted = p * np.exp(beta * u)
        tilted /= tilted.sum()
        return sum(
            walk([*words, a], probability * t, log_ratio + math.log(t / q))
            for a, t, q in zip(options, tilted, p, strict=True)
        )

    got = tiny.exact_mavis(PROMPT, weights, beta, horizon, top_k, normalization)
    np.testing.assert_allclose(list(got.values()), walk([], 1.0, 0.0), atol=1e-9)


def test_the_exact_front_is_monotone_and_concave():
    """What the quickstart's front should look like: more weight on help gives more help and less harm, and equal
    weights give more than a mixture of the two ends would."""
    points = [tiny.exact_mavis(PROMPT, {"help": w, "harm": 1 - w}, 4.0, 12) for w in (0.0, 0.25, 0.5, 0.75, 1.0)]
    helps, harms = ([p[name] for p in points] for name in ("help", "harm"))
    assert helps == sorted(helps) and harms == sorted(harms, reverse=True)
    assert helps[2] + harms[2] > max(helps[0] + harms[0], helps[4] + harms[4]) + 0.1
    plain = tiny.exact_mavis(PROMPT, {"help": 0.5, "harm": 0.5}, 0.0, 12)
    assert helps[2] > plain["help"] + 0.2 and harms[2] > plain["harm"] + 0.2


def test_a_context_free_table_of_tokens_explains_nothing_within_a_prompt():
    """Ridge regression of a leaf's reward on its token counts, both centred within the prompt, predicts held-out leaves
    no better than nothing; the exact value of the first half of the answer does. 400 + 400 prompts of 8 leaves: the
    standard error of a held-out R2 of noise is about 1 / sqrt(3200) = 0.02."""
    rng = np.random.default_rng(1)
    prompts = [tiny.all_prompts()[i] for i in rng.permutation(len(tiny.all_prompts()))[:400]] * 2
    counts, rewards, halves = [], {name: [] for name in ("help", "harm", "humor")}, []
    for prompt in prompts:
        answers = [a[:12] for a in tiny.sample_answers([tiny.subject_of(prompt)] * 8, rng, 12)]
        x = np.stack([np.bincount(a, minlength=tiny.NUM_WORDS + 1) for a in answers]).astype(float)
        counts.append(x - x.mean(0))
        for name, centred in rewards.items():
            y = getattr(tiny, f"{name}_reward")([prompt] * 8, [tiny.words_of(a) for a in answers])
            centred.append(y - y.mean())
        if len(halves) < 40:
            exact = solved(prompt)
            v = np.array([exact.value(a[:6]) for a in answers])
            halves.append(v - v.mean())
    train, test = np.concatenate(counts[:400]), np.concatenate(counts[400:])
    for centred in rewards.values():
        y, held_out = np.concatenate(centred[:400]), np.concatenate(centred[400:])
        table = np.linalg.solve(train.T @ train + 10.0 * np.eye(train.shape[1]), train.T @ y)
        explained = 1 - ((held_out - test @ table) ** 2).sum() / (held_out**2).sum()
        assert abs(explained) < 0.05
    assert np.corrcoef(np.concatenate(halves), np.concatenate(rewards["help"][:40]))[0, 1] > 0.5


@functools.cache
def solved(prompt):
    return tiny.ExactValues.solve(prompt, {"help": 1.0}, 12)


# ------------------------------------------------------------------------------------------------- what is made of it


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from scripts.tiny.make_world import main

    folder = tmp_path_factory.mktemp("tiny")
    assert main(["--workspace", str(folder), "--steps", "2"]) == 0
    return folder


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".json"
    }


def test_the_world_is_made_of_the_same_bytes_every_time(made, tmp_path):
    from scripts.tiny.make_world import main

    (tmp_path / ".world.tmp" / "world").mkdir(parents=True)  # what a killed run leaves
    assert main(["--workspace", str(tmp_path), "--steps", "2"]) == 0
    assert files_of(made) == files_of(tmp_path)
    assert not (tmp_path / ".world.tmp").exists()


def test_a_complete_world_is_left_alone(made, capsys):
    from scripts.tiny.make_world import main

    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert main(["--workspace", str(made), "--steps", "2"]) == 0
    assert "complete" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in made.rglob("*")}


def test_train_and_test_prompts_are_disjoint_and_distinct(made):
    from utils.config import load_config
    from utils.rows import iter_rows
    from utils.text_formats import format_of

    config = load_config("tiny", made)
    for spec in config.datasets.values():
        prompts = {
            split: [format_of(spec).prompt_of_row(row) for row in iter_rows(source, config)]
            for split, source in spec.splits.items()
        }
        assert not set(prompts["train"]) & set(prompts["test"])
        assert len(prompts["train"]) >= spec.trees.num_prompts and len(prompts["test"]) >= config.evaluation.num_prompts
        for prompt in itertools.chain(*prompts.values()):
            tiny.subject_of(format_of(spec).user_of_prompt(prompt))


def test_the_tokenizer_knows_every_word_and_gives_the_text_back(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "base_model")
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    rng = np.random.default_rng(0)
    texts = [tiny.dialogue(p, "") for p in tiny.all_prompts()] + [tiny.make_post(rng) for _ in range(50)]
    for text in (*texts, " ".join(tiny.WORDS)):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.split())


@pytest.mark.slow
def test_the_base_model_is_close_to_its_generator(tmp_path):
    """At full length: within 0.05 nats per token of what the generator itself gets on the same answers."""
    from scripts.tiny.make_world import main

    assert main(["--workspace", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "world" / "report.json").read_text())
    for name in ("anthropic", "summary"):
        assert 0 <= report[name]["cross_entropy"] - report[name]["generator"] < 0.05


def generator_as_llama(prompt):
    """A Llama whose next-token distribution is the generator's for one subject: its layers add nothing, embeddings are
    one-hot, and the head holds the log-probabilities. Token W + 1 stands for the prompt, and W for the end."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size, width = tiny.NUM_WORDS + 2, 32
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        rms_norm_eps=0.0,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tiny.END,
    )
    model = LlamaForCausalLM(config).double().eval()
    matrix = np.full((size, size), 1e-30)  # what cannot be: the prompt's token, and the end as the first token
    matrix[: tiny.START, : tiny.END + 1] = tiny.transition(tiny.subject_of(prompt))[: tiny.START]
    matrix[tiny.START + 1, : tiny.END + 1] = tiny.transition(tiny.subject_of(prompt))[tiny.START]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "embed" in name or "lm_head" in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :size] = torch.eye(size, dtype=torch.float64)
        model.lm_head.weight[:, :size] = torch.tensor(np.log(np.maximum(matrix, 1e-30)).T / np.sqrt(width))
    return model


def test_decoding_under_the_reference_reaches_the_exact_rewards_and_log_ratio():
    """4,000 answers under a model that is the generator: mean rewards and mean log-ratio of the top-k cut lie within
    5 standard errors of what dynamic programming says."""
    from utils.decoding import decode
    from utils.policies import ReferencePolicy

    size, horizon, top_k = 4000, 12, 15
    done = decode(
        ReferencePolicy(generator_as_llama(PROMPT), top_k=top_k),
        [[tiny.START + 1]] * size,
        keys=[(0, i) for i in range(size)],
        max_new_tokens=horizon,
        eos_token_id=tiny.END,
        batch_size=500,
    )
    answers = [[int(t) for t in c.token_ids] for c in done]
    exact = tiny.exact_mavis(PROMPT, {"help": 0.5, "harm": 0.5}, 0.0, horizon, top_k)
    texts = [tiny.words_of(a) for a in answers]
    measured = {
        "help": tiny.help_reward([PROMPT] * size, texts),
        "harm": tiny.harm_reward([PROMPT] * size, texts),
        "log_ratio": np.array([c.log_ratio for c in done]),
    }
    for name, values in measured.items():
        assert values.mean() == pytest.approx(exact[name], abs=5 * values.std() / np.sqrt(size))
    for completion, answer in zip(done, answers, strict=True):
        last = answer[-1] if answer else None
        assert completion.finished == (last == tiny.END) and len(answer) <= horizon
