"""PPO: each formula beside a slow scalar version, a bandit whose optimum is known, resuming, and the script itself."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.models_for_tests import VOCAB, causal_lm
from utils import models, ppo
from utils.adapters import load_policies
from utils.answer_batches import lay_out_answers
from utils.cli import run
from utils.config import REPOSITORY, load_config
from utils.data import prompts_csv, read_prompts, write_prompts
from utils.specs import PPOSpec

sys.path.insert(0, str(REPOSITORY / "Finetuning" / "PPO"))
import ppo as script

EOS = 2
CPU = torch.device("cpu")


def ragged(seed=0, rows=5, longest=7):
    """Random (B, R) float64 tensors and a mask of answers of several lengths, one of them a single token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, longest, *torch.randint(1, longest + 1, (rows - 2,), generator=generator).tolist()]
    mask = torch.zeros(rows, longest, dtype=torch.float64)
    for i, n in enumerate(lengths):
        mask[i, :n] = 1

    def values():
        return torch.randn(rows, longest, generator=generator, dtype=torch.float64)

    return lengths, mask, values


# ------------------------------------------------------------------------------------------- formulas, the slow way


def test_token_rewards_add_up_to_the_penalised_score():
    lengths, mask, values = ragged()
    log_p, log_q, scores = values(), values(), torch.arange(5.0, dtype=torch.float64)
    rewards = ppo.token_rewards(scores, log_p, log_q, mask, 0.3)
    for i, n in enumerate(lengths):
        for t in range(mask.shape[1]):
            expected = -0.3 * float(log_p[i, t] - log_q[i, t]) if t < n else 0.0
            expected += float(scores[i]) if t == n - 1 else 0.0
            assert float(rewards[i, t]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_equal_the_sums_of_their_definition(gamma, lam):
    lengths, mask, values = ragged(1)
    rewards, v = values() * mask, values()  # the values behind an answer's end are not 0, and must not count
    found = ppo.advantages(rewards, v, mask, gamma, lam)
    for i, n in enumerate(lengths):
        r, u = rewards[i].tolist(), v[i].tolist()
        for t in range(mask.shape[1]):
            expected = 0.0
            for s in range(t, n):
                after = u[s + 1] if s + 1 < n else 0.0
                expected += (gamma * lam) ** (s - t) * (r[s] + gamma * after - u[s])
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-12)
    if gamma == lam == 1.0:  # then an advantage is what is still to come less what was expected
        assert float(found[1, 0]) == pytest.approx(float(rewards[1].sum() - v[1, 0]), abs=1e-12)


def test_whitening_counts_answers_tokens_alone():
    _, mask, values = ragged(2)
    x = values() * 3 + 7
    white = ppo.whiten(x, mask)
    kept = white[mask.bool()]
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-9) and float(kept.square().mean()) == pytest.approx(1.0)
    assert not white[~mask.bool()].any()
    changed = ppo.whiten(torch.where(mask.bool(), x, 1e6), mask)
    assert torch.allclose(changed, white)


def test_the_clipped_losses_equal_a_scalar_version():
    _, _, values = ragged(3)
    new, old, gains, v, v_old, returns = (values() for _ in range(6))
    by_token, clipped = ppo.policy_loss(new, old, gains, 0.2)
    by_value = ppo.value_loss(v, v_old, returns, 0.3)
    seen = set()
    for i, t in np.ndindex(*new.shape):
        ratio, a = math.exp(new[i, t] - old[i, t]), float(gains[i, t])
        kept = min(max(ratio, 0.8), 1.2)
        assert float(by_token[i, t]) == pytest.approx(-min(ratio * a, kept * a), abs=1e-12)
        assert bool(clipped[i, t]) == (kept * a < ratio * a)
        near = float(v_old[i, t]) + min(max(float(v[i, t] - v_old[i, t]), -0.3), 0.3)
        worse = max((float(v[i, t]) - float(returns[i, t])) ** 2, (near - float(returns[i, t])) ** 2)
        assert float(by_value[i, t]) == pytest.approx(worse / 2, abs=1e-12)
        seen.add((ratio > 1.2, ratio < 0.8, a > 0))
    assert len(seen) == 6  # every case of the clip occurs


