"""Supervised fine-tuning on a small base like the paper's: what the loss is on, resuming, merging, refusals."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.paper_base_for_tests import build_base, build_tokenizer, paper_config
from utils import data, models
from utils.cli import pin_gpu, run
from utils.config import REPOSITORY
from utils.errors import DataError
from utils.files import temporary_name
from utils.specs import LoraSpec, SFTSpec
from utils.text_formats import FORMATS

sys.path.insert(0, str(REPOSITORY / "Finetuning" / "SFT"))
import merge_sft_lora
import sft

CPU = torch.device("cpu")
SMALL = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
    "lr": 1e-2,
    "batch_size": 4,
    "max_steps": 3,
    "num_samples": 8,
    "max_length": 128,
    "bf16": False,
}
ANSWERS = ["Mix flour and water.", "Wait, and bake it.", "Ask a neighbour.", "No.", "Salt.", "I would not do that."]


def dialogues(n=6):
    turns = [f"\n\nHuman: question {i}?\n\nAssistant: {ANSWERS[i % len(ANSWERS)]}" for i in range(n)]
    return [{"chosen": t + "\n\nHuman: more\n\nAssistant: never trained on", "rejected": t} for t in turns]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def world(base, tmp_path, monkeypatch):
    """A configuration over the small base, and the scripts' arguments for it."""
    monkeypatch.delenv("DATA_DIR", raising=False)
    config = paper_config(tmp_path, base, tmp_path / "ws", sft=SMALL, min_post_chars=5)
    hh, posts = tmp_path / "hh.jsonl", tmp_path / "posts.csv"
    hh.write_text("".join(json.dumps(row) + "\n" for row in dialogues()))
    posts.write_text("post,summary\n" + "".join(f'my dog number {i} barks,"{a}"\n' for i, a in enumerate(ANSWERS)))
    common = ["--config", str(config.path), "--device", "cpu"]
    return SimpleNamespace(config=config, hh=str(hh), posts=str(posts), common=common, workspace=tmp_path / "ws")


def train(world, *arguments, exp_type="assistant", status=0):
    files = {"assistant": world.hh, "summary": world.posts}[exp_type]
    argv = ["--exp_type", exp_type, "--data_files", files, *world.common, "--logging_steps", "1", *map(str, arguments)]
    assert run(lambda: sft.main(argv)) == status


def merge(world, *arguments, status=0):
    assert run(lambda: merge_sft_lora.main([*map(str, arguments), *world.common])) == status


def log_of(folder):
    with (folder / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------- examples


def examples_of(world, rows, **changes):
    tokenizer = models.load_tokenizer(world.config.base_model.path, world.config.base_model.special_tokens)
    spec = SFTSpec(**{"num_samples": 100, "max_length": 200, **changes})
    return *sft.build_examples(world.config.dataset("anthropic"), rows, tokenizer, spec), tokenizer


def test_an_example_is_the_prompt_as_decoding_reads_it_then_the_first_response_and_eos(world):
    examples, counts, tokenizer = examples_of(world, dialogues(2))
    assert counts == {"rows read": 2, "kept": 2, "trained on": 2}
    dataset = world.config.dataset("anthropic")
    for i, example in enumerate(examples):
        prompt = FORMATS["dialogue"].wrap_user(f"question {i}?")
        [prompt_ids] = data.encode_prompts(dataset, tokenizer, [prompt])
        ids, mask = example["input_ids"], example["completion_mask"]
        assert ids[: len(prompt_ids)] == prompt_ids and ids[0] == tokenizer.bos_token_id
        assert mask == [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))
        assert tokenizer.decode(ids[len(prompt_ids) : -1]) == ANSWERS[i]
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


def test_rows_without_a_response_or_without_room_are_counted(world):
    rows = [
        *dialogues(2),
        {"chosen": "\n\nHuman: anyone?\n\nAssistant: "},
        {"chosen": f"\n\nHuman: {'y' * 60}\n\nAssistant: b"},
    ]
    examples, counts, _ = examples_of(world, rows, max_length=40)
    assert counts == {
        "rows read": 4,
        "empty response": 1,
        "no room for a response in 40 tokens": 1,
        "kept": 2,
        "trained on": 2,
    }
    assert all(len(e["input_ids"]) <= 40 and any(e["completion_mask"]) for e in examples)
    with pytest.raises(DataError, match="no example of anthropic is left to train on"):
        examples_of(world, rows[2:], max_length=40)


