"""The command line: instant help, every flag explained, documented commands that parse, weights and iterations."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

from utils import cli
from utils.config import REPOSITORY
from utils.errors import ConfigError, DataError, UsageError

SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in (
        "*.py",
        "Finetuning/*.py",
        "Finetuning/*/*.py",
        "scripts/**/*.py",
        "benchmarks/*.py",
        "docs/examples/*.py",
    )
    for path in REPOSITORY.glob(pattern)
    if path.name not in ("__init__.py", "measuring.py")  # what benchmarks share is no script
)
SHELL_FILES = (path for pattern in ("scripts/**/*.sh", "benchmarks/*.sh") for path in REPOSITORY.glob(pattern))
SHELL_SCRIPTS = sorted([*(str(path.relative_to(REPOSITORY)) for path in SHELL_FILES), ".ci/run"])
HEAVY = ("torch", "transformers", "pandas", "datasets", "trl", "peft", "accelerate", "h5py", "sklearn", "matplotlib")


def load(script):
    name = "cli_" + re.sub(r"\W", "_", script)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / script)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


# ---------------------------------------------------------------------------------------------------------- scripts


def test_no_script_needs_anything_heavy_for_its_help(tmp_path):
    """One fresh interpreter asks every script for its help, from another folder; torch alone would take seconds."""
    program = f"""
import importlib.util, sys
for script in {SCRIPTS!r}:
    spec = importlib.util.spec_from_file_location("script", {str(REPOSITORY)!r} + "/" + script)
    sys.path[0] = {str(REPOSITORY)!r} + "/" + script.rpartition("/")[0]  # as `python path/to/script.py` has it
    module = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0, (script, stop.code)
    else:
        raise AssertionError(script + " did not stop at --help")
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"{{script}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage:") == len(SCRIPTS) and not done.stderr


