"""Bad input ends in one clear line and a failing status; nothing is half-written, and Ctrl-C loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import yaml

import baseline_eval
import dataset_preprocess
import fit_token_table
import get_data_base
import get_data_iter
import label_tree
import mavis
import mavis_bs
import pareto_report
import split_data
import train_value_model
from utils import hdf5_utils
from utils.cli import run
from utils.config import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "Finetuning" / "RM"))
import train_reward_model

SUBJECT = "tell me about marane"
STEER = ("--dataset", "anthropic", "--num_prompts", "2", "--num_trials", "1")
MAVIS = (*STEER, "--obj_weights", "1", "--beta", "2")


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """The tiny world as far as one value model, its configuration, and `edit` for variants of the configuration."""
    folder = tmp_path_factory.mktemp("bad_input")
    shutil.copytree(tiny_world, folder / "ws")
    data = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    data["workspace"] = str(folder / "ws")
    del data["objectives"]["humor"]  # its reward model takes a minute to train
    for spec in data["datasets"].values():
        spec["sft_model"] = "base_model"
        spec["objectives"] = [o for o in spec["objectives"] if o != "humor"]
        spec["num_val_prompts"] = 2
        spec["training"]["num_epochs"] = 1

    def edit(change=None, name="changed"):
        changed = json.loads(json.dumps(data))
        if change is not None:
            change(changed)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(changed))
        return str(file)

    world = SimpleNamespace(ws=folder / "ws", edit=edit, config=edit(name="world"))
    world.trees = world.ws / "tree_data" / "anthropic" / "iter_0"
    world.training = world.ws / "data_for_training" / "anthropic" / "iter_0"
    for script, *arguments in (
        (dataset_preprocess, "anthropic", "--split", "train"),
        (dataset_preprocess, "anthropic", "--split", "test"),
        (get_data_base, "0", "6"),
        (label_tree, str(world.trees), "help"),
        (split_data, str(world.trees)),
        (train_value_model, "--objective", "help"),
        (mavis, *MAVIS),
    ):
        assert run(lambda s=script, a=arguments: s.main([*a, "--device", "cpu", "--config", world.config])) == 0
    return world


def files(folder: Path) -> dict:
    """Every file below a folder with its size and time, but for locks."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in Path(folder).rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture
def fails(world, capsys, monkeypatch):
    """Run a script that must fail: the status, one line of stderr that says all of `said`, and not a file changed."""
    monkeypatch.delenv("MAVIS_DEBUG", raising=False)
    monkeypatch.delenv("DATA_DIR", raising=False)

    def check(script, *arguments, status, said, config=None, unchanged=(), common=True):
        watched = [world.ws, *unchanged]
        before = [files(folder) for folder in watched]
        argv = [str(a) for a in arguments]
        if common:
            argv += ["--config", config or world.config, *(() if "--device" in argv else ("--device", "cpu"))]
        capsys.readouterr()
        assert run(lambda: script.main(argv)) == status
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        for part in [said] if isinstance(said, str) else said:
            assert part in err, f"{part!r} is not in {err!r}"
        assert "Traceback" not in out + err
        assert [files(folder) for folder in watched] == before, "something was left behind"
        return err

    return check


# ------------------------------------------------------------------------------------------------- usage: status 2


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("0.5,0.4", "sum to 0.9; they must sum to 1 (order: help,harm)"),
        ("-1,2", "not negative"),
        ("nan,1", "must be finite"),
        ("inf", "must be finite"),
        ("0.2,0.3,0.5", "has 3 weights for the 2 objectives help,harm"),
        ("", "has no weight"),
        (",", "has no weight"),
        ("much,more", "each weight must be a number or empty"),
    ],
)
@pytest.mark.parametrize("script", [mavis, mavis_bs, baseline_eval])
def test_weights_that_cannot_be_meant(fails, script, weights, said):
    more = {mavis: ("--beta", "1"), mavis_bs: ("--beta", "1", "--Q", "2"), baseline_eval: ("--num_samples", "2")}[
        script
    ]
    fails(script, *STEER, f"--obj_weights={weights}", *more, status=2, said=["--obj_weights", said])


