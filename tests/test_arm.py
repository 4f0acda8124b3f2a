"""Autoregressive reward models: the loss, the pairs, training and resuming, the script as the evaluation uses it."""

import dataclasses
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch

from tests.models_for_tests import causal_lm
from tests.test_ppo import CPU, log_of
from utils import arm
from utils.adapters import lora_config
from utils.cli import run
from utils.config import REPOSITORY
from utils.errors import DataError
from utils.runs import read_arguments, read_samples
from utils.specs import ArmSpec, LoraSpec

sys.path.insert(0, str(REPOSITORY / "Finetuning" / "ARM"))
import train_arm as script


def test_the_loss_is_bradley_terry_on_the_sums_of_log_probabilities():
    model = causal_lm("gpt2")
    pairs = [arm.TokenPair([5, 6, 7], [8, 9], [10, 11, 12, 2], 0), arm.TokenPair([13], [14, 15, 16], [17], 1)]
    with torch.no_grad():
        scores = arm.margins(model, pairs, CPU)
    losses = arm.bradley_terry(scores[:, 0], scores[:, 1], 0.3)
    for row, pair, loss in zip(scores.tolist(), pairs, losses.tolist(), strict=True):
        sums = []
        for response in (pair.chosen, pair.rejected):
            with torch.no_grad():
                logs = model(torch.tensor([pair.prompt + response])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[len(pair.prompt) - 1 + t, token]) for t, token in enumerate(response)))
        assert row == pytest.approx(sums, abs=1e-9)
        assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-0.3 * (sums[0] - sums[1])))), abs=1e-9)


def test_pairs_join_the_best_with_the_worst_and_ties_are_none():
    answers = [[[1], [2], [3], [4], [5]], [[6], [7]]]
    pairs = arm.pairs_by_reward([[9], [8]], answers, [[0.1, 0.9, 0.5, 0.3, 0.2], [1.0, 1.0]])
    assert pairs == [arm.TokenPair([9], [2], [1], 0), arm.TokenPair([9], [3], [5], 0)]


def test_held_out_prompts_are_not_trained_on():
    pairs = [arm.TokenPair([g], [1], [2], g) for g in range(20) for _ in range(3)]
    training, held_out = arm.split_pairs(pairs, seed=0)
    assert len(held_out) == 6 and not {p.group for p in training} & {p.group for p in held_out}
    with pytest.raises(DataError, match="too few"):
        arm.split_pairs(pairs[:3], seed=0)


SPEC = ArmSpec(lora=LoraSpec(4, 8, 0.3), lr=1e-2, batch_size=8, num_epochs=4, reward_beta=1.0)


def lexical_pairs(n=160):
    """Of eight tokens the even ones are preferred: a reward that log-probabilities can express."""
    rng = np.random.default_rng(0)

    def draw(parity):
        return (2 * rng.integers(5, 9, rng.integers(2, 5)) + parity).tolist()

    return [arm.TokenPair(draw(i % 2)[:2], draw(0), draw(1), i) for i in range(n)]


def fresh(dtype=torch.float32):
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(causal_lm("llama_full", dtype=dtype), lora_config(SPEC.lora))


def test_training_learns_a_preference_and_a_killed_one_goes_on_to_the_same_adapter(tmp_path):
    training, held_out = arm.split_pairs(lexical_pairs(), 0)
    before = arm.measure(fresh(), held_out, 1.0, CPU)
    whole, cut = fresh(), fresh()
    figures = arm.train(whole, training, held_out, SPEC, tmp_path / "whole", device=CPU, save_steps=4)
    assert figures["held_out"]["accuracy"] > 0.9 and figures["held_out"]["loss"] < 0.5 * before["loss"]
    calls = []

    def killed(row):
        calls.append(row)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arm.train(cut, training, held_out, SPEC, tmp_path / "cut", device=CPU, save_steps=4, log=killed)
    again = fresh()
    arm.train(again, training, held_out, SPEC, tmp_path / "cut", device=CPU, save_steps=4)
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert [r["loss"] for r in log_of(tmp_path / "cut")] == [r["loss"] for r in log_of(tmp_path / "whole")]