@pytest.mark.parametrize("script", ["mavis.py", "Finetuning/SFT/sft.py", "scripts/tiny/make_world.py"])
def test_a_script_runs_from_any_folder(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script.rpartition('/')[2]}") and not done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_a_parser_and_a_main_and_explains_every_argument(script):
    module = load(script)
    assert callable(module.main) and module.main.__defaults__ == (None,)
    parser = module.build_parser()
    assert parser.description
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.dest
        assert action.help and action.help is not argparse.SUPPRESS, f"{script}: {name} has no help"
        assert not (isinstance(action, argparse._StoreTrueAction) and action.default), f"{script}: {name} is always on"
    text = (REPOSITORY / script).read_text()
    assert re.search(
        r'^if __name__ == "__main__":\n    (raise SystemExit|sys\.exit)\((cli\.)?run\(main\)\)$', text, re.M
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_imports_of_ours_is_there(script):
    """Imports within functions, which nothing else may ever run."""
    for node in ast.walk(ast.parse((REPOSITORY / script).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("utils", "benchmarks"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                there = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                assert there, f"{script}: {node.module} has no {name}"


def test_every_stage_takes_the_shared_arguments():
    shared = {"--config", "--workspace", "--device", "--dry_run", "--wandb", "--no-wandb"}
    for script in SCRIPTS:
        if script.startswith(("benchmarks/", "docs/", "scripts/", "pareto_report")):
            continue
        flags = set(load(script).build_parser()._option_string_actions)
        assert shared <= flags, f"{script} lacks {shared - flags}"


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("benchmarks/decode.py", ["--output", "made.json"]),
        ("benchmarks/value_adapters.py", ["--output", "made.json"]),
        ("scripts/training_work.py", ["--output", "made.json"]),
        ("scripts/results_page.py", ["--report", "r", "--notes", "n.md", "--output", "page.md"]),
    ],
)
def test_a_dry_run_of_what_measures_and_sums_up_loads_and_makes_nothing(script, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world = ["--config", "tiny", "--workspace", str(tmp_path / "nothing"), "--dry_run"]
    assert load(script).main([*argv, *world]) == 0
    assert capsys.readouterr().out.startswith("what") and not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- commands that are written down


def commands_in(text):
    """(script, words) of each `python script.py ...` in a text, also launched or given to a job script; a shell's
    variables stand for themselves."""
    text = re.sub(r"\\\n\s*", " ", text)
    by = r"(?:python|accelerate launch(?: --\w+(?: [^\s-]\S*)?)*|\S+\.sbatch)"
    for match in re.finditer(by + r"\s+((?:[\w./]+/)?\w+\.py)\b([^\n`|;&)]*)", text):
        if match[1] in SCRIPTS:
            yield match[1], match[2].split("#")[0].split("...")[0].rstrip(" ,.")


def documents():
    yield from (str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").rglob("*.md"))
    yield from (name for name in ["README.md", *SHELL_SCRIPTS, *SCRIPTS] if (REPOSITORY / name).is_file())


@pytest.mark.parametrize("document", sorted(documents()))
def test_every_flag_of_a_written_command_exists(document):
    for script, rest in commands_in((REPOSITORY / document).read_text()):
        flags = load(script).build_parser()._option_string_actions
        for word in rest.replace('"', " ").replace("'", " ").replace("[", " ").replace("]", " ").split():
            if word.startswith("--"):
                assert word.partition("=")[0] in flags, f"{document}: {script} has no {word} (in {rest!r})"


def test_written_commands_are_found():
    assert len([c for d in documents() for c in commands_in((REPOSITORY / d).read_text())]) > 60
    launched = "accelerate launch --multi_gpu --num_processes 8 mavis.py --beta 4"
    assert list(commands_in(launched)) == [("mavis.py", " --beta 4")]
    assert list(commands_in("run `python mavis.py --beta 4 \\\n  --x`, or not")) == [("mavis.py", " --beta 4  --x")]


def test_the_readmes_commands_parse_as_they_stand():
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / "README.md").read_text())
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"]:
                try:
                    load(words[1]).build_parser().parse_args(words[2:])
                except SystemExit:
                    pytest.fail(f"README.md: {line}")


def test_the_published_commands_parse():
    """The README of the published code, flag by flag (a flag that is documented exists here)."""
    for line in (
        """
        dataset_preprocess.py anthropic --split=train
        dataset_preprocess.py summary --split=test
        Finetuning/SFT/sft.py --save_directory sft_lora --wandb_name assistant --exp_type assistant
        Finetuning/SFT/merge_sft_lora.py --lora_name sft_lora/assistant
        get_data_base.py 0 100 --dataset anthropic --data_split train --device cuda:0 --temperature 1.0 --topk 15
            --output_dir x --seed_increment 7 --root_children 4 --non_root_children 2 --num_layers 5 --batch_size 8
        label_tree.py x all --dataset anthropic --check_trees
        label_tree_soft.py x help --dataset anthropic
        train_value_model.py --dataset anthropic --objective help --data_dir x --init_checkpoint y --output_dir z
            --num_epochs 1 --batch_size 16 --lr 2e-5 --weight_decay 2e-3 --KL_penalty 0.1 --no_warmup
        mavis.py --dataset anthropic --obj_weights 0.2,,0.8 --value_model_dir v --value_model_iter 1,,0
            --beta 4 --track_KL --num_prompts 100 --num_trials 3 --topk 15 --temperature 1 --seed 0 --batch_size 8
            --device cpu --normalize_values --prompt hello --prompt -
        baseline_eval.py --dataset summary --num_samples 16 --obj_weights 0.5,0.5
        baseline_eval.py --dataset anthropic --ppo --obj_weights 0.4,0.6
        baseline_eval.py --dataset anthropic --morlhf --obj_weights 0.4,0.6 --num_samples=4
        baseline_eval_KL.py --dataset summary --morlhf --obj_weights 0.4,0.6 --num_samples=4
        mod_eval.py --dataset anthropic --obj_weights 0.4,0.6 --num_prompts 100
        Finetuning/PPO/ppo.py --base_model sft_model/anthropic --exp_type assistant --alpha 0.4
        Finetuning/PPO/ppo.py --exp_type summary --reward_models summarization --algorithm grpo
        Finetuning/reward_soup_merge.py --adapters a b --weights 0.4 0.6 --output_dir c
        pareto_report.py mavis_logs baseline_logs
    """.replace("\n            ", " ")
        .strip()
        .splitlines()
    ):
        script, *words = shlex.split(line)
        load(script).build_parser().parse_args(words)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_a_shell_script_stops_at_the_first_failure(script):
    text = (REPOSITORY / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    code = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    assert subprocess.run(["bash", "-n", str(REPOSITORY / script)], capture_output=True).returncode == 0


# ------------------------------------------------------------------------------------------------ weights, iterations

NAMES = ("help", "harm", "humor")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0.2,,0.8", {"help": 0.2, "humor": 0.8}),
        ("1", {"help": 1.0}),
        (",1", {"harm": 1.0}),
        ("1,0,0", {"help": 1.0}),
        (" 0.5 , 0.5 ", {"help": 0.5, "harm": 0.5}),
        ("0.1,0.2,0.7", {"help": 0.1, "harm": 0.2, "humor": 0.7}),
        (",,1.", {"humor": 1.0}),
        ("1e-1,9e-1", {"help": 0.1, "harm": 0.9}),
        ("0.333333,0.333333,0.333334", {"help": 0.333333, "harm": 0.333333, "humor": 0.333334}),
    ],
)
def test_weights_stand_in_the_data_sets_order_and_zeros_are_left_out(text, weights):
    assert cli.parse_weights(text, NAMES) == weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.5,0.4", "sum to 0.9; they must sum to 1"),
        ("0.5,0.5,0.5", "sum to 1.5"),
        ("-1,2", "not negative"),
        ("nan,1", "finite"),
        ("inf", "finite"),
        ("1,0,0,0", "has 4 weights for the 3 objectives help,harm,humor"),
        ("", "has no weight"),
        (",,", "has no weight"),
        ("0,0,0", "sum to 0"),
        ("half,half", "each weight must be a number or empty"),
        ("0.5;0.5", "each weight must be a number or empty"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused_with_the_order(text, said):
    with pytest.raises(UsageError) as error:
        cli.parse_weights(text, NAMES)
    assert said in str(error.value) and repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "weights", "iterations"),
    [
        ("1,,0", {"help": 0.2, "humor": 0.8}, {"help": 1, "humor": 0}),
        ("1,2,0", {"help": 0.2, "humor": 0.8}, {"help": 1, "humor": 0}),
        ("2", {"help": 0.2, "humor": 0.8}, {"help": 2, "humor": 2}),
        (",3", {"harm": 1.0}, {"harm": 3}),
        (" 0 , 1 ", {"help": 0.5, "harm": 0.5}, {"help": 0, "harm": 1}),
        (4, {"harm": 1.0}, {"harm": 4}),
    ],
)
def test_an_iteration_is_given_for_each_weight_or_once_for_all(text, weights, iterations):
    assert cli.parse_iterations(text, weights, NAMES) == iterations


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,,0", "harm has a weight and needs an iteration"),
        ("", "help has a weight"),
        ("-1", "got '-1'"),
        ("0,1.5", "got '1.5'"),
        ("0,last", "got 'last'"),
        ("²", "got '²'"),
        ("0,0,0,0", "has 4 places"),
    ],
)
def test_iterations_that_cannot_be_meant_are_refused(text, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        cli.parse_iterations(text, {"help": 0.5, "harm": 0.5}, NAMES)


def test_beta_is_finite_and_not_negative():
    assert cli.check_beta(0.0) == 0.0 and cli.check_beta(4.5) == 4.5
    for beta in (float("nan"), float("inf"), -0.1):
        with pytest.raises(UsageError, match="--beta must be a finite number of at least 0"):
            cli.check_beta(beta)


# ----------------------------------------------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("--beta is missing"), 2, "error: --beta is missing"),
        (ConfigError("a.yaml: unknown key 'x'"), 2, "error: a.yaml: unknown key 'x'"),
        (DataError("two\n  lines"), 1, "error: two lines"),
        (
            FileNotFoundError(2, "No such file or directory", "/no/such"),
            1,
            "error: /no/such: No such file or directory",
        ),
        (OSError("no space"), 1, "error: no space"),
        (KeyboardInterrupt(), 130, "interrupted: what was finished is kept, and the same command goes on from there"),
    ],
)
def test_a_users_mistake_is_one_line_and_a_status(error, status, line, capsys, monkeypatch):
    monkeypatch.delenv("MAVIS_DEBUG", raising=False)

    def main():
        raise error

    assert cli.run(main) == status
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    """A plain ValueError is not the user's: hiding where it arose would hide it. On request every error has one."""
    for error in (ValueError("shapes"), AssertionError((1, 2))):

        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            cli.run(main)
    monkeypatch.setenv("MAVIS_DEBUG", "1")

    def mistaken():
        raise DataError("x")

    with pytest.raises(DataError):
        cli.run(mistaken)
    assert cli.run(lambda: None) == 0 and cli.run(lambda: 3) == 3


