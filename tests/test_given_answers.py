"""Answers that were made elsewhere: scored, read by the reference and reported as the project's own are."""

import csv
import gzip
import json

import pytest

import pareto_report
from tests.toy_world import run_folders, status
from utils.runs import read_arguments, read_samples

ROWS = [{"index": i, "response": f"w{i} w{i + 1}"} for i in range(4)]


def written(path, rows):
    """A file of answers in the format that its name says."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(text)
    return path


def folder_of(script, method):
    [folder] = [f for f in run_folders(script) if read_arguments(f)["method"] == method]
    return folder


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.gz", "answers.csv"])
def test_a_runs_own_answers_come_to_its_own_figures(script, tmp_path, name):
    """An oracle that shares no code with decoding's bookkeeping: the log-ratio of a tilted answer, from its own
    log-probability and one pass of the reference, is what the run counted step by step."""
    assert script("mavis", "--obj_weights", "0.3,0.7", "--beta", 3) == 0
    run = read_samples(folder_of(script, "mavis"))
    kept = ("index", "trial", "prompt", "response", "finished", "seconds")
    rows = [{k: s[k] for k in kept} | {"log_prob": s["log_ratio"] + s["reference_log_prob"]} for s in run]
    file = written(tmp_path / name, rows[::-1])
    assert script("answers_eval", file, "--method_name", "mine", "--obj_weights", "0.3,0.7") == 0
    given = folder_of(script, "mine")
    assert given.parent == script.workspace / "baseline_logs" / "toy" / "low_even"
    for row, own in zip(read_samples(given), run, strict=True):
        for same in ("index", "trial", "prompt", "response", "rewards", "tokens", "finished", "distinct"):
            assert row[same] == own[same], same
        assert row["seconds"] == pytest.approx(sum(s["seconds"] for s in run) / len(run))
        for near in ("log_ratio", "reference_log_prob"):
            assert row[near] == pytest.approx(own[near], abs=1e-5), near


def test_without_log_prob_there_is_no_kl_and_without_seconds_no_time(script, tmp_path):
    file = written(tmp_path / "answers.jsonl", ROWS)
    assert script("answers_eval", file, "--method_name", "mine") == 0
    samples, summary = read_samples(folder_of(script, "mine")), (folder_of(script, "mine") / "summary.txt").read_text()
    assert all("log_ratio" not in s and s["reference_log_prob"] < 0 for s in samples)
    assert "KL" not in summary and "nan" not in summary
    arguments = read_arguments(folder_of(script, "mine"))
    assert arguments["num_trials"] == 1 and arguments["weights"] == {}
    assert "topk" not in arguments["arguments"]  # nothing is recorded that was not so
    assert script("answers_eval", file, "--method_name", "unread", "--no-track_KL") == 0
    assert all("reference_log_prob" not in s for s in read_samples(folder_of(script, "unread")))


def test_a_text_is_scored_as_it_stands_whatever_the_tokenizer_makes_of_it(script, tmp_path):
    odd = "  w1   w30 w041\tw2 "  # there is no token for w041, and none for the tabulator
    prompts = [f"\n\nHuman: w{i} w{i + 1}\n\nAssistant: " for i in range(4)]  # by their texts, in another order
    rows = [{"prompt": prompt, "response": odd if i == 2 else ""} for i, prompt in enumerate(prompts)][::-1]
    assert script("answers_eval", written(tmp_path / "answers.jsonl", rows), "--method_name", "mine") == 0
    samples = read_samples(folder_of(script, "mine"))
    assert [s["response"] for s in samples] == ["", "", "w1   w30 w041\tw2", ""]
    assert samples[2]["rewards"] == {"low": 0.5, "even": 0.5, "length": 4} and samples[0]["tokens"] == 1


def test_a_certain_answers_log_probability_may_round_to_a_little_more_than_0(script, tmp_path):
    rows = [row | {"log_prob": 3e-7} for row in ROWS]
    assert script("answers_eval", written(tmp_path / "answers.jsonl", rows), "--method_name", "mine") == 0
    assert all(s["log_ratio"] == -s["reference_log_prob"] for s in read_samples(folder_of(script, "mine")))


def test_a_kl_that_cannot_be_is_said(script, tmp_path, capsys):
    """As where the prompt's tokens were counted too: every answer is likelier under the reference."""
    for name, log_prob, said in (("prompts_too", -60.0, True), ("answers", -1.0, False)):
        rows = [row | {"trial": t, "log_prob": log_prob} for row in ROWS for t in range(6)]
        assert script("answers_eval", written(tmp_path / f"{name}.jsonl", rows), "--method_name", name) == 0
        assert ("no KL is below 0" in capsys.readouterr().out) == said


