"""The comparison of all methods, from single policies to the report."""

import json
import os
import subprocess

import pytest

from utils.config import REPOSITORY
from utils.runs import read_arguments


def compare(world, workspace, **environment):
    arguments = [str(world.folder / "world.yaml"), "--workspace", str(workspace), "--device", "cpu"]
    return subprocess.run(
        ["bash", "scripts/compare.sh", *arguments],
        cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


def test_a_method_that_does_not_exist_is_refused(rival_world, tmp_path):
    done = compare(rival_world, tmp_path, METHODS="mod soup")
    assert done.returncode == 2 and "METHODS has soup; valid: reference table mavis" in done.stderr


@pytest.mark.parametrize("pair", ["help,humr", "help", "help,help", "help,harm,humor"])
def test_what_is_no_pair_of_objectives_is_refused_before_anything_runs(rival_world, tmp_path, pair):
    done = compare(rival_world, tmp_path, PAIRS=f"help,harm {pair}", METHODS="best_of")
    assert done.returncode == 2 and f"PAIRS has {pair}; a pair is two of anthropic's objectives" in done.stderr
    assert "==" not in done.stdout and not list(tmp_path.iterdir())


def test_relative_paths_are_meant_from_where_the_user_is(rival_world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my world.yaml").write_text((rival_world.folder / "world.yaml").read_text())
    command = ["bash", str(REPOSITORY / "scripts" / "compare.sh"), "my world.yaml", "--workspace", "../its place"]
    environment = os.environ | {"PAIRS": "help,harm", "METHODS": "table mavis"}  # for which nothing is there
    done = subprocess.run(command, cwd=tmp_path / "mine", env=environment, capture_output=True, text=True, timeout=300)
    assert f"no token tables of help,harm in {tmp_path / 'its place'}/token_tables" in done.stdout, done.stderr
    assert done.returncode != 0  # for there is nothing to report


@pytest.mark.slow
def test_every_method_lands_in_one_report_and_nothing_is_done_twice(rival_world, tmp_path):
    """About two minutes: the trainings take a step each, the evaluations two prompts."""
    workspace = tmp_path / "ws"
    workspace.mkdir()
    for name in ("base_model", "datasets", "world"):
        (workspace / name).symlink_to(rival_world.ws / name)
    narrow = {
        "SEEDS": "0 1", "WEIGHTS": "0 0.5 1", "NUM_SAMPLES": "2", "NUM_PROMPTS": "2", "NUM_TRIALS": "1",
        "PPO_ARGS": "--max_steps 1", "ARM_ARGS": "--num_prompts 8",
    }  # fmt: skip
    done = compare(rival_world, workspace, **narrow)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "no value models of help,harm" in done.stdout and "no token tables of help,harm" in done.stdout
    runs = [read_arguments(f.parent) for f in workspace.glob("*_logs/anthropic/*/*/args.yaml")]
    methods = {}
    for run in runs:
        methods.setdefault(run["method"], []).append((run["arguments"]["seed"], tuple(run["weights"].items())))
    weighted = [(("harm", 1.0),), (("help", 0.5), ("harm", 0.5)), (("help", 1.0),)]
    mixed = ["mod", "morlhf", "rewarded_soup"]
    assert sorted(methods) == sorted([*mixed, "best_of_n", "genarm", "reference", "single_policy"])
    for method, found in methods.items():
        expected = [()] if method == "reference" else weighted
        if method in mixed:  # their ends are the single policies, which are evaluated once
            expected = [w for w in weighted if len(w) == 2]
        elif method == "single_policy":
            expected = [w for w in weighted if len(w) == 1]
        assert sorted(found) == sorted((seed, w) for seed in (0, 1) for w in expected), method
    [section] = json.loads((workspace / "report_compare" / "report.json").read_text())["sections"]
    shown = [r["method"] for r in section["runs"]]
    assert set(shown) == set(methods) - {"single_policy"} and all(shown.count(method) == 3 for method in mixed)

    before = {f: f.stat().st_mtime_ns for f in workspace.rglob("*.safetensors")}
    again = compare(rival_world, workspace, **narrow, METHODS="soups mod")
    assert again.returncode == 0 and again.stdout.count("is complete and is not repeated") == 12
    assert before == {f: f.stat().st_mtime_ns for f in workspace.rglob("*.safetensors")}
