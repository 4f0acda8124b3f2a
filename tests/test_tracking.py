"""--wandb: every stage logs what a reader wants to see, and nothing needs the package."""

import csv
import importlib.machinery
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import baseline_eval
import dataset_preprocess
import fit_judges
import fit_token_table
import get_data_base
import get_data_iter
import label_tree
import mavis
import pareto_report
import split_data
import train_value_model
from tests.runs_for_tests import make_run
from utils import cli
from utils.cli import run
from utils.config import REPOSITORY
from utils.errors import DataError
from utils.tracking import Tracker

WANTED = {"help": 0.5, "harm": 0.5}


class FakeWandb:
    """Enough of wandb to see what is logged: runs with their name, configuration, rows, summary and exit code."""

    Error = RuntimeError
    __spec__ = importlib.machinery.ModuleSpec("wandb", None)  # so that it is found

    def __init__(self):
        self.runs = []

    def init(self, *, project, name, job_type, config):
        made = SimpleNamespace(project=project, name=name, stage=job_type, config=config, rows=[], summary={})
        made.log = lambda row, step=None: made.rows.append(row)
        made.finish = lambda exit_code: setattr(made, "ended", exit_code)
        self.runs.append(made)
        return made

    def Table(self, *, columns, data):  # noqa: N802 - wandb's name
        assert all(len(row) == len(columns) for row in data)
        return SimpleNamespace(columns=columns, data=data)

    def Image(self, file):  # noqa: N802
        return Path(file).read_bytes()