def test_the_same_answers_are_scored_once_and_others_anew(script, tmp_path, capsys):
    file = written(tmp_path / "answers.jsonl", ROWS)
    assert script("answers_eval", file, "--method_name", "mine") == 0
    moved = written(tmp_path / "moved.csv", ROWS[::-1])
    assert script("answers_eval", moved, "--method_name", "mine") == 0
    assert "complete and is not repeated" in capsys.readouterr().out
    changed = written(file, [*ROWS[:3], ROWS[3] | {"response": "w5"}])
    assert script("answers_eval", changed, "--method_name", "mine") == 0
    assert len(run_folders(script)) == 2


def test_trials_are_counted_as_answers_come_and_those_to_other_prompts_are_left_out(script, tmp_path, capsys):
    rows = [{"index": i, "response": f"w{n}"} for n in (1, 2, 3) for i in range(5)]  # 5 prompts, of which 4 count
    file = written(tmp_path / "answers.jsonl", rows)
    assert script("answers_eval", file, "--method_name", "mine", "--num_trials", 2) == 0
    assert "7 answers in" in capsys.readouterr().out
    samples = read_samples(folder_of(script, "mine"))
    assert [(s["index"], s["trial"], s["response"]) for s in samples] == [
        (i, t, f"w{t + 1}") for i in range(4) for t in range(2)
    ]


def test_the_report_has_the_method_beside_the_others(script, tmp_path, capsys):
    assert script("mavis", "--front", "low,even", "--points", 2, "--beta", 2) == 0
    for weights, word in (("1,0", "w2"), ("0,1", "w30")):
        rows = [{"index": i, "trial": t, "response": f"{word} w{i}"} for i in range(4) for t in range(2)]
        file = written(tmp_path / f"{word}.jsonl", rows)
        assert script("answers_eval", file, "--method_name", "my_method", "--obj_weights", weights) == 0
    capsys.readouterr()
    logs = [str(script.workspace / kind) for kind in ("mavis_logs", "baseline_logs")]
    assert pareto_report.main([*logs, "--output_dir", str(tmp_path / "report")]) == 0
    table = capsys.readouterr().out
    assert "my method" in table
    [section] = json.loads((tmp_path / "report" / "report.json").read_text())["sections"]
    series = {(run["series"], *run["weights"]) for run in section["runs"]}
    assert {("my method", "low"), ("my method", "even"), ("mavis, beta 2", "low")} <= series
    assert "my method" in (tmp_path / "report" / "report.html").read_text()


def reported(script, folder):
    """report.json of all runs of a workspace."""
    assert pareto_report.main([str(script.workspace / "baseline_logs"), "--output_dir", str(folder)]) == 0
    return json.loads((folder / "report.json").read_text())


def test_seeds_and_ranges_of_prompts_are_pooled_though_each_has_answers_of_its_own(script, tmp_path):
    for seed in (0, 1):
        rows = [row | {"response": f"w{seed} w{row['index']}"} for row in ROWS]
        file = written(tmp_path / f"seed_{seed}.jsonl", rows)
        assert script("answers_eval", file, "--method_name", "seeds", "--seed", seed) == 0
    for part in (0, 2):
        file = written(tmp_path / f"part_{part}.jsonl", ROWS[part : part + 2])
        assert script("answers_eval", file, "--method_name", "parts", "--start_index", part, "--num_prompts", 2) == 0
    report = reported(script, tmp_path / "report")
    runs = {run["method"]: run for run in report["sections"][0]["runs"]}
    assert report["left_out"] == []
    assert runs["seeds"]["seeds"] == [0, 1] and runs["parts"]["prompts"] == runs["seeds"]["prompts"] == 4


def test_of_answers_that_were_given_twice_the_later_ones_count(script, tmp_path):
    for word in ("w1", "w39"):
        file = written(tmp_path / f"{word}.jsonl", [row | {"response": word} for row in ROWS])
        assert script("answers_eval", file, "--method_name", "mine") == 0
    report = reported(script, tmp_path / "report")
    [run] = report["sections"][0]["runs"]
    assert run["rewards"]["low"]["mean"] == 0 and len(run["folders"]) == 1
    assert [text.split(": ")[1] for text in report["left_out"]] == ["the same run was made again later"]


def test_a_name_may_have_answers_with_and_without_weights(script, tmp_path):
    for place, weights in enumerate([[], ["--obj_weights", "0.5,0.5"], ["--obj_weights", "1"]]):
        file = written(tmp_path / f"{place}.jsonl", [row | {"response": f"w{place}"} for row in ROWS])
        assert script("answers_eval", file, "--method_name", "mine", *weights) == 0
    [section] = reported(script, tmp_path / "report")["sections"]
    assert sorted(len(run["weights"]) for run in section["runs"]) == [0, 1, 2]
    samples = (tmp_path / "report" / "report.md").read_text().split("### Samples")[1]
    assert "mine: low" in samples and "mine (low 0.5, even 0.5): low" in samples and "mine (low 1)" not in samples