def test_the_kl_coefficient_is_steered_towards_its_target():
    controller = ppo.AdaptiveKL(0.1, target=3.0, horizon=1000.0)
    controller.update(30.0, 100)  # far above: the error is clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 100 / 1000))
    controller.update(3.3, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02 * (1 + 0.1 * 0.1))
    controller.update(0.0, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02 * 1.01 * 0.98)
    fixed = ppo.AdaptiveKL(0.1, target=None, horizon=1.0)
    fixed.update(100.0, 64)
    assert fixed.coef == 0.1


# ----------------------------------------------------------------------------------------------------- the policy


def new_policy(name="llama_grouped_tied", eos=EOS, dtype=torch.float64, seed=0, r=4, temperature=1.0, scale=0.0):
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, lora_dropout=0.5, target_modules=modules,
                          fan_in_fan_out=name == "gpt2")  # fmt: skip
        model = get_peft_model(causal_lm(name, dtype=dtype), lora).to(dtype)
        policy = ppo.PolicyWithValue(model, [eos], temperature=temperature)
        if scale:
            with torch.no_grad():
                for parameter in policy.trained().values():
                    parameter.add_(scale * torch.randn(parameter.shape, dtype=parameter.dtype))
    return policy


@pytest.mark.parametrize("name", ["llama_grouped_tied", "gpt2", "qwen2"])
def test_log_probabilities_and_values_equal_those_of_one_text_at_a_time(name):
    policy = new_policy(name, temperature=0.8, scale=0.1)
    prompts, responses = [[5, 6, 7, 8], [9], [10, 11]], [[12, 13], [14, 15, 16, 2], [17]]
    texts = lay_out_answers(prompts, responses, CPU)
    with torch.no_grad():
        log_probs, values = policy(texts)
        reference = policy.reference_log_probs(texts)
    base, adapted = policy.model.get_base_model(), policy.model
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            out = adapted(ids, output_hidden_states=True)
            with adapted.disable_adapter():
                plain = base(ids).logits
        for t, token in enumerate(response):
            place = len(prompt) - 1 + t
            for logits, ours in ((out.logits[0, place], log_probs), (plain[0, place], reference)):
                if t == 0:  # the end token cannot be the first
                    logits = logits.clone()
                    logits[EOS] = -math.inf
                assert float(ours[i, t]) == pytest.approx(float((logits / 0.8).log_softmax(-1)[token]), abs=1e-9)
            value = policy.head(out.hidden_states[-1][0, place]).detach()
            assert float(values[i, t]) == pytest.approx(float(value), abs=1e-9)
        assert not log_probs[i, len(response) :].any() and not values[i, len(response) :].any()


def test_the_first_token_is_never_the_end_and_sampling_is_the_policy_that_is_trained():
    """With no other cut the decoder's own log-probability of a token is what the training pass gives it."""
    from utils.decoding import decode
    from utils.policies import ReferencePolicy

    policy = new_policy(eos=5, scale=0.3)
    with torch.no_grad():  # a model that all but always ends
        policy.model.get_base_model().lm_head.weight[5] *= 8
    prompts, keys = [[i, i + 1] for i in range(6, 26)], [(i,) for i in range(20)]
    options = dict(top_k=VOCAB - 1, batch_size=8)
    answers = ppo.sample_answers(policy, prompts, keys, max_new_tokens=5, **options)
    assert all(a[0] != 5 for a in answers) and any(a[-1] == 5 for a in answers)
    sampler = ReferencePolicy(policy.model, top_k=VOCAB - 1)
    run = dict(max_new_tokens=1, eos_token_id=5, batch_size=8, suppress_first_eos=True)
    completions = decode(sampler, prompts, keys=keys, **run)
    assert [c.token_ids for c in completions] == [a[:1] for a in answers]
    with torch.no_grad():
        log_probs, _ = policy(lay_out_answers(prompts, [c.token_ids for c in completions], CPU))
    assert log_probs[:, 0].tolist() == pytest.approx([c.log_prob for c in completions], abs=1e-8)