def test_samples_are_drawn_from_the_whole_source_by_the_seed(world):
    """A source may be ordered by subset, so its first rows stand for one subset alone."""
    rows = dialogues(60)
    drawn = [[e["input_ids"] for e in examples_of(world, rows, num_samples=20, seed=s)[0]] for s in (1, 1, 2)]
    everything = [e["input_ids"] for e in examples_of(world, rows)[0]]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 20
    assert [ids for ids in everything if ids in drawn[0]] == drawn[0] != everything[:20]


# ---------------------------------------------------------------------------------------------------------- training


def test_the_first_loss_is_the_base_models_on_the_response_tokens_alone(world, base):
    """A fresh LoRA adapter changes nothing and a step takes every example, so the first loss is known exactly."""
    train(world, "--save_directory", world.workspace / "a", "--batch_size", 6, "--max_steps", 1)
    examples, _, tokenizer = examples_of(world, dialogues(), max_length=128)
    model, _ = models.load_base(world.config, CPU)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids, mask = (torch.tensor(example[name]) for name in ("input_ids", "completion_mask"))
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)  # (L - 1, V)
            picked = log_probs.gather(1, ids[1:, None])[:, 0][mask[1:] == 1]
            total, tokens = total - picked.sum().item(), tokens + len(picked)
    # 1e-3: [PAD]'s row of the head is drawn afresh here, with its standard deviation of 0.02
    assert float(log_of(world.workspace / "a")[0]["loss"]) == pytest.approx(total / tokens, abs=1e-3)


@pytest.fixture
def recorded_trainers(monkeypatch):
    kept = []
    original = sft.train

    def train_and_keep(*arguments):
        kept.append(original(*arguments))
        return kept[-1]

    monkeypatch.setattr(sft, "train", train_and_keep)
    return kept


def test_training_and_merging_make_the_reference(world, base, recorded_trainers, capsys):
    train(world, exp_type="summary")
    adapter = world.workspace / "sft_lora" / "summary"
    assert {f.name for f in adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "args.yaml",
        "settings.json",
        "training_log.csv",
        "tokenizer.json",
    }
    assert sorted(f.name for f in (world.workspace / "sft_lora").iterdir()) == ["summary"]  # no checkpoints, no rest
    assert [int(row["step"]) for row in log_of(adapter)] == [1, 2, 3]
    assert float(log_of(adapter)[-1]["loss"]) < float(log_of(adapter)[0]["loss"])
    record = yaml.safe_load((adapter / "args.yaml").read_text())
    assert record["settings"]["lora_r"] == 4 and record["rows"]["trained on"] == 6

    [trainer] = recorded_trainers
    tokenizer = build_tokenizer()
    for row in trainer.train_dataset:
        ids = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        assert tokenizer.decode(ids).endswith(" ### Response: ") and tokenizer.decode(ids).count("### Input:") == 1
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    merge(world, "--exp_type", "summary")
    dataset = world.config.dataset("summary")
    model, merged_tokenizer = models.load_reference(world.config, dataset, CPU)
    assert len(merged_tokenizer) == len(tokenizer) + 1 == models.vocabulary_size(model) == model.config.vocab_size
    assert merged_tokenizer.pad_token == "[PAD]" and model.config.pad_token_id == len(tokenizer)
    ids = torch.tensor([tokenizer(FORMATS["instruction"].wrap_user("a dog"))["input_ids"]])
    trained_model = trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, trained_model(ids).logits, atol=1e-5)
        assert not torch.allclose(model(ids).logits[..., :-1], models.load_causal_lm(base, CPU)(ids).logits, atol=1e-2)
    capsys.readouterr()