def test_weights_that_the_last_step_broke_are_no_reward_model(tmp_path):
    training, held_out = arm.split_pairs(lexical_pairs(), 0)
    spec = dataclasses.replace(SPEC, lr=1e36, batch_size=len(training), num_epochs=1)
    with pytest.raises(DataError, match="the loss of held-out pairs is nan"):
        arm.train(fresh(), training, held_out, spec, tmp_path, device=CPU)


def test_the_script_leaves_an_adapter_that_the_evaluation_decodes_with(rival_world, capsys, tmp_path):
    argv = [
        "--dataset",
        "anthropic",
        "--objective",
        "help",
        "--output_dir",
        str(tmp_path / "help"),
        *rival_world.common,
    ]
    assert script.main(argv) == 0
    assert {f.name for f in (tmp_path / "help").iterdir()} - {"README.md"} == {
        "adapter_config.json", "adapter_model.safetensors", "args.yaml", "metrics.json", "training_log.csv",
    }  # fmt: skip
    record = json.loads((tmp_path / "help" / "metrics.json").read_text())
    assert record["objective"] == "help" and record["num_pairs"] + record["held_out"]["pairs"] > 12
    capsys.readouterr()
    assert script.main(argv) == 0 and "the adapter is complete" in capsys.readouterr().out
    baseline = importlib.import_module("baseline_eval")
    assert baseline.main([
        "--dataset", "anthropic", "--arm", str(tmp_path), "--arm_beta", "0.5", "--obj_weights", "1",
        "--num_prompts", "2", "--num_trials", "1", "--workspace", str(rival_world.ws), *rival_world.common,
    ]) == 0  # fmt: skip
    [folder] = [f.parent for f in rival_world.ws.glob("baseline_logs/anthropic/help/genarm*/args.yaml")]
    assert read_arguments(folder)["series"] == {"arm_beta": 0.5, "policies": str(tmp_path)}
    assert all(math.isfinite(s["log_ratio"]) for s in read_samples(folder))


def test_human_preferences_are_pairs_too(tiny_world, tmp_path):
    """In the form of HH-RLHF: two dialogues with one prompt; what does not fit the context is left out."""
    import yaml

    from utils.config import load_config
    from utils.models import load_tokenizer

    data = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    data["objectives"]["help"]["training"] = {
        "kind": "preference",
        "source": {"files": ["world/anthropic/train.jsonl.gz"]},
        "holdout": {"files": ["world/anthropic/test.jsonl.gz"]},
        "max_rows": 5,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    config = load_config(tmp_path / "c.yaml", tiny_world)
    tokenizer = load_tokenizer(config.locate("base_model"))
    dataset, objective = config.dataset("anthropic"), config.objective("help")
    pairs = arm.human_pairs(config, dataset, objective, tokenizer, 128)
    assert len(pairs) == 5 and all(len(p.chosen) <= 12 and p.chosen != p.rejected for p in pairs)
    assert all(p.prompt[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in p.chosen for p in pairs)
    assert arm.human_pairs(config, dataset, objective, tokenizer, 3) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--objective", "helpful"], 2, "did you mean 'help'"),
        (["--objective", "all"], 2, "one at a time"),
        (["--objective", "help", "--pairs", "preference"], 2, "names no preference pairs for help"),
        (["--objective", "help", "--reward_beta", "0"], 2, "--reward_beta must be above 0"),
        (["--objective", "help", "--answers_per_prompt", "1"], 2, "--answers_per_prompt must be at least 2"),
        (["--objective", "help", "--save_steps", "0"], 2, "--save_steps must be at least 1"),
        (["--objective", "help", "--num_prompts", "1"], 1, "too few to train on"),
    ],
)
def test_a_mistake_ends_in_one_line_and_makes_no_adapter(rival_world, capsys, tmp_path, arguments, status, message):
    argv = ["--dataset", "anthropic", *arguments, "--output_dir", str(tmp_path / "out"), *rival_world.common]
    assert run(lambda: script.main(argv)) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not any(tmp_path.iterdir())