# ------------------------------------------------------------------------------------------------------- training

SPEC = PPOSpec(
    lr=1e-2, batch_size=12, num_epochs=2, ppo_epochs=2, mini_batch_size=5, micro_batch_size=2, kl_target=None
)


def even_tokens(indices, responses):
    return {"even": np.array([np.mean([t % 2 == 0 for t in r]) for r in responses]), "one": np.ones(len(responses))}


def train(policy, folder, spec=SPEC, score=even_tokens, prompts=None, new_tokens=4, **options):
    options = {"top_k": 8, "max_new_tokens": new_tokens, "decode_batch_size": 16, "save_steps": 1} | options
    prompts = prompts or [[i, i + 1, i + 2][: 1 + i % 3] for i in range(5, 20)]
    return ppo.train(policy, prompts, score, {"even": 1.0}, spec, folder, **options)


def test_the_first_pass_has_ratio_1_and_clips_nothing(tmp_path):
    """Dropout is in the adapter's configuration: it must not act."""
    policy = new_policy(scale=0.1)
    policy.model.train()
    rows = train(policy, tmp_path, dataclasses.replace(SPEC, ppo_epochs=1, mini_batch_size=12))
    assert all(row["ratio_error"] < 1e-9 and row["clip_fraction"] == 0.0 for row in rows)
    rows = train(policy, tmp_path / "two", SPEC)
    assert all(row["ratio_error"] < 1e-9 for row in rows) and any(row["clip_fraction"] > 0 for row in rows)


def test_micro_batches_change_memory_alone(tmp_path):
    logs = []
    for size in (1, 12):
        policy = new_policy()
        train(policy, tmp_path / str(size), dataclasses.replace(SPEC, micro_batch_size=size))
        logs.append({n: p.detach().clone() for n, p in policy.trained().items()})
    assert all(torch.allclose(logs[0][n], logs[1][n], atol=1e-8) for n in logs[0])


def test_micro_batches_do_not_make_the_host_wait_more_often(tmp_path, monkeypatch):
    """What is read of a device waits for it: once an optimizer step, whatever its number of forward passes."""
    reads, real = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or real(self))
    counts = []
    for size in (1, 12):
        reads.clear()
        train(new_policy(), tmp_path / str(size), dataclasses.replace(SPEC, micro_batch_size=size))
        counts.append(len(reads))
    assert counts[0] == counts[1]


def log_of(folder):
    with (folder / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_gradient_checkpointing_changes_memory_alone(rival_world, tmp_path):
    for flag in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
        run_script(rival_world, "--alpha", 1, "--max_steps", 2, flag, "--output_dir", tmp_path / flag)
    one, two = (load_file(f / "adapter_model.safetensors") for f in sorted(tmp_path.iterdir()))
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)


