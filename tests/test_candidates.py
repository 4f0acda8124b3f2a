"""Candidate heads: decoding beside a slow version, the fit beside a planted head, files that do not fit."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from tests.models_for_tests import VOCAB, causal_lm, value_model
from tests.toy_world import answers, run_folders, status
from utils import candidates, tilting
from utils.cached_models import pools_mean
from utils.decoding import beam_search, decode
from utils.errors import DataError
from utils.policies import CandidatePolicy, MavisPolicy
from utils.runs import read_arguments, read_samples

EOS, K = 2, 6


def random_head(model, seed, rank=3):
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight.detach()
    made = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in
            ((VOCAB,), (rank, model.config.hidden_size), (rank, embeddings.shape[1]))]  # fmt: skip
    return candidates.CandidateHead(*made, embeddings=embeddings)


@torch.no_grad()
def slowly(reference, models, heads, weights, prompt, key, *, beta, normalization, length):
    """MAVIS with candidate heads by whole forward passes, without caches: tokens and each step's values."""
    tokens, values_of_steps = list(prompt), []
    for t in range(length):
        text = torch.tensor([tokens])
        p_ref, ids = tilting.top_k_probs(reference(input_ids=text).logits[:, -1], K, 1.0)
        values = torch.zeros(1, K, dtype=torch.float64)
        for model, head, weight in zip(models, heads, weights, strict=True):
            hidden = getattr(model, model.base_model_prefix)(input_ids=text).last_hidden_state[0]
            u, v = head.state @ hidden[-1], head.token @ model.get_input_embeddings().weight[ids[0]].T  # (r,), (r, k)
            q = head.table[ids[0]] + u @ v
            if pools_mean(model):
                own = model.score(hidden[len(prompt) :])[:, 0]
                q = (own.sum() + q) / (len(own) + 1)
            values += weight * q
        u = tilting.normalize_values(tilting.clip_values(values, beta) if normalization == "none" else values,
                                     normalization)  # fmt: skip
        p = tilting.tilt(p_ref, u, beta)
        values_of_steps.append(u[0])
        uniform = tilting.uniforms(torch.tensor([tilting.fold_key(key)]), torch.tensor([t]))
        tokens.append(int(ids[0, tilting.sample(p, uniform)[0]]))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :], values_of_steps


@pytest.mark.parametrize("normalization", ["minmax", "none"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["llama_grouped_tied", "gpt2"])
def test_decoding_with_candidate_heads_equals_the_slow_version(name, shared, normalization):
    if name == "gpt2":  # the slow version asks for its names
        pytest.importorskip("transformers")
    reference = causal_lm(name)
    models = [value_model(name, 1, pooling="mean"), value_model(name, 2), value_model(name, 3, pooling="mean")]
    if shared:
        for model in models[1:]:
            setattr(model, model.base_model_prefix, getattr(models[0], models[0].base_model_prefix))
    heads, weights = [random_head(m, i) for i, m in enumerate(models)], [0.5, 0.2, 0.3]
    policy = CandidatePolicy(reference, models, heads, weights, beta=3.0, top_k=K, normalization=normalization)
    assert policy.work()["value_tokens"] == (1 if shared else 3)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, VOCAB, n).tolist() for n in (4, 9, 6, 4, 7)]
    keys = [(5, i) for i in range(5)]
    completions = decode(policy, prompts, keys=keys, max_new_tokens=8, eos_token_id=EOS, batch_size=2, trace=True)
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        tokens, values = slowly(
            reference, models, heads, weights, prompt, key, beta=3.0, normalization=normalization, length=8
        )
        assert completion.token_ids == tokens
        for step, expected in zip(completion.steps, values, strict=True):
            assert step["values"].tolist() == pytest.approx(expected.tolist(), abs=1e-8)


def test_of_one_beam_the_search_is_plain_decoding():
    reference, models = causal_lm("llama_full"), [value_model("llama_full", 1, pooling="mean")]
    policy = CandidatePolicy(reference, models, [random_head(models[0], 0)], [1.0], beta=2.0, top_k=K)
    prompts, keys = [[5, 6, 7], [9, 8]], [(0, 0), (0, 1)]
    run = dict(keys=keys, max_new_tokens=7, eos_token_id=EOS)
    plain = decode(policy, prompts, batch_size=2, **run)
    beams = beam_search(policy, prompts, num_beams=1, num_return=1, **run)
    assert [c.token_ids for c in plain] == [found[0].token_ids for found in beams]
    several = beam_search(policy, prompts, num_beams=3, num_return=2, **run)
    assert all(len(found) == 2 for found in several)


