"""The run folder: written first, completed after a kill, never computed twice, one writer at a time."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from utils.errors import DataError
from utils.provenance import fingerprint, identity
from utils.runs import RunSpec, open_run, part_path, read_arguments, read_parts, read_samples, rows_done
from utils.summaries import mean_and_error, per_prompt, summarize

SPEC = RunSpec(
    kind="mavis_logs",
    dataset="anthropic",
    method="mavis",
    objectives=("help", "harm"),
    weights={"help": 0.2, "harm": 0.8},
    series={"beta": 4.0},
    indices=(3, 5),
    num_trials=2,
    arguments={"seed": 0},
    setting={"device": "cpu"},
    configuration={"label": "test"},
)


def sample(index, trial, help=1.0, harm=2.0, log_ratio=0.5):
    row = {
        "index": index,
        "trial": trial,
        "prompt": "p",
        "response": "ä\u2028b",
        "rewards": {"help": help, "harm": harm},
    }
    row |= {"tokens": 4, "generated_tokens": 4, "distinct": 0.75, "finished": True, "seconds": 0.5}
    row |= {"reference_log_prob": -8.0, "num_candidates": 1}
    return row | ({} if log_ratio is None else {"log_ratio": log_ratio})


ROWS = [sample(i, t, help=i + 0.1 * t, log_ratio=i / 7) for i in (3, 5) for t in (0, 1)]


def fill(run, rows=ROWS):
    run.append(rows)
    return run.finish()


def test_the_folder_and_its_arguments_exist_before_any_row(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        assert run.folder.parent == tmp_path / "mavis_logs" / "anthropic" / "help_harm"
        assert run.folder.name.startswith("mavis_0.2-0.8_") and run.folder.name.endswith(SPEC.identity)
        arguments = yaml.safe_load((run.folder / "args.yaml").read_text())
    assert arguments["weights"] == {"help": 0.2, "harm": 0.8} and arguments["arguments"] == {"seed": 0}
    assert {"python", "torch", "transformers", "peft", "numpy"} <= set(arguments["versions"])
    assert arguments["process"]["pid"] == os.getpid() and arguments["configuration"] == {"label": "test"}
    assert not (run.folder / "summary.txt").exists()


def test_a_complete_run_has_four_files_and_is_not_repeated(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        fill(run)
    assert sorted(f.name for f in run.folder.iterdir()) == ["args.yaml", "rewards.csv", "samples.jsonl", "summary.txt"]
    with open_run(tmp_path, SPEC) as again:
        assert again.complete and again.folder == run.folder and again.samples == ROWS
    with open_run(tmp_path, SPEC, rerun=True) as fresh:
        assert not fresh.complete and fresh.folder != run.folder and not fresh.samples
        fill(fresh)
    with open_run(tmp_path, SPEC) as newest:
        assert newest.folder == fresh.folder


def test_only_what_determines_the_result_is_in_the_identity():
    from dataclasses import replace

    assert replace(SPEC, setting={"device": "cuda", "batch_size": 7}, configuration={}).identity == SPEC.identity
    for change in ({"weights": {"help": 1.0}}, {"indices": (3,)}, {"series": {"beta": 2.0}}, {"num_trials": 1},
                   {"arguments": {"seed": 1}}, {"determining": {"models": "x"}}, {"method": "other"}):  # fmt: skip
        assert replace(SPEC, **change).identity != SPEC.identity, change
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        run.append(ROWS[:3])
    file = run.folder / "samples.jsonl"
    whole = file.read_bytes()
    for torn in (b'{"index": 5, "tri', b'{"index": 5}', json.dumps(ROWS[3]).encode()):  # no end of line: not whole
        file.write_bytes(whole + torn)
        with open_run(tmp_path, SPEC) as again:
            assert again.folder == run.folder and again.samples == ROWS[:3]
            assert again.done == {(3, 0), (3, 1), (5, 0)}
        assert file.read_bytes() == whole
    with open_run(tmp_path, SPEC) as again:
        fill(again, ROWS[3:])
        assert len(again.arguments["resumed"]) == 4
    assert read_samples(run.folder) == ROWS


def test_a_damaged_line_in_the_middle_is_named_and_not_swallowed(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        run.append(ROWS[:1])
    (run.folder / "samples.jsonl").write_text("{]\n" + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match="line 1"):
        open_run(tmp_path, SPEC)


def test_a_damaged_byte_is_one_line_also_in_a_run_that_goes_on(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        run.append(ROWS[:2])
    file = run.folder / "samples.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"prompt"', b'"prom\xff"', 1))
    for reading in (lambda: open_run(tmp_path, SPEC), lambda: rows_done(run.folder)):
        with pytest.raises(DataError, match="samples.jsonl is damaged: no UTF-8 text at byte"):
            reading()
    part = part_path(run.folder, "0000000")
    part.parent.mkdir()
    part.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="0000000.jsonl is damaged"):
        read_parts(run.folder)


def test_an_unfinished_run_cannot_be_called_complete(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        run.append(ROWS[:3])
        with pytest.raises(AssertionError, match="3 rows of 4"):
            run.finish()
    assert not (run.folder / "summary.txt").exists()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); sys.path.insert(0, sys.argv[2] + '/tests')\n"
        "import time; from test_runs import *\n"
        "run = open_run(sys.argv[1], SPEC); run.append(ROWS[:1]); print('held', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parent.parent)
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), root], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=f"process {holder.pid} on "):
            open_run(tmp_path, SPEC)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_run(tmp_path, SPEC) as run:  # the lock ended with the process; its row is kept
        assert run.done == {(3, 0)}


def test_rewards_csv_holds_the_means_over_trials_bit_for_bit(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        fill(run)
    rows = list(csv.DictReader((run.folder / "rewards.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "index",
        "help",
        "harm",
        "log_ratio",
        "seconds",
        "tokens",
        "generated_tokens",
        "distinct",
        "reference_log_prob",
        "finished",
    ]
    assert [float(r["help"]) for r in rows] == [np.mean([3.0, 3.1]), np.mean([5.0, 5.1])]
    assert [float(r["log_ratio"]) for r in rows] == [3 / 7, 5 / 7]
    assert float(rows[0]["reference_log_prob"]) == -2.0  # per token


def test_the_log_ratio_is_a_column_only_where_it_was_tracked():
    untracked = [sample(3, 0, log_ratio=None)]
    assert "log_ratio" not in per_prompt(untracked)[0] and "log_ratio" not in summarize(untracked)


def test_a_score_that_only_some_samples_have_is_no_column():
    """A judge that was fitted while a run was interrupted."""
    judged = sample(5, 0) | {"extra": {"judge_help": 1.0}}
    assert "judge_help" in per_prompt([judged])[0] and "judge_help" in summarize([judged])
    assert all("judge_help" not in row for row in per_prompt([sample(3, 0), judged]))
    assert "judge_help" not in summarize([sample(3, 0), judged])


def test_an_empty_answer_has_no_log_probability_per_token():
    empty = sample(3, 0) | {"tokens": 0, "reference_log_prob": 0.0}
    assert math.isnan(per_prompt([empty])[0]["reference_log_prob"])
    assert per_prompt([empty, sample(3, 1)])[0]["reference_log_prob"] == -2.0


def test_the_summary_has_the_error_over_prompts_and_the_deviation_over_trials(tmp_path):
    with open_run(tmp_path, SPEC) as run:
        figures = fill(run)
    help = figures["help"]
    assert help.mean == pytest.approx(4.05) and help.error == pytest.approx(np.std([3.05, 5.05], ddof=1) / math.sqrt(2))
    assert help.trials == pytest.approx(np.std([4.0, 4.1], ddof=1))
    assert figures["tokens_per_second"].mean == 8.0 and figures["seconds_per_prompt"].mean == 0.5
    text = (run.folder / "summary.txt").read_text()
    assert "help 0.2, harm 0.8" in text and "4.0500" in text and "KL" in text and "index 3 to 5" in text
    assert all(math.isnan(v) for v in mean_and_error([]))


def test_numbers_that_are_not_finite_never_reach_the_file(tmp_path):
    with open_run(tmp_path, SPEC) as run, pytest.raises(ValueError):
        run.append([sample(3, 0, help=float("nan"))])
    assert (run.folder / "samples.jsonl").read_text() == ""


def test_a_fingerprint_tells_checkpoints_apart_and_leaves_hub_names_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    data = bytearray(os.urandom(3 << 20))
    (folder / "model.safetensors").write_bytes(data)
    first = fingerprint(folder)
    (folder / "training_log.txt").write_text("not a weight")
    assert fingerprint(folder) == first
    (folder / "model.safetensors").write_bytes(bytes(b ^ 1 for b in data))
    assert fingerprint(folder) != first
    assert fingerprint("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


def test_a_folder_without_arguments_is_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_arguments(tmp_path)
    (tmp_path / "args.yaml").write_text("just: text")
    with pytest.raises(DataError, match="not a run"):
        read_arguments(tmp_path)