@pytest.mark.parametrize("beta", ["nan", "inf", "-inf", "-0.5"])
def test_beta_that_cannot_tilt(fails, beta):
    said = "--beta must be a finite number of at least 0"
    fails(mavis, *STEER, "--obj_weights", 1, f"--beta={beta}", status=2, said=said)
    fails(mavis_bs, *STEER, "--obj_weights", 1, f"--beta={beta}", "--Q", 2, status=2, said=said)
    fails(baseline_eval, *STEER, "--token_table", "--obj_weights", 1, f"--beta={beta}", status=2, said=said)
    fails(get_data_iter, 0, 2, "help", f"--beta={beta}", status=2, said=said)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (mavis, ("--dataset", "antropic", "--obj_weights", 1, "--beta", 1), "did you mean 'anthropic'?"),
        (get_data_base, (0, 1, "--dataset", "sumary"), ["unknown data set 'sumary'", "did you mean 'summary'?"]),
        (dataset_preprocess, ("antropic",), "did you mean 'anthropic'?"),
        (dataset_preprocess, ("anthropic", "--split", "tets"), ["no split 'tets'", "did you mean 'test'?"]),
        (mavis, (*MAVIS, "--data_split", "tets"), ["--data_split 'tets'", "did you mean 'test'?"]),
        (get_data_base, (0, 1, "--data_split", "trian"), ["no split 'trian'", "did you mean 'train'?"]),
        (label_tree, ("trees", "hlep"), ["unknown objective 'hlep'", "did you mean 'help'?", "valid: all, harm, help"]),
        (label_tree, ("trees", ""), "no objective was named"),
        (train_value_model, ("--objective", "hepl"), ["unknown objective 'hepl'", "did you mean 'help'?"]),
        (train_value_model, ("--objective", "help,harm", "--output_dir", "v"), "--output_dir is one objective's"),
        (train_value_model, ("--objective", "all", "--init_checkpoint", "v"), "--init_checkpoint is one objective's"),
        (get_data_iter, (0, 1, "help,harm", "--beta", 1), "one value model steers"),
        (fit_token_table, ("trees", "humor"), ["unknown objective 'humor'", "valid: all, harm, help"]),
        (mavis, (*MAVIS, "--config", "tinny"), ["no configuration file 'tinny'", "did you mean 'tiny'?"]),
        (mavis, (*MAVIS, "--value_model_iter=,1"), "help has a weight and needs an iteration"),
        (mavis, (*MAVIS, "--value_model_iter", "last"), "got 'last'"),
        (mavis, STEER + ("--beta", 1), "--obj_weights is needed: weights of help,harm"),
        (baseline_eval, (*STEER, "--num_samples", 2), "--num_samples needs --obj_weights"),
        (baseline_eval, (*STEER, "--obj_weights", 1), "the reference takes no --obj_weights"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there_is_answered_with_the_nearest(fails, script, arguments, said):
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    fails(script, *(a for a in arguments if a not in ("--config", config)), status=2, said=said, config=config)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        *((mavis, (*MAVIS, f"--{flag}", value), f"--{flag} must be at least {least}")
          for flag, value, least in (("num_prompts", 0, 1), ("num_trials", 0, 1), ("topk", 0, 1), ("batch_size", 0, 1),
                                     ("max_new_tokens", 0, 1), ("start_index", -1, 0))),
        (mavis, (*MAVIS, "--temperature", 0), "--temperature must be a finite number above 0"),
        (mavis, (*MAVIS, "--temperature", "nan"), "--temperature must be a finite number above 0"),
        (mavis_bs, (*MAVIS, "--Q", 0), "--Q must be at least 1"),
        (mavis_bs, (*MAVIS, "--Q", 2, "--cuda_graphs"), "--cuda_graphs needs an NVIDIA GPU"),
        (mavis_bs, (*MAVIS, "--Q", 2, "--num_samples", 0), "--num_samples must be at least 1"),
        (baseline_eval, (*STEER, "--num_samples", 0), "--num_samples must be at least 1"),
        (get_data_base, (-1, 2), "START must be at least 0 and NUM at least 1, got -1 2"),
        (get_data_base, (9999,), "START 9999 leaves none of trees.num_prompts"),
        (get_data_base, (0, 0), "NUM at least 1"),
        *((get_data_base, (0, 9, f"--{flag}", 0), f"--{flag} must be at least 1, got 0")
          for flag in ("root_children", "non_root_children", "num_layers", "max_new_tokens", "topk", "batch_size")),
        (get_data_base, (0, 9, "--temperature", "inf"), "--temperature must be a finite number above 0"),
        (get_data_iter, (0, 1, "help", "--beta", 1, "--value_model_iter", -1), "--value_model_iter must be at least 0"),
        (mavis, (*MAVIS, "--cuda_graphs"), "--cuda_graphs needs an NVIDIA GPU, and the device is cpu"),
        (baseline_eval, (*STEER, "--cuda_graphs"), "--cuda_graphs needs an NVIDIA GPU"),
        (get_data_base, (0, 2, "--cuda_graphs"), "--cuda_graphs needs an NVIDIA GPU"),
        (label_tree, ("trees", "all", "--batch_size", 0), "--batch_size must be at least 1"),
        (split_data, ("trees", "--num_val", -1), "--num_val must be at least 1"),
        (train_value_model, ("--objective", "help", "--lr", "nan"), "--lr must be a positive number"),
        (train_value_model, ("--objective", "help", "--KL_penalty", "nan"), "--KL_penalty must be a finite number"),
        (fit_token_table, ("trees", "all", "--l2", 0), "--l2 must be above 0"),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_meant(fails, script, arguments, said):
    fails(script, *arguments, status=2, said=said)


def test_what_argparse_refuses_has_status_2(world, capsys):
    for arguments in ((*STEER, "--beta", "high"), (*MAVIS, "--betta", "1"), ("--obj_weights", "1")):
        with pytest.raises(SystemExit) as stop:
            run(lambda a=arguments: mavis.main([*a, "--config", world.config]))
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------ configurations


def at(*keys):
    """A change of one value: at("decoding", "top_k", 0) sets it, at(..., None) takes the key out."""

    def change(data):
        for key in keys[:-2]:
            data = data[key]
        if keys[-1] is None:
            del data[keys[-2]]
        else:
            data[keys[-2]] = keys[-1]

    return change


ANTHROPIC = ("datasets", "anthropic")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at("worksapce", "x"), ["unknown key 'worksapce'", "did you mean 'workspace'?"]),
        (at(*ANTHROPIC, "max_new_token", 3), ["'datasets.anthropic.max_new_token'", "did you mean 'max_new_tokens'?"]),
        (at("objectives", "help", "lable", 1), ["'objectives.help.lable'", "did you mean 'label'?"]),
        (at("value_model", None), "key 'value_model' is missing"),
        (at(*ANTHROPIC, "splits", None), "key 'datasets.anthropic.splits' is missing"),
        (at(*ANTHROPIC, "objectives", ["hlep"]), ["datasets.anthropic.objectives is 'hlep'", "did you mean 'help'?"]),
        (at(*ANTHROPIC, "objectives", []), "must name at least one, each once"),
        (at(*ANTHROPIC, "objectives", ["help", "help"]), "must name at least one, each once"),
        (
            at(*ANTHROPIC, "max_new_tokens", "many"),
            "anthropic.max_new_tokens must be a whole number, got 'many'",
        ),
        (at("decoding", "cuda_graphs", "yes"), "decoding.cuda_graphs must be true or false, got 'yes'"),
        (
            at(*ANTHROPIC, "training", "lr", float("nan")),
            "anthropic.training.lr must be a finite number, got nan",
        ),
        (at(*ANTHROPIC, "training", "lr", 0), "datasets.anthropic.training.lr must be above 0"),
        (at(*ANTHROPIC, "training", "packing", "trees"), "did you mean 'tree'?"),
        (at(*ANTHROPIC, "trees", "num_layers", 0), "datasets.anthropic.trees.num_layers must be at least 1"),
        (at(*ANTHROPIC, "reference_template", "{promt}"), ["reference_template is 'promt'", "did you mean 'prompt'?"]),
        (at(*ANTHROPIC, "reference_template", "hello"), "must contain {prompt} or {user}"),
        (at(*ANTHROPIC, "splits", "train", "hash_range", [0.9, 0.1]), "splits.train.hash_range must be two numbers"),
        (at(*ANTHROPIC, "splits", "train", "hash_range", [0.9]), "hash_range must have 2 entries, got 1"),
        (at(*ANTHROPIC, "prompt_format", "dialog"), "did you mean 'dialogue'?"),
        (at("objectives", "help", "text", "{prompt}"), "objectives.help.text must contain {response}"),
        (at("objectives", "help", "kind", "calable"), "did you mean 'callable'?"),
        (at("objectives", "help", "function", ""), "objectives.help.function is missing"),
        (at("decoding", "top_k", 0), "decoding.top_k must be at least 1"),
        (at("decoding", "temperature", 0), "decoding.temperature must be above 0"),
        (at("decoding", "normalization", "min-max"), "did you mean 'minmax'?"),
        (at("evaluation", "num_prompts", 0), "evaluation.num_prompts must be at least 1"),
        (at("cpu_dtype", "float"), "cpu_dtype is 'float'"),
        (at("value_model", "lora", "r", 0), "value_model.lora.r must be at least 1"),
        (at("value_model", "lora", "dropout", 1.0), "value_model.lora.dropout must be below 1"),
        (at(*ANTHROPIC, "training", "deepest_fraction", 1.5), "training.deepest_fraction must be at most 1, got 1.5"),
        (at("datasets", "hh.v2", {}), "datasets.hh.v2"),
        (at("objectives", "all", {"kind": "callable", "function": "a:b"}), "objectives.all: letters, digits"),
        (at("objectives", "tokens", {"kind": "callable", "function": "a:b"}), "taken are all, index, log_ratio"),
        (at("objectives", "judge_x", {"kind": "callable", "function": "a:b"}), "what begins with judge_"),
        (at("objectives", "../x", {"kind": "callable", "function": "a:b"}), "objectives.../x: letters, digits"),
        (
            at(
                "objectives",
                "x",
                {
                    "kind": "callable",
                    "function": "a:b",
                    "training": {"kind": "labels", "source": {"hash_range": [0.9, 0.1]}, "holdout": {}},
                },
            ),
            "objectives.x.training.source.hash_range must be two numbers",
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_exits_2(world, fails, change, said):
    fails(mavis, *MAVIS, "--prompt", SUBJECT, config=world.edit(change), status=2, said=said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exp_type": "assistant"}, "have the same name or exp_type, 'assistant'"),
        ({"exp_type": "other"}, "have the same objective, 'help'"),
    ],
)
def test_what_two_data_sets_would_write_over_each_other_exits_2(world, fails, changes, said):
    def change(data):
        data["datasets"]["again"] = data["datasets"]["anthropic"] | changes

    fails(mavis, *MAVIS, "--prompt", SUBJECT, config=world.edit(change), status=2, said=["datasets.again", said])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "must be a mapping, got list"),
        ("", "must be a mapping, got NoneType"),
        ("a: [1,\n b: {", "not a readable YAML file"),
        ("workspace: !!python/object/apply:os.system ['true']\n", "not a readable YAML file"),
        ("\x00\x01", "not a readable YAML file"),
    ],
)
def test_a_file_that_is_no_configuration_exits_2(fails, tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    fails(mavis, *MAVIS, config=str(tmp_path / "mine.yaml"), status=2, said=["mine.yaml", said])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at("objectives", "help", "function", "utils.nowhere:f"), "cannot be imported"),
        (at("objectives", "help", "function", "utils.tiny_world:nothing"), "cannot be imported"),
        (at("objectives", "help", "function", "utils.tiny_world"), "must read package.module:function"),
        (at("objectives", "help", "function", "utils.tiny_world:STEMS"), "is not callable, it is a tuple"),
        (at("objectives", "help", "function", "utils.tiny_world:sample_answers"), "failed: AttributeError"),
        (at("objectives", "help", "function", "utils.tiny_world:words_of"), "failed: TypeError"),
        (at("value_model", "num_layers", 99), "has 3 layers, so num_layers must be 1 to 3, got 99"),
        (at("value_model", "num_layers", 1), "its base: 0 of 15 tensors are missing and 28 have no place"),
        (at("value_model", "path", "gone"), "no folder 'gone'; make it with: python scripts/tiny/make_world.py"),
        (at(*ANTHROPIC, "max_new_tokens", 500), "leaves no room for a prompt: the models attend to 128 tokens"),
        (
            at("objectives", "help", {"kind": "classifier", "path": "base_model"}),
            "lacks 1 weights of a Llama",
        ),
        (at("objectives", "help", {"kind": "classifier", "path": "gone"}), "reward model of help"),
    ],
)
def test_what_a_configuration_names_and_is_not_there_exits_1(world, fails, change, said):
    """Also through the run folder, which is made before models are loaded: an empty one does not stay."""
    config = world.edit(change)
    fails(mavis, *MAVIS, "--prompt", SUBJECT, config=config, status=1, said=said)
    fails(mavis, *MAVIS, "--seed", 77, config=config, status=1, said=said)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("utils.tiny_world:help_reward", "here"),
        ("utils.tiny_world:hlep_reward", "has no 'hlep_reward'; did you mean 'help_reward'?"),
        ("utils.nowhere:f", "missing"),
        ("nowhere:f", "missing: no such module"),
        ("utils.tiny_world", "missing: it must read package.module:function"),
        ("json:dumps", "Python"),
    ],
)
def test_a_dry_run_looks_for_rewards_that_are_functions(world, capsys, function, said):
    config = world.edit(at("objectives", "help", "function", function))
    assert run(lambda: mavis.main([*MAVIS, "--config", config, "--dry_run"])) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "reward of help" in line]
    assert said in line and "torch" not in line