@pytest.fixture
def fake(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return wandb


def test_every_stage_of_the_chain_logs_what_it_made(tiny_world, tmp_path, fake, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    workspace = tmp_path / "ws"
    workspace.mkdir()
    for part in tiny_world.iterdir():
        (workspace / part.name).symlink_to(part)
    data = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    data["objectives"] = {"help": data["objectives"]["help"]}
    data["datasets"] = {"anthropic": data["datasets"]["anthropic"]}
    data["workspace"] = str(workspace)
    spec = data["datasets"]["anthropic"]
    spec |= {"sft_model": "base_model", "objectives": ["help"], "num_val_prompts": 2}
    spec["training"]["num_epochs"] = 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    trees = workspace / "tree_data" / "anthropic" / "iter_0"
    training = workspace / "data_for_training" / "anthropic" / "iter_0"
    short = ("--dataset", "anthropic", "--num_prompts", "2", "--num_trials", "1")

    def stage(script, *argv):
        before = len(fake.runs)
        argv = [*map(str, argv), "--device", "cpu", "--config", str(tmp_path / "tiny.yaml"), "--wandb"]
        assert run(lambda: script.main(argv)) == 0
        (logged,) = fake.runs[before:]
        assert logged.project == "mavis" and logged.ended == 0 and logged.name
        return logged

    rows = stage(dataset_preprocess, "anthropic", "--split", "train")
    assert rows.summary["kept"] > 0 and rows.rows[0]["prompts"].columns == ["prompt"]
    stage(dataset_preprocess, "anthropic", "--split", "test")
    grown = stage(get_data_base, 0, 6)
    assert grown.rows[-1]["trees"] == 6 == grown.summary["trees_in_folder"] and grown.rows[-1]["tokens"] > 6
    assert grown.config["policy"] == "reference" and grown.stage == "trees_reference"
    labelled = stage(label_tree, trees, "help")
    assert labelled.summary["labelled"] == 6 and 0 <= labelled.summary["help/share_within_prompt"] <= 1
    assert stage(split_data, trees).summary == {"train": 4, "val": 2}
    table = stage(fit_token_table, training, "help")
    assert table.summary["help/train_trees"] == 4 and "help/leaves/correlation_within_prompt" in table.summary
    stage(fit_judges)
    curve = stage(train_value_model, "--objective", "help")
    assert {"train_loss", "lr", "step"} <= set(curve.rows[0]) and "validation/explained_variance" in curve.summary
    assert [r["step"] for r in curve.rows] == sorted(r["step"] for r in curve.rows)
    grown = stage(get_data_iter, 0, 1, "help", "--beta", 1)
    assert grown.stage == "trees_mavis" and grown.config["beta"] == 1.0
    steered = stage(mavis, *short, "--obj_weights", "1", "--beta", 2)
    (folder,) = (workspace / "mavis_logs" / "anthropic" / "help").iterdir()
    assert steered.name == folder.name and steered.config["weights"] == {"help": 1.0}
    with (folder / "rewards.csv").open() as stream:
        written = list(csv.reader(stream))
    (logged,) = (row["rewards"] for row in steered.rows)
    assert logged.columns == written[0] and [[str(x) for x in row] for row in logged.data] == written[1:]
    assert "log_ratio" in steered.summary and "tokens_per_second" in steered.summary
    assert stage(baseline_eval, *short).stage == "reference"

    before = len(fake.runs)
    pareto_report.main([str(workspace), "--output_dir", str(tmp_path / "report"), "--wandb"])
    assert len(fake.runs) == before + 1 and fake.runs[-1].ended == 0


def test_the_reports_tables_and_figures_are_logged(tmp_path, fake):
    make_run(tmp_path / "w", "reference", prompts=range(3))
    make_run(tmp_path / "w", "mavis", WANTED, beta=1.0, prompts=range(3))
    pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r"), "--wandb"])
    (logged,) = fake.runs
    rows = {name: value for row in logged.rows for name, value in row.items()}
    for name in ("anthropic_help_harm_front", "anthropic_help_harm_kl"):
        assert rows[name] == (tmp_path / "r" / f"{name}.png").read_bytes()
    assert [line[0] for line in rows["anthropic_help_harm/Points"].data] == ["reference", "mavis, beta 1"]
    assert "anthropic_help_harm/Differences to the reference" in rows


def test_a_failed_stage_is_marked_as_failed_and_only_numbers_are_logged(fake):
    with pytest.raises(KeyError), Tracker(True, "stage") as tracker:
        tracker.log({"loss": "0.5", "empty": "", "bad": float("nan"), "step": 3.0, "text": "x"})
        tracker.summary({"a": {"b": 2, 7: {"c": 0.5}}, "none": None})
        raise KeyError
    (logged,) = fake.runs
    assert logged.ended == 1 and logged.rows == [{"loss": 0.5, "step": 3}] and logged.name == "stage"
    assert logged.summary == {"a/b": 2, "a/7/c": 0.5}


def test_without_the_flag_nothing_is_imported_and_nothing_happens(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    with Tracker(False, "stage") as tracker:
        tracker.log({"a": 1})
        tracker.summary({"a": 1})
        tracker.table("t", ["a"], [[1]])
        tracker.images({"a": "nowhere.png"})


@pytest.mark.parametrize(
    "script, argv",
    [
        (dataset_preprocess, ["anthropic"]),
        (get_data_base, ["0", "1"]),
        (mavis, ["--dataset", "anthropic", "--obj_weights", "1", "--beta", "1"]),
        (pareto_report, ["."]),
    ],
)
def test_where_wandb_is_not_installed_one_line_says_so_at_once(script, argv, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    assert run(lambda: script.main([*argv, "--wandb"])) == 1
    assert capsys.readouterr().err == (
        "error: --wandb needs the package wandb: pip install wandb, or leave --wandb out\n"
    )


def test_where_wandb_cannot_start_one_line_says_what_to_do(fake, monkeypatch):
    def init(**_):
        raise fake.Error("No API key\nconfigured.")

    monkeypatch.setattr(fake, "init", init)
    with pytest.raises(DataError, match="^--wandb: No API key configured. .*WANDB_MODE=offline"):
        Tracker(True, "stage")


def with_wandb(mode, tmp_path, *argv):
    """Run a script with the real package in a process of its own."""
    environment = {**os.environ, "WANDB_MODE": mode, "WANDB_DIR": str(tmp_path / "wandb"), "WANDB_SILENT": "true"}
    (tmp_path / "wandb").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *map(str, argv), "--wandb"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="no wandb installed")
def test_offline_the_real_package_keeps_the_report_on_this_machine(tmp_path):
    make_run(tmp_path / "w", "reference", prompts=range(3))
    make_run(tmp_path / "w", "mavis", WANTED, beta=1.0, prompts=range(3))
    report = tmp_path / "r"
    with_wandb("offline", tmp_path, "pareto_report.py", tmp_path / "w", "--output_dir", report)
    (folder,) = (tmp_path / "wandb").glob("wandb/offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    images = {f.read_bytes() for f in folder.rglob("*.png")}
    assert images == {f.read_bytes() for f in report.glob("*.png")}
    (points,) = folder.rglob("Points_*.table.json")
    table = json.loads(points.read_text())
    assert table["columns"][:2] == ["method", "weights"] and table["data"][1][0] == "mavis, beta 1"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="no wandb installed")
def test_offline_and_disabled_a_stage_writes_what_it_writes_without(tmp_path, tiny_world, monkeypatch):
    argv = ["anthropic", "--config", "tiny", "--workspace", str(tiny_world), "--output_dir"]
    with_wandb("offline", tmp_path, "dataset_preprocess.py", *argv, tmp_path / "offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    assert dataset_preprocess.main([*argv, str(tmp_path / "disabled"), "--wandb"]) == 0
    assert dataset_preprocess.main([*argv, str(tmp_path / "without")]) == 0
    made = {mode: [f.read_bytes() for f in (tmp_path / mode).iterdir()] for mode in ("offline", "disabled", "without")}
    assert made["offline"] == made["disabled"] == made["without"]
    assert len(list((tmp_path / "wandb").glob("wandb/*run-*"))) == 1  # disabled leaves nothing


# ------------------------------------------------------------------------------------------------------- progress bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_what_is_done_tokens_per_second_and_the_time_left(monkeypatch):
    screen, clock = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    bar = cli.progress(total=8, desc="answers", unit="answer")
    for _ in range(4):
        clock[0] += 1.0
        bar.update()
        bar.tokens(2500)
    shown = screen.getvalue().split("\r")
    bar.close()
    assert "4/8" in shown[-1] and "2,500 tokens/s" in shown[-1] and "<" in shown[-1] and "answers" in shown[-1]


def test_a_bar_is_quiet_where_stderr_is_no_terminal(capsys):
    bar = cli.progress(total=2)
    bar.update()
    bar.tokens(5)
    bar.close()
    assert list(cli.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