def test_a_process_ends_with_the_status_and_the_line(tmp_path):
    for arguments, status, said in (
        (("--obj_weights", "0.5,0.4"), 2, "sum to 0.9; they must sum to 1 (order: help,harm,humor)"),
        (("--obj_weights", "1"), 1, "value model of help: nothing at"),
    ):
        command = [sys.executable, str(REPOSITORY / "mavis.py"), "--dataset", "anthropic", "--beta", "4", *arguments]
        done = subprocess.run([*command, "--workspace", "ws"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status and not done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("No space left on device (os error 28)"), "No space left on device"),  # tokenizers
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "is the disk full?"),  # torch
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "is the disk full?"),
    ],
)
def test_what_a_library_says_of_a_full_disk_is_one_line(error, said, capsys, monkeypatch):
    monkeypatch.delenv("MAVIS_DEBUG", raising=False)

    def fail():
        raise error

    assert cli.run(fail) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("torch", "tried to allocate 4503599627370496 bytes"),
        ("numpy", "Unable to allocate 8.00 PiB"),
        ("python", "error: out of memory: a smaller"),
        ("gpu", "Tried to allocate 2.00 GiB"),
    ],
)
def test_a_full_memory_is_one_line_that_says_what_to_do(where, said, capsys, monkeypatch):
    import numpy as np
    import torch

    monkeypatch.delenv("MAVIS_DEBUG", raising=False)

    def fail():
        if where == "gpu":  # as the library words it
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...\nSee")
        return {"torch": torch.empty, "numpy": np.zeros, "python": bytearray}[where](1 << 50)

    assert cli.run(fail) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory") and err.count("\n") == 1 and said in err and "--batch_size" in err