def test_a_label_that_a_reward_model_lacks_exits_1(world, fails, tmp_path):
    import torch

    from utils.models import new_sequence_classifier

    for made in new_sequence_classifier(str(world.ws / "base_model"), torch.device("cpu")):
        made.save_pretrained(tmp_path / "reward")
    entry = {"kind": "classifier", "path": str(tmp_path / "reward"), "label": 7}
    fails(mavis, *MAVIS, config=world.edit(at("objectives", "help", entry)), status=1, said="label is 7")


# ------------------------------------------------------------------------------------------------ what is missing


def test_a_missing_value_model_says_where_it_was_looked_for_and_what_makes_it(world, fails):
    place = str(world.ws / "value_models/iter_0/harm")
    makes = f"python train_value_model.py --config {world.config} --dataset anthropic --objective harm"
    steer = (*STEER, "--obj_weights", "0.5,0.5", "--beta", 1)
    fails(mavis, *steer, status=1, said=["value model of harm", place, makes])
    fails(mavis_bs, *steer, "--Q", 2, status=1, said=["value model of harm", place, makes])
    fails(mavis, *MAVIS, "--value_model_iter", 3, status=1, said=["iter_3/help", "--init_checkpoint", "iter_2/help"])
    fails(get_data_iter, 0, 2, "harm", "--beta", 1, status=1, said=[place, makes])
    fails(mavis, *MAVIS, "--value_model_dir", "/nowhere", status=1, said="/nowhere/iter_0/help")