def planted(count=4000, hidden=16, size=12, k=K, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states, embeddings = torch.randn(count, hidden, generator=rng) * 3, torch.randn(VOCAB, size, generator=rng) * 0.2
    ids = torch.stack([torch.randperm(VOCAB, generator=rng)[:k] for _ in range(count)])
    u, v = torch.randn(2, hidden, generator=rng), torch.randn(2, size, generator=rng)
    table = torch.randn(VOCAB, generator=rng)
    context = ((states @ u.T).unsqueeze(1) * (embeddings[ids] @ v.T)).sum(-1)
    scores = table[ids] + context / context.std()
    return states, ids, scores + 10 * torch.randn(count, 1, generator=rng), torch.arange(count) // 20, embeddings


def test_what_a_step_alone_needs_is_no_part_of_a_texts_state():
    model = value_model("llama_full", 1, pooling="mean")
    policy = CandidatePolicy(causal_lm("llama_full"), [model], [random_head(model, 1)], [1.0], beta=2.0, top_k=K)
    [start] = policy.prefill([[5, 6]])
    policy.open(1)
    policy.load([0], [start])
    policy.distribution()
    policy.advance(torch.tensor([0]))
    assert policy.save([0])[0].extras.keys() == start.extras.keys()


def test_a_planted_head_is_found_and_a_table_alone_is_not_enough():
    """Half of the differences' variance is the table's, so a perfect head agrees to 1 and a table to about 0.7."""
    states, ids, scores, prompt, embeddings = planted()
    tensors, report = candidates.fit_candidate_head(states, ids, scores, prompt, embeddings, rank=4, epochs=30)
    assert report["correlation"] > 0.98
    assert 0.6 < report["correlation_table"] < 0.8 and report["correlation_frozen_state"] < 0.8
    assert tensors["state"].shape == (4, 16) and report["states"] + report["held_out_states"] == len(states)
    again, _ = candidates.fit_candidate_head(states, ids, scores, prompt, embeddings, rank=4, epochs=30)
    assert all(torch.equal(tensors[n], again[n]) for n in tensors)
    with pytest.raises(DataError, match="at least 5 prompts"):
        candidates.fit_candidate_head(states, ids, scores, torch.zeros_like(prompt), embeddings)


def test_what_is_watched_is_what_the_value_models_say():
    """Scores of each candidate against a whole forward pass over the text with the candidate behind it."""
    reference, models = causal_lm("llama_full"), {"a": value_model("llama_full", 1, pooling="mean"),
                                                  "b": value_model("llama_full", 2)}  # fmt: skip
    prompts = [[5, 6, 7, 8], [9, 8, 4]]
    seen = candidates.watch(
        reference, models, prompts, betas=[0.0, 3.0], top_k=K, temperature=1.0, normalization="minmax",
        max_new_tokens=5, eos_token_id=None, batch_size=1,
    )  # fmt: skip
    assert seen.prompt.tolist() == [0] * 5 + [1] * 5
    for i, prompt in enumerate(prompts):
        first = i * 5  # the first state is the prompt's own
        for name, model in models.items():
            backbone = getattr(model, model.base_model_prefix)
            hidden = backbone(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
            assert seen.states[name][first].tolist() == pytest.approx(hidden.tolist(), abs=1e-5)
            texts = torch.tensor([[*prompt, int(a)] for a in seen.token_ids[first]])
            said = model.score(backbone(input_ids=texts).last_hidden_state[:, -1])[:, 0]
            assert seen.scores[name][first].tolist() == pytest.approx(said.tolist(), abs=1e-5)
    assert dataclasses.is_dataclass(seen) and issubclass(candidates._Watching, MavisPolicy)


def test_a_value_model_that_says_no_finite_number_is_refused_before_a_head_is_fitted_to_it():
    model = value_model("llama_full", 1)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="prompt 0: the values of a are not finite"):
        candidates.watch(
            causal_lm("llama_full"), {"a": model}, [[5, 6], [7, 8]], betas=[2.0], top_k=K, temperature=1.0,
            normalization="minmax", max_new_tokens=3, eos_token_id=None, batch_size=2,
        )  # fmt: skip


def test_watching_waits_for_the_device_once_a_batch(monkeypatch):
    """Each copy to the host makes a GPU wait; without an end token all steps of a batch are taken."""
    copies, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a: copies.append(1) or real(self, *a))
    for steps in (3, 9):
        copies.clear()
        candidates.watch(
            causal_lm("llama_full"), {"a": value_model("llama_full", 1)}, [[5, 6], [7, 8]], betas=[2.0], top_k=K,
            temperature=1.0, normalization="minmax", max_new_tokens=steps, eos_token_id=None, batch_size=2,
        )  # fmt: skip
        assert len(copies) == 4, "states, candidates, scores, prompts"