def test_how_given_answers_were_decoded_is_not_on_record_and_no_difference(script, tmp_path):
    assert script("baseline_eval", "--num_trials", 1) == 0
    assert script("answers_eval", written(tmp_path / "answers.jsonl", ROWS), "--method_name", "mine") == 0
    assert reported(script, tmp_path / "report")["sections"][0]["notes"] == []


BAD = {
    "no prompt": ([{"response": "w1"}], "answer 1: it names no prompt"),
    "no response": ([{"index": 0}], "answer 1: no response that is a text"),
    "response of numbers": ([{"index": 0, "response": 3}], "no response that is a text"),
    "a half": ([{"index": 0.5, "response": "w1"}], "index is 0.5, not a whole number of at least 0"),
    "true": ([{"index": True, "response": "w1"}], "index is True, not a whole number"),
    "below 0": ([{"index": 0, "trial": -1, "response": "w1"}], "trial is -1, not a whole number of at least 0"),
    "another text": ([{"index": 0, "prompt": "x", "response": "w1"}], "another text than the row's"),
    "twice": ([*ROWS, ROWS[0] | {"trial": 0}], "a second answer of trial 0 to prompt 0"),
    "too few": (ROWS[:2], "no answer of trial 0 to prompt 2, and 1 more are missing"),
    "uneven": ([*ROWS, ROWS[0]], "no answer of trial 1 to prompt 1, and 2 more are missing"),
    "a time as the trial": ([*ROWS, ROWS[0] | {"trial": 1.7e9}], "prompt 0, and 6799999998 more are missing"),
    "none": ([{"prompt": "x", "response": "w1"}], "no answer to any of the 4 prompts"),
    "log of 2": ([ROWS[0] | {"log_prob": 0.7}], "log_prob is 0.7; the logarithm of a probability is at most 0"),
    "its end": ([*ROWS[:3], ROWS[3] | {"response": "w1 <eos>"}], "ends with a special token, 'w1 <eos>'"),
    "padding": ([*ROWS[:3], ROWS[3] | {"response": "w1 <eos> <pad>"}], "ends with a special token"),
    "nan": ([ROWS[0] | {"log_prob": float("nan")}], "log_prob is nan, not a finite number"),
    "some": ([ROWS[0] | {"log_prob": -1}, *ROWS[1:]], "log_prob for some answers only"),
    "times": ([ROWS[0] | {"seconds": 0.5}, *ROWS[1:]], "seconds for some answers only"),
    "time": ([ROWS[0] | {"seconds": -1}], "seconds is -1, below 0"),
    "finished": ([ROWS[0] | {"finished": "perhaps"}], "neither true nor false"),
    "surrogate": ([ROWS[0] | {"response": "\ud800"}], "not valid Unicode"),
    "too long": ([*ROWS[:3], ROWS[3] | {"response": "w1 " * 40}], "41 tokens, and with its prompt more than the 40"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_one_line_and_leaves_nothing(script, tmp_path, capsys, what):
    rows, said = BAD[what]
    file = written(tmp_path / "answers.jsonl", rows)
    assert status(script, "answers_eval", file, "--method_name", "mine") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert run_folders(script) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method_name", "mavis"], "one of the project's own methods"),
        (["--method_name", "Reference"], "one of the project's own methods"),
        (["--method_name", "a_best_of_n"], "one of the project's own methods"),
        (["--method_name", "Best_of_N"], "one of the project's own methods"),
        (["--method_name", "mavis_"], "one of the project's own methods"),  # a report's "mavis" too
        (["--method_name", "token__table"], "one of the project's own methods"),
        (["--method_name", "../up"], "make a name"),
        (["--method_name", ""], "make a name"),
        (["--method_name", "mine", "--obj_weights", "1", "--obj_weights", "0,1"], "give one --obj_weights"),
        (["--method_name", "mine", "--obj_weights", "0.5,0.4"], "sum to"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(script, tmp_path, capsys, argv, said):
    file = written(tmp_path / "answers.jsonl", ROWS)
    assert status(script, "answers_eval", file, *argv) == 2
    assert said in capsys.readouterr().err and run_folders(script) == []


def test_a_file_that_is_not_there_or_is_no_table_says_so(script, tmp_path, capsys):
    assert status(script, "answers_eval", tmp_path / "none.jsonl", "--method_name", "mine") == 1
    assert "no file" in capsys.readouterr().err
    for name, content in (("a.jsonl", b"\x00\xff"), ("a.jsonl.gz", b"no gzip"), ("a.txt", b"{}"), ("b.jsonl", b"[1")):
        (tmp_path / name).write_bytes(content)
        assert status(script, "answers_eval", tmp_path / name, "--method_name", "mine") == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_dry_run_says_what_it_would_load(script, tmp_path, capsys):
    file = written(tmp_path / "answers.jsonl", ROWS)
    assert script("answers_eval", file, "--method_name", "mine", "--dry_run") == 0
    assert "reference" in capsys.readouterr().out and run_folders(script) == []