def test_missing_data_names_the_command_that_makes_it(world, fails, tmp_path):
    fails(dataset_preprocess, "anthropic", "--data_files", "gone.csv", status=1, said=["'gone.csv'", "--data_files"])
    fails(mavis, "--dataset", "summary", "--obj_weights", 1, "--beta", 1, status=1, said="value model of summarization")
    fails(baseline_eval, "--dataset", "summary", status=1, said="python dataset_preprocess.py summary --split test")
    fails(
        get_data_base, 0, 1, "--dataset", "summary", status=1, said="python dataset_preprocess.py summary --split train"
    )
    fails(get_data_base, 10**6, 1, status=1, said="is behind the last of the 600 prompts")
    fails(mavis, *MAVIS, "--start_index", 500, status=1, said="has 120 prompts (index 0 to 119)")
    for folder in (tmp_path / "gone", tmp_path):
        fails(label_tree, folder, "all", status=1, said=["no trees", "get_data_base.py"])
        fails(split_data, folder, status=1, said=["no trees", "get_data_base.py"])
        fails(fit_token_table, folder, "all", status=1, said=str(folder))
        fails(pareto_report, folder, "--output_dir", tmp_path / "report", status=1, said=str(folder), common=False)
    fails(train_value_model, "--objective", "help", "--data_dir", tmp_path / "gone", status=1, said="split_data.py")
    fails(train_value_model, "--objective", "harm", status=1, said=["no values of 'harm'", "label_tree.py"])
    fails(label_tree, world.trees, "harm", "--check_trees", status=1, said=["no values of harm", "label_tree.py"])
    fails(baseline_eval, *STEER, "--token_table", "--beta", 1, "--obj_weights", 1, status=1, said="fit_token_table.py")
    assert not (tmp_path / "report").exists()