def test_a_killed_run_goes_on_to_the_same_adapter(world, monkeypatch, capsys):
    """Dropout is on, so that the state of the random numbers counts too."""
    options = ("--max_steps", 6, "--save_steps", 2, "--lora_dropout", 0.3)
    train(world, "--save_directory", world.workspace, "--wandb_name", "whole", *options)

    import trl

    original, calls = trl.SFTTrainer.training_step, []

    def killed(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    named = ("--save_directory", world.workspace, "--wandb_name", "cut")
    with monkeypatch.context() as patch:
        patch.setattr(trl.SFTTrainer, "training_step", killed)
        train(world, *named, *options, status=130)
    checkpoints = world.workspace / "cut.checkpoints"
    assert not (world.workspace / "cut").exists() and (checkpoints / "checkpoint-4").is_dir()
    (checkpoints / "checkpoint-5").mkdir()  # one that was being written
    (checkpoints / "checkpoint-5" / "trainer_state.json").write_text('{"global_')
    train(world, *named, *options, "--lr", 0.5, status=1)
    assert "is of other settings (lr: 0.01, now 0.5)" in capsys.readouterr().err
    train(world, *named, *options)
    assert "resuming from" in capsys.readouterr().out
    weights = [(world.workspace / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert [r["step"] for r in log_of(world.workspace / "cut")] == list("123456")
    assert not checkpoints.exists()


def test_what_a_kill_leaves_of_a_folder_without_checkpoints_is_no_obstacle(world):
    """The name is that of the process which wrote; nothing but it may be there."""
    checkpoints = world.workspace / "sft_lora" / "anthropic.checkpoints"
    checkpoints.mkdir(parents=True)
    temporary_name(checkpoints / "settings.json").write_text('{"dataset": "anth')
    train(world, "--max_steps", 1)
    assert (world.workspace / "sft_lora" / "anthropic" / "adapter_model.safetensors").is_file()


def test_two_launched_processes_learn_what_one_learns(world, tmp_path):
    """Half of each batch is each one's. Float32 sums in another order change 1e-6, the training 1e-2."""
    one, two = tmp_path / "one", tmp_path / "two"
    Path(world.hh).write_text("".join(json.dumps(row) + "\n" for row in dialogues(8)))  # two whole batches
    train(world, "--save_directory", one, "--batch_size", 4, "--max_steps", 2)
    command = ["--exp_type", "assistant", "--data_files", world.hh, *world.common, "--save_directory", str(two)]
    command += ["--batch_size", "2", "--max_steps", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for said in ("adapter: ", "the adapter is complete"):  # the same command again does nothing
        done = subprocess.run(
            [*launch, str(REPOSITORY / "Finetuning" / "SFT" / "sft.py"), *command],
            capture_output=True, text=True, timeout=600,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(said) == 1
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def test_a_finished_adapter_is_kept_and_only_an_adapter_is_ever_replaced(world, tmp_path, capsys, monkeypatch):
    train(world, "--max_steps", 1)
    file = world.workspace / "sft_lora" / "anthropic" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    train(world, "--max_steps", 1)
    assert "the adapter is complete" in capsys.readouterr().out
    train(world, "--max_steps", 2, status=1)
    assert "holds the adapter of other settings (max_steps: 1, now 2)" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    train(world, "--max_steps", 2, "--rerun")
    assert file.stat().st_mtime_ns != before
    with open(world.hh, "a") as rows:  # other data under the same name is another run
        rows.write(json.dumps(dialogues(7)[-1]) + "\n")
    train(world, "--max_steps", 2, status=1)
    assert "data_content" in capsys.readouterr().err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    for extra in ((), ("--rerun",)):
        train(world, "--save_directory", mine, *extra, status=1)
        merge(world, "--lora_name", "anthropic", "--output_dir", mine, *extra, status=1)
    assert [f.name for f in mine.iterdir()] == ["thesis.txt"]


def test_a_diverged_run_leaves_no_adapter(world, capsys):
    train(world, "--learning_rate", 1e30, status=1)
    assert "training diverged" in capsys.readouterr().err
    assert not (world.workspace / "sft_lora" / "anthropic").exists()


def test_the_defaults_are_the_published_ones():
    args = sft.build_parser().parse_args(["--exp_type", "assistant"])
    spec = sft.training_spec(args, SimpleNamespace(sft=SFTSpec()))
    assert spec == SFTSpec() and spec.lora == LoraSpec(64, 128, 0.05)
    assert (spec.lr, spec.batch_size, spec.max_steps, spec.num_samples) == (1.4e-4, 1, 20_000, 5_000)
    assert (spec.weight_decay, spec.warmup_steps, spec.bf16, spec.seed) == (0.01, 0, True, 8888)
    args = sft.build_parser().parse_args(
        ["--learning_rate", "1e-3", "--lora_r", "2", "--no-bf16", "--warmup_steps", "0"]
    )
    spec = sft.training_spec(args, SimpleNamespace(sft=SFTSpec(warmup_steps=9)))
    assert (spec.lr, spec.lora.r, spec.bf16, spec.warmup_steps) == (1e-3, 2, False, 0)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--max_steps", "0"], 2, "--max_steps must be at least 1, got 0"),
        (["--learning_rate", "nan"], 2, "--learning_rate must be a positive number, got nan"),
        (["--lora_dropout", "1"], 2, "--lora_dropout must be at least 0 and below 1"),
        (["--save_steps", "0"], 2, "--save_steps must be at least 1"),
        (["--exp_type", "sumary"], 2, "did you mean 'summary'"),
        (["--device", "cuda:9"], 2, "--device cuda:9"),
        (["--base_model_name", "/no/such/model"], 1, "no usable checkpoint at '/no/such/model'"),
        (["--data_files", "gone.csv"], 1, "no data file 'gone.csv'"),
    ],
)
def test_a_mistake_ends_in_one_line_and_makes_no_adapter(world, capsys, monkeypatch, arguments, status, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # is restored after the test; sft.py narrows it
    argv = ["--exp_type", "assistant", "--data_files", world.hh, *world.common, *arguments]
    assert run(lambda: sft.main(argv)) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (world.workspace / "sft_lora" / "anthropic").exists()


def test_a_command_that_failed_before_its_first_checkpoint_can_be_corrected(world):
    train(world, "--max_steps", 1, "--base_model_name", "/no/such/model", status=1)
    train(world, "--max_steps", 1)


def test_one_gpu_is_left_in_sight_unless_a_launcher_shares_them(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for before, device, after in (
        ("4,6", "cuda:1", "6"),
        ("4,6", None, "4"),
        ("", "cuda:2", "2"),
        ("4,6", "cpu", "4,6"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        pin_gpu(device)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    pin_gpu(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


# ----------------------------------------------------------------------------------------------------------- merging


def test_merging_refuses_what_does_not_belong_together(world, tmp_path, capsys):
    merge(world, status=2)
    assert "give --lora_name" in capsys.readouterr().err
    merge(world, "--exp_type", "assistant", status=1)
    assert "python Finetuning/SFT/sft.py --exp_type assistant" in capsys.readouterr().err
    train(world, "--max_steps", 1)
    merge(world, "--exp_type", "summary", "--lora_name", "anthropic", status=2)
    assert "was trained for anthropic" in capsys.readouterr().err
    other = build_base(tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    merge(world, "--lora_name", "anthropic", "--base_model_name", other, status=1)
    assert "was trained on another base" in capsys.readouterr().err
    assert not (world.workspace / "sft_model").exists()


def test_merging_again_does_nothing_and_a_new_adapter_needs_rerun(world, capsys):
    train(world, "--max_steps", 1)
    merge(world, "--lora_name", world.workspace / "sft_lora" / "anthropic", "--dtype", "bfloat16")
    file = world.workspace / "sft_model" / "anthropic" / "model.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    before = file.stat().st_mtime_ns
    merge(world, "--lora_name", "anthropic", "--dtype", "bfloat16")
    assert "the merged model is complete" in capsys.readouterr().out and file.stat().st_mtime_ns == before
    train(world, "--max_steps", 2, "--rerun")
    merge(world, "--lora_name", "anthropic", "--dtype", "bfloat16", status=1)
    assert "holds the merged model of other settings (adapter: " in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    merge(world, "--lora_name", "anthropic", "--rerun")
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}
    assert math.isfinite(sum(t.sum().item() for t in load_file(file).values()))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="no wandb installed")
def test_the_trainers_curve_goes_into_the_stages_own_run(world, monkeypatch, tmp_path):
    import wandb

    opened, open_run = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(options) or open_run(**options))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(world, "--wandb")
    (options,) = opened  # the trainer's callback found it and opened none
    assert options["project"] == "mavis" and options["job_type"] == "sft" and options["config"]["lr"] == SMALL["lr"]
    assert wandb.run is None


def test_a_training_that_was_killed_behind_its_last_step_takes_no_step_more(world, tmp_path, monkeypatch):
    """A trainer that is given the checkpoint of its last step would train one step beyond it."""
    arguments = ("--save_steps", 1)
    train(world, "--save_directory", tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(sft, "write_adapter", full)
        train(world, "--save_directory", tmp_path / "killed", *arguments, status=1)
    assert (tmp_path / "killed.checkpoints" / "checkpoint-3").is_dir()
    train(world, "--save_directory", tmp_path / "killed", *arguments)
    for name in ("training_log.csv", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "killed.checkpoints").exists()