def bandit(coef, folder, *, arms=16, steps=60):
    """(policy's distribution, reference's, optimum, rewards, log) after PPO on one prompt and one token."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=arms, **shape)).eval()
        torch.nn.init.normal_(model.lm_head.weight, std=0.25)  # an uneven reference
        modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=modules))
        policy = ppo.PolicyWithValue(model, [])
    reward = torch.rand(arms, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prompt = [5, 6, 7]

    def distribution():
        with torch.no_grad():
            return model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)

    with model.disable_adapter():
        p_ref = distribution()
    optimum = p_ref * (reward / coef).exp()
    spec = PPOSpec(lr=5e-3, batch_size=256, num_epochs=steps * 256, ppo_epochs=2, mini_batch_size=256,
                   micro_batch_size=256, kl_coef=coef, kl_target=None, seed=3)  # fmt: skip

    def score(_, responses):
        return {"even": np.array([float(reward[r[0]]) for r in responses])}

    rows = ppo.train(
        policy, [prompt], score, {"even": 1.0}, spec, folder,
        top_k=arms, max_new_tokens=1, decode_batch_size=256, save_steps=10_000,
    )  # fmt: skip
    return distribution(), p_ref, optimum / optimum.sum(), reward, rows


def test_a_bandit_ends_at_the_kl_regularised_optimum(tmp_path):
    """max E[r] - coef KL(p, p_ref) is solved by p_ref exp(r / coef) / Z; what p loses is coef KL(p, optimum).

    Bound: a tenth of what the optimum gains over the reference (the reference itself loses all of it). Usually 2 %; the
    seed is fixed, so that only another machine's rounding can move it.
    """
    coef = 0.3
    p, p_ref, optimum, reward, rows = bandit(coef, tmp_path)

    def kl(a, b):
        return float((a * (a / b).log()).sum())

    def objective(q):
        return float((q * reward).sum()) - coef * kl(q, p_ref)

    gain = objective(optimum) - objective(p_ref)
    assert gain == pytest.approx(coef * kl(p_ref, optimum), rel=1e-6)
    assert coef * kl(p, optimum) < 0.1 * gain
    assert rows[-1]["kl"] == pytest.approx(kl(optimum, p_ref), rel=0.5)
    assert 0.5 * float((p - optimum).abs().sum()) < 0.1 < 0.5 * float((p_ref - optimum).abs().sum())
    steps = [r["kl_coef"] for r in rows]
    assert steps == [coef] * 60  # no target: the coefficient stays


def test_a_killed_run_goes_on_to_the_same_policy(tmp_path):
    whole, cut = new_policy(), new_policy()
    spec = dataclasses.replace(SPEC, kl_target=0.01, kl_horizon=50.0, num_epochs=4)
    rows = train(whole, tmp_path / "whole", spec)
    calls = []

    def killed(indices, responses):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return even_tokens(indices, responses)

    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path / "cut", spec, killed, save_steps=2)
    assert json.loads((tmp_path / "cut" / "state.json").read_text())["step"] == 2
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))
    again, said = new_policy(seed=9), []  # another start: everything must come from the checkpoint
    resumed = train(again, tmp_path / "cut", spec, save_steps=2, say=said.append)
    assert said == ["going on from step 2 of 5"] and len({r["kl_coef"] for r in rows}) > 1
    for name, parameter in whole.trained().items():
        assert torch.equal(parameter, again.trained()[name]), name
    assert [{**r, "seconds": 0} for r in rows] == [{**r, "seconds": 0} for r in resumed]
    assert [int(r["step"]) for r in log_of(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "cut" / "training_log.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_reads_each_prompt_once_a_pass():
    spec = PPOSpec(batch_size=4, num_epochs=3)
    steps = [ppo.prompts_of_step(s, 6, spec) for s in range(ppo.plan_steps(6, spec))]
    flat = [i for step in steps for i in step]
    assert len(steps) == 4 and sorted(flat[:6]) == sorted(flat[6:12]) == list(range(6)) and flat[:6] != flat[6:12]
    assert ppo.plan_steps(2, spec) == 1 and ppo.plan_steps(600, PPOSpec(batch_size=4, max_steps=7)) == 7


# -------------------------------------------------------------------------------------------------------- the script


def run_script(world, *arguments, status=0):
    assert run(lambda: script.main([*map(str, arguments), *world.common])) == status


def test_the_script_leaves_an_ordinary_adapter_where_the_evaluation_looks(rival_world, capsys):
    world = rival_world
    run_script(world, "--alpha", 0.3, "--max_steps", 2)
    folder = world.ws / "morlhf" / "anthropic" / "help_harm" / "morlhf_0.3"
    assert sorted(f.name for f in folder.iterdir() if f.name != "README.md") == [
        "adapter_config.json", "adapter_model.safetensors", "args.yaml", "metrics.json", "training_log.csv",
        "training_log.png", "value_head.safetensors",
    ]  # fmt: skip
    record = json.loads((folder / "metrics.json").read_text())
    assert record["weights"] == {"help": 0.3, "harm": 0.7} and record["kind"] == "ppo" and record["steps"] == 2
    rows = log_of(folder)
    for row in rows:
        assert float(row["reward"]) == pytest.approx(0.3 * float(row["reward_help"]) + 0.7 * float(row["reward_harm"]))
    base, _ = models.load_reference(world.config, world.config.dataset("anthropic"), CPU)
    policy = load_policies(base, {"policy": folder})["policy"]
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert not torch.allclose(policy(ids).logits, base(ids).logits)
    capsys.readouterr()
    run_script(world, "--alpha", 0.3, "--max_steps", 2)
    assert "the adapter is complete" in capsys.readouterr().out
    run_script(world, "--alpha", 0.3, "--max_steps", 3, status=1)
    assert "was made with training.max_steps=2, this command has 3" in capsys.readouterr().err


def test_the_mean_reward_rises_by_more_than_three_standard_errors(rival_world, tmp_path):
    """In a tiny world whose base knows a little of its language. Usually by 0.5 in 20 steps of 96 answers, where a
    mean's standard error is 0.05; the seeds are fixed."""
    from scripts.tiny.make_world import main as make_world

    assert make_world(["--workspace", str(tmp_path), "--steps", "100"]) == 0
    write_prompts(
        prompts_csv(load_config(rival_world.config.path, tmp_path), rival_world.config.dataset("anthropic"), "train"),
        read_prompts(prompts_csv(rival_world.config, rival_world.config.dataset("anthropic"), "train"))[:64],
    )
    sizes = ["--batch_size", 96, "--mini_batch_size", 48, "--micro_batch_size", 96, "--num_prompts", 64, "--lr", 4e-3]
    steps = ["--max_steps", 20, "--num_epochs", 30, "--workspace", tmp_path, "--output_dir", tmp_path / "out"]
    run_script(rival_world, "--alpha", 1, *sizes, *steps)
    rows = log_of(tmp_path / "out")
    first, last = rows[0], rows[-1]
    error = math.hypot(float(first["reward_error"]), float(last["reward_error"]))
    assert len(rows) == 20 and float(last["reward"]) - float(first["reward"]) > 3 * error


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["--alpha", "1"], "single/help"),
        (["--alpha", "0"], "single/harm"),
        (["--reward_models", "harm"], "single/harm"),
        (["--reward_models", "harm", "help", "--alpha", "0.3"], "help_harm/morlhf_0.7"),
        (["--reward_models", "help", "harm", "--reward_weights", "0.25", "0.75"], "help_harm/morlhf_0.25"),
    ],
)
def test_the_tree_is_named_by_the_weights_in_the_data_sets_order(rival_world, capsys, arguments, place):
    run_script(rival_world, *arguments, "--dry_run")
    assert f"morlhf/anthropic/{place}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give --alpha (the weight of help) or --reward_weights for help, harm"),
        (["--alpha", "1.5"], 2, "--alpha must lie between 0 and 1, got 1.5, -0.5"),
        (["--alpha", "nan"], 2, "--alpha must lie between 0 and 1"),
        (["--alpha", "0.5", "--reward_weights", "0.5", "0.5"], 2, "either --alpha or --reward_weights"),
        (["--reward_weights", "0.5", "0.6"], 2, "sum to 1.1"),
        (["--reward_weights", "1"], 2, "has 1 numbers for 2 objectives, help, harm"),
        (["--reward_models", "help", "help", "--alpha", "1"], 2, "twice"),
        (["--reward_models", "helpful"], 2, "did you mean 'help'"),
        (["--alpha", "1", "--lr", "0"], 2, "--lr must be above 0, got 0"),
        (["--alpha", "1", "--num_epochs", "0"], 2, "--num_epochs must be at least 1, got 0"),
        (["--alpha", "1", "--kl_target", "nan"], 2, "--kl_target must be a finite number"),
        (["--alpha", "1", "--lora_r", "0"], 2, "--lora_r must be at least 1"),
        (["--alpha", "1", "--base_model", "/no/such/model"], 1, "no usable checkpoint at '/no/such/model'"),
        (["--alpha", "1", "--max_new_tokens", "128"], 1, "leaves no room for a prompt"),
        (["--alpha", "1", "--algorithm", "rloo", "--batch_size", "6"], 2, "must be a multiple of --num_generations"),
    ],
)
def test_a_mistake_ends_in_one_line_and_makes_no_adapter(rival_world, capsys, arguments, status, message, tmp_path):
    run_script(rival_world, *arguments, "--output_dir", tmp_path / "out", status=status)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not any(tmp_path.iterdir())