def test_a_world_whose_first_step_was_not_taken_says_which(world, fails, tmp_path):
    config = world.edit(at("workspace", str(tmp_path / "empty")))
    fails(dataset_preprocess, "anthropic", config=config, status=1, said="python scripts/tiny/make_world.py")
    fails(baseline_eval, *STEER, config=config, status=1, said="python scripts/tiny/make_world.py")
    fails(train_value_model, "--objective", "help", config=config, status=1, said="split_data.py")
    assert not list(tmp_path.rglob("*.*"))


def test_a_device_that_is_not_here(fails):
    fails(mavis, *MAVIS, "--seed", 5, "--device", "gpu", status=1, said="--device 'gpu' is no torch device")
    fails(mavis, *MAVIS, "--seed", 5, "--device", "cuda:99", status=1, said="--device cuda:99: this machine has")
    fails(mavis, *MAVIS, "--seed", 5, "--device", "meta", status=1, said="PyTorch cannot use it here")


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("text", ["", "   ", "\n", "\n\nHuman: \n\nAssistant: "])
def test_an_empty_prompt_exits_2(fails, text):
    fails(mavis, *MAVIS, "--prompt", text, status=2, said="--prompt: the prompt is empty")


def test_standard_input_may_be_empty_too(fails, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    fails(mavis, *MAVIS, "--prompt", "-", status=2, said="--prompt: the prompt is empty")


def test_a_prompt_longer_than_the_context_exits_1(fails):
    long = SUBJECT + " marane" * 200
    said = ["prompt 1 has 207 tokens and at most 116 fit", "shorten it"]
    fails(mavis, *MAVIS, "--prompt", SUBJECT, "--prompt", long, status=1, said=said)
    fails(mavis, *MAVIS, "--max_new_tokens", 5000, status=1, said="leaves no room for a prompt")
    fails(get_data_base, 6, 2, "--max_new_tokens", 5000, "--output_dir", "/tmp/never_made", status=1, said="no room")
    assert not Path("/tmp/never_made").exists()


def test_a_prompt_that_is_no_text_exits_1(fails):
    """A byte that is not UTF-8 on the command line, as Python hands it on."""
    fails(mavis, *MAVIS, "--prompt", SUBJECT + " \udcff", status=1, said="prompt 0 is not valid Unicode")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty file"),
        ("prompt\n", "no prompt in this file"),
        ("text\nhello\n", "no column 'prompt'; the columns are 'text'"),
        ('prompt\n"\n\nHuman: a\n\nAssistant: "\n"  "\n', "prompt 1 is empty"),
        ('prompt\n"never closed', "not CSV"),
        (b"prompt\n\xff\xfe\n", "not UTF-8 text"),
    ],
)
def test_a_damaged_prompts_file_is_named(world, fails, tmp_path, text, said):
    config = world.edit(at("workspace", str(tmp_path / "ws")))
    file = tmp_path / "ws/datasets/anthropic/anthropic_test_deduped.csv"
    file.parent.mkdir(parents=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copytree(world.ws / "base_model", tmp_path / "ws" / "base_model")
    fails(baseline_eval, *STEER, config=config, status=1, said=[str(file), said], unchanged=[tmp_path])


# -------------------------------------------------------------------------------------------------------- reward models


def test_reward_models_are_not_trained_on_bad_input_and_replace_nothing(world, fails, tmp_path):
    labels = {"kind": "labels", "head": "full", "label_column": "humor", "max_length": 32, "max_rows": 64}
    for split in ("source", "holdout"):
        labels[split] = {"files": [f"world/humor/{'train' if split == 'source' else 'test'}.csv.gz"]}

    def add(data):
        data["objectives"]["mine"] = {"kind": "classifier", "path": "reward_models/mine", "training": labels}
        data["datasets"]["anthropic"]["objectives"].append("mine")

    config = world.edit(add)
    for flag, value, said in (
        ("lr", "nan", "--lr must be a finite number"),
        ("lr", 0, "--lr must be above 0"),
        ("batch_size", 0, "--batch_size must be at least 1"),
        ("num_epochs", 0, "--num_epochs must be at least 1"),
        ("seed", -1, "--seed must be at least 0"),
    ):
        fails(train_reward_model, "--objective", "mine", f"--{flag}", value, config=config, status=2, said=said)
    fails(train_reward_model, "--objective", "mien", config=config, status=2, said="did you mean 'mine'?")
    fails(train_reward_model, "--objective", "help", config=config, status=2, said="has no `training` entry")
    train = (train_reward_model, "--objective", "mine", "--output_dir", tmp_path / "model")
    fails(*train, "--data_files", "gone.csv", config=config, status=1, said="'gone.csv'")
    fails(*train, "--num_layers", 9, config=config, status=1, said="has 3 layers")
    fails(*train, "--lr", 1e30, config=config, status=1, said="rewards must be finite numbers")
    assert not any(tmp_path.iterdir())

    arguments = [*map(str, train[1:]), "--config", config, "--device", "cpu"]
    assert run(lambda: train_reward_model.main(arguments)) == 0
    kept = {"unchanged": [tmp_path], "config": config}
    said = ["holds the reward model of other settings (lr: 0.0001, now 0.5)", "--rerun"]
    fails(*train, "--lr", 0.5, **kept, status=1, said=said)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("x")
    mine = (*train[:-1], tmp_path / "thesis")
    fails(*mine, "--rerun", **kept, status=1, said="holds no complete reward model")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def damaged(folder: Path, kind: str) -> None:
    if kind == "truncated weights":
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "no weights":
        next(folder.glob("*.safetensors")).unlink()
    elif kind == "text for weights":
        next(folder.glob("*.safetensors")).write_text("hello")
    elif kind == "text for a configuration":
        for file in folder.glob("*config.json"):
            file.write_text("{not json")
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


DAMAGES = ("truncated weights", "no weights", "text for weights", "text for a configuration", "empty")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_reference_is_named(world, fails, tmp_path, kind):
    shutil.copytree(world.ws / "base_model", tmp_path / "model")
    damaged(tmp_path / "model", kind)
    config = world.edit(at(*ANTHROPIC, "sft_model", str(tmp_path / "model")))
    fails(
        baseline_eval, *STEER, config=config, status=1, said=["reference model of anthropic", str(tmp_path / "model")]
    )


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_value_model_is_named(world, fails, tmp_path, kind):
    folder = tmp_path / "iter_0" / "help"
    shutil.copytree(world.ws / "value_models/iter_0/help", folder)
    damaged(folder, kind)
    fails(mavis, *MAVIS, "--value_model_dir", tmp_path, status=1, said=str(folder))


def test_a_checkpoint_with_another_vocabulary_is_refused(world, fails, tmp_path):
    """A value model that was trained for another one, a base of value models with another, trees of another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "iter_0" / "help"
    shutil.copytree(world.ws / "value_models/iter_0/help", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["vocabulary"] = {"size": 32001, "hash": "0"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    said = ["trained for another vocabulary (32001 tokens)", "train it on trees of this reference"]
    fails(mavis, *MAVIS, "--value_model_dir", tmp_path, status=1, said=said)

    tokenizer = AutoTokenizer.from_pretrained(world.ws / "base_model")
    shutil.copytree(world.ws / "base_model", tmp_path / "other")
    state = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    names = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"] = {name: i for i, name in enumerate([*names[:4], *names[:3:-1]])}  # the words turned round
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(state))
    config = world.edit(at("value_model", "path", str(tmp_path / "other")))
    fails(mavis, *MAVIS, config=config, status=1, said=["has another vocabulary than the reference", "tokens differ"])

    small = AutoModelForCausalLM.from_pretrained(world.ws / "base_model")
    small.resize_token_embeddings(20)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    config = world.edit(at(*ANTHROPIC, "sft_model", str(tmp_path / "small")))
    fails(baseline_eval, *STEER, config=config, status=1, said=[f"has {len(tokenizer)} tokens, the model 20"])
    fails(train_value_model, "--objective", "help", "--output_dir", tmp_path / "vm", config=config, status=1,
          said=["the value model knows 20 tokens", "another"])  # fmt: skip
    fails(fit_token_table, world.trees, "help", config=config, status=1, said=["outside a vocabulary of 20"])


# ---------------------------------------------------------------------------------------------------------------- trees


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["pictures"] = np.zeros(3)


def wrong_type(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["prompt0"]
        file["prompt0"] = np.zeros(3)


def cut_tokens(path: Path) -> None:
    with h5py.File(path, "a") as file:
        tokens = file["prompt0/tokens"][:-2]
        del file["prompt0/tokens"]
        file["prompt0/tokens"] = tokens


STORES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("these are not the tokens"),
    "missing": lambda path: path.unlink(),
    "foreign": foreign,
    "wrong_type": wrong_type,
    "cut_tokens": cut_tokens,
}


@pytest.mark.parametrize("kind", STORES)
def test_a_store_that_is_corrupt_truncated_or_foreign_stops_every_reader(world, fails, tmp_path, kind):
    trees, training = tmp_path / "trees", tmp_path / "training"
    shutil.copytree(world.trees, trees)
    shutil.copytree(world.training, training)
    for folder in (trees, training):
        STORES[kind](folder / "all_tokens.hdf5")
    unchanged = [trees, training]
    fails(label_tree, trees, "harm", status=1, said="all_tokens.hdf5", unchanged=unchanged)
    fails(label_tree, trees, "help", "--check_trees", status=1, said="all_tokens.hdf5", unchanged=unchanged)
    fails(split_data, trees, "--output_dir", tmp_path / "out", status=1, said="all_tokens.hdf5", unchanged=unchanged)
    fails(fit_token_table, trees, "help", status=1, said="all_tokens.hdf5", unchanged=unchanged)
    fails(train_value_model, "--objective", "help", "--data_dir", training, "--output_dir", tmp_path / "vm", status=1,
          said="all_tokens.hdf5", unchanged=unchanged)  # fmt: skip
    assert not (tmp_path / "out").exists() and not (tmp_path / "vm").exists()


@pytest.mark.parametrize("kind", ["truncated", "text", "foreign"])
def test_trees_are_not_grown_into_a_damaged_store(world, fails, tmp_path, kind):
    """It is found before hours of growth, not after."""
    shutil.copytree(world.trees, tmp_path / "trees")
    STORES[kind](tmp_path / "trees" / "all_tokens.hdf5")
    fails(
        get_data_base, 0, 9, "--output_dir", tmp_path / "trees", status=1, said="all_tokens.hdf5", unchanged=[tmp_path]
    )


def test_merging_a_foreign_store_writes_nothing(world, tmp_path):
    from utils.errors import DataError

    foreign(tmp_path / "foreign.hdf5")
    for other in (tmp_path / "foreign.hdf5", tmp_path / "gone.hdf5"):
        with pytest.raises(DataError):
            hdf5_utils.merge_hdf5_files([world.trees / "all_tokens.hdf5", other], tmp_path / "merged.hdf5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.hdf5"]


# ------------------------------------------------------------------------------------ folders made with other arguments


def test_a_folder_made_with_other_arguments_is_refused(world, fails, tmp_path):
    for flag, value, known in (("--topk", 3, "top_k=15"), ("--seed", 3, "seed=0"), ("--num_layers", 2, "num_layers=3")):
        fails(get_data_base, 0, 6, flag, value, status=1, said=[str(world.trees), f"was made with {known}"])
    fails(get_data_iter, 0, 6, "help", "--beta", 1, "--output_dir", world.trees, status=1, said="was made with")
    fails(
        train_value_model, "--objective", "help", "--lr", 1e-4, status=1, said=["value_models/iter_0/help", "--rerun"]
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails(train_value_model, "--objective", "help", "--output_dir", tmp_path / "mine", "--rerun", status=1,
          said="holds no value model", unchanged=[tmp_path])  # fmt: skip
    fails(split_data, world.trees, "--output_dir", world.trees, status=2, said="is the folder of the trees")


def test_a_file_where_a_folder_should_be(world, fails, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    fails(get_data_base, 0, 1, "--output_dir", file, status=1, said=str(file), unchanged=[tmp_path])
    fails(split_data, world.trees, "--output_dir", file, status=1, said=str(file), unchanged=[tmp_path])
    fails(
        train_value_model, "--objective", "help", "--output_dir", file, status=1, said=str(file), unchanged=[tmp_path]
    )
    fails(dataset_preprocess, "anthropic", "--output_dir", file, status=1, said=str(file), unchanged=[tmp_path])
    runs = world.ws / "mavis_logs"
    fails(pareto_report, runs, "--output_dir", file, status=1, said=str(file), unchanged=[tmp_path], common=False)


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


def start(world, script, *arguments):
    argv = [sys.executable, str(REPOSITORY / script), *map(str, arguments), "--config", world.config, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def interrupt_when(process, there, seconds=120):
    """Send SIGINT once something is there; the process's status and stderr."""
    deadline = time.monotonic() + seconds
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_leaves_whole_trees_and_the_same_command_goes_on(world, tmp_path):
    out = tmp_path / "trees"
    command = ("get_data_base.py", 0, 600, "--output_dir", out, "--batch_size", 8)
    status, err = interrupt_when(start(world, *command), lambda: len(list(out.glob("prompt*_tree.json"))) > 3)
    assert status == 130
    assert err == "interrupted: what was finished is kept, and the same command goes on from there\n"
    kept = hdf5_utils.tree_indices(out)
    assert 3 < len(kept) < 600 and len(list(hdf5_utils.read_trees(out))) == len(kept)
    assert not list(out.glob(".*.tmp")) and not (out / "parts").exists()
    times = {i: (out / f"prompt{i}_tree.json").stat().st_mtime_ns for i in kept}
    argv = ["0", str(max(kept) + 1), "--output_dir", str(out), "--config", world.config, "--device", "cpu"]
    assert run(lambda: get_data_base.main(argv)) == 0
    assert set(hdf5_utils.tree_indices(out)) == set(range(max(kept) + 1))
    assert times == {i: (out / f"prompt{i}_tree.json").stat().st_mtime_ns for i in kept}  # not grown again


def test_ctrl_c_leaves_a_runs_rows_and_the_same_command_completes_it(world):
    folder = world.ws / "baseline_logs"
    command = ("--dataset", "anthropic", "--num_prompts", 120, "--num_trials", 40, "--batch_size", 8)
    command = (*command, "--max_new_tokens", 100)

    def rows():
        return sum(len(p.read_text().splitlines()) for p in folder.rglob("samples.jsonl"))

    status, err = interrupt_when(start(world, "baseline_eval.py", *command), lambda: rows() > 0)
    assert status == 130 and err.startswith("interrupted: ") and err.count("\n") == 1
    [run_folder] = [p.parent for p in folder.rglob("samples.jsonl")]
    assert 0 < rows() < 4800 and not (run_folder / "summary.txt").exists()
    first = (run_folder / "samples.jsonl").read_text()
    process = start(world, "baseline_eval.py", *command)
    status, err = interrupt_when(process, lambda: rows() > len(first.splitlines()))
    assert status == 130 and (run_folder / "samples.jsonl").read_text().startswith(first)
    assert [p.parent for p in folder.rglob("samples.jsonl")] == [run_folder]