def test_a_head_has_the_same_bytes_each_time_it_is_saved(tmp_path):
    model, saved = value_model("llama_full", 1), set()
    tensors = {n: getattr(random_head(model, 0), n).float() for n in ("table", "state", "token")}
    for n in range(20):
        candidates.save_candidate_head(tmp_path / f"{n}.safetensors", tensors, {"correlation": 1.0}, "abc")
        saved.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(saved) == 1


FIT = "python fit_candidate_heads.py help --value_model_iter 0"


def test_a_head_that_does_not_fit_is_refused_in_one_line(tmp_path):
    model, path = value_model("llama_full", 1), tmp_path / "iter_0" / "help.safetensors"
    head = random_head(model, 0)
    tensors = {n: getattr(head, n).float() for n in ("table", "state", "token")}
    candidates.save_candidate_head(path, tensors, {"correlation": 1.0}, "abc")
    loaded = candidates.load_candidate_head(path, model, "abc", FIT)
    states, ids = torch.randn(3, 32, dtype=torch.float64), torch.tensor([[1, 2], [3, 4], [5, 60]])
    assert torch.allclose(loaded(states, ids), head(states, ids), atol=1e-5)
    good = path.read_bytes()
    for change, said in (
        (lambda: None, "another value model"),
        (lambda: path.write_bytes(good[:-3]), "no candidate head"),
        (lambda: path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:]), "no candidate head"),
        (lambda: path.write_bytes(b"no tensors"), "no candidate head"),
        (lambda: candidates.save_candidate_head(path, tensors | {"table": tensors["table"][:9]}, {}, "abd"), "not fit"),
        (path.unlink, f"make it with: {FIT}"),
    ):
        change()
        with pytest.raises(DataError, match=said):
            candidates.load_candidate_head(path, model, "abd", FIT)


def test_the_scripts_fit_heads_and_steer_by_them(script, capsys):
    prompts = script.workspace / "datasets" / "toy"
    shutil.copy(prompts / "toy_test_deduped.csv", prompts / "toy_train_deduped.csv")
    assert script("fit_candidate_heads", "low,even", "--num_prompts", 10, "--num_epochs", 2, "--rank", 4) == 0
    assert "correlation with the value model" in capsys.readouterr().out
    steer = ("--obj_weights", "0.5,0.5", "--beta", 3)
    assert script("mavis", *steer) == 0 and script("mavis", *steer, "--value_head", "candidates") == 0
    heads = {read_arguments(f)["series"].get("value_head"): f for f in run_folders(script)}
    plain, distilled = heads[None], heads["candidates"]
    assert answers(plain) != answers(distilled)
    value_tokens = [sum(s["value_tokens"] for s in read_samples(f)) for f in (plain, distilled)]
    assert value_tokens[0] > 3 * value_tokens[1]
    assert script("mavis", *steer, "--value_head", "candidates") == 0
    assert "complete and is not repeated" in capsys.readouterr().out
    assert script("mavis_bs", *steer, "--value_head", "candidates", "--Q", 2) == 0
    (script.workspace / "candidate_heads" / "iter_0" / "low.safetensors").unlink()
    assert status(script, "mavis", *steer, "--value_head", "candidates", "--seed", 3) == 1
    assert "fit_candidate_heads.py low" in capsys.readouterr().err
    assert status(script, "mavis", *steer, "--candidate_head_dir", "x") == 2