def test_a_diverged_run_leaves_no_adapter(rival_world, capsys, tmp_path):
    run_script(rival_world, "--alpha", 1, "--max_steps", 3, "--lr", 1e30, "--output_dir", tmp_path / "out", status=1)
    assert "diverged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_launched_processes_learn_what_one_learns(rival_world, tmp_path):
    """Float32 sums in another order differ by about 1e-7 a step; two steps at lr 2e-3 leave them within 1e-4. Another
    batch moves a probability by 1e-6, which flips one of the 150 sampled tokens with a chance of 1e-4; the seed and
    the machine's arithmetic decide that once and for all."""
    arguments = ["--alpha", "0.5", "--max_steps", "2", *rival_world.common, "--output_dir"]
    assert script.main([*arguments, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(REPOSITORY / "Finetuning" / "PPO" / "ppo.py"), *arguments, str(tmp_path / "two")],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    assert any(one[k].abs().max() > 1e-4 for k in one if "lora_B" in k)  # and something was learned
    rewards = [[r["reward"] for r in log_of(tmp_path / n)] for n in ("one", "two")]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_alternative_trainers_take_the_same_arguments(rival_world, tmp_path, algorithm, monkeypatch):
    import yaml

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    folder = tmp_path / algorithm
    run_script(rival_world, "--alpha", 0.5, "--algorithm", algorithm, "--max_steps", 2, "--output_dir", folder)
    assert {f.name for f in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "args.yaml", "metrics.json", "training_log.csv",
        "training_log.png",
    }  # fmt: skip
    rows = log_of(folder)
    assert [r["step"] for r in rows] == ["1", "2"]
    for row in rows:
        mixed = 0.5 * float(row["reward_help"]) + 0.5 * float(row["reward_harm"])
        assert float(row["reward"]) == pytest.approx(mixed, abs=1e-5)
    assert yaml.safe_load((folder / "args.yaml").read_text())["settings"]["algorithm"] == algorithm
    base, _ = models.load_reference(rival_world.config, rival_world.config.dataset("anthropic"), CPU)
    policy = load_policies(base, {"policy": folder})["policy"]
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert not torch.equal(policy(ids).logits, base(ids).logits)


def test_a_killed_trl_training_goes_on_from_its_checkpoint(rival_world, tmp_path, monkeypatch, capsys):
    import trl

    arguments = [
        "--alpha",
        1,
        "--algorithm",
        "rloo",
        "--max_steps",
        3,
        "--save_steps",
        1,
        "--output_dir",
        tmp_path / "out",
    ]
    original, calls = trl.RLOOTrainer.training_step, []

    def killed(self, *args, **keywords):
        calls.append(1)
        if len(calls) == 8:  # in the second step: 2 passes of 2 forward passes each
            raise KeyboardInterrupt
        return original(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trl.RLOOTrainer, "training_step", killed)
        run_script(rival_world, *arguments, status=130)
    before = len(calls)
    monkeypatch.setattr(trl.RLOOTrainer, "training_step", lambda *a, **k: calls.append(1) or original(*a, **k))
    run_script(rival_world, *arguments)
    assert [r["step"] for r in log_of(tmp_path / "out")] == ["1", "2", "3"]
    assert len(calls) - before == 8  # the first step's 4 passes were not done again
