"""The report: every number can be recomputed from the run folders with pandas alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import pareto_report
from tests.runs_for_tests import LABEL, make_run, make_world
from utils.cli import DataError, UsageError
from utils.reports import at_equal_kl, fenced, load_runs, markdown_table, sections_of, series_names

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(workspace, report folder, report.json) of a made-up world."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder / "workspace", judge=True)
    make_run(folder / "workspace", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, finish=False)
    pareto_report.main([str(folder / "workspace"), "--output_dir", str(folder / "report")])
    return folder / "workspace", folder / "report", json.loads((folder / "report" / "report.json").read_text())


def by_hand(row):
    """A run's files, read without the project."""
    folder = Path(row["folder"])
    samples = pd.DataFrame([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()])
    rewards = pd.DataFrame(list(samples["rewards"])).assign(index=samples["index"])
    return yaml.safe_load((folder / "args.yaml").read_text()), pd.read_csv(folder / "rewards.csv"), samples, rewards


def test_every_number_of_the_table_comes_back_from_the_files(world):
    _, _, report = world
    (section,) = report["sections"]
    assert section["objectives"] == ["help", "harm"] and len(section["runs"]) == 1 + 6 * 5
    for row in section["runs"]:
        arguments, table, samples, rewards = by_hand(row)
        assert arguments["weights"] == row["weights"] and row["prompts"] == len(table)
        for objective in ("help", "harm", "humor"):
            mean = rewards.groupby("index")[objective].mean().mean()
            entry = row["rewards"][objective]
            assert entry["mean"] == pytest.approx(mean) == pytest.approx(table[objective].mean())
            assert entry["low"] < entry["mean"] < entry["high"]
            width = 2 * 1.96 * table[objective].std() / math.sqrt(len(table))
            assert entry["high"] - entry["low"] == pytest.approx(
                width, rel=0.15
            )  # the bootstrap's is near the normal one
        assert row["rewards"]["judge_help"]["mean"] == pytest.approx(table["judge_help"].mean())
        n = arguments["arguments"]["num_samples"]
        log_ratio = samples.groupby("index")["log_ratio"].mean()
        assert row["kl"] == pytest.approx(log_ratio.mean() + math.log(n) - (n - 1) / n)
        assert row["kl_error"] == pytest.approx(log_ratio.std() / math.sqrt(len(log_ratio)))
        assert row["kl_is_upper_bound"] == (n > 1)
        assert row["seconds_per_prompt"] == pytest.approx(samples["seconds"].mean())
        assert row["tokens"] == pytest.approx(samples["tokens"].mean())
        assert row["distinct"] == pytest.approx(samples["distinct"].mean())
        assert row["reference_log_prob"] == pytest.approx((samples["reference_log_prob"] / samples["tokens"]).mean())
        assert row["finished"] == pytest.approx(samples["finished"].mean())
        point = [row["rewards"][o]["mean"] for o in section["objectives"]]
        others = [[r["rewards"][o]["mean"] for o in section["objectives"]] for r in section["runs"] if r is not row]
        assert row["dominated"] == any(q[0] >= point[0] and q[1] >= point[1] for q in others)


def test_hypervolumes_come_back_from_the_files(world):
    moocore = pytest.importorskip("moocore")
    (section,) = world[2]["sections"]
    points = pd.DataFrame(
        [{"series": r["series"], **by_hand(r)[1][section["objectives"]].mean()} for r in section["runs"]]
    )
    means = points[section["objectives"]]
    expected = means.min() - 0.1 * (means.max() - means.min())
    assert section["hypervolume"]["reference_point"] == pytest.approx(list(expected))
    assert len(section["hypervolume"]["series"]) == 5
    for row in section["hypervolume"]["series"]:
        own = means[points["series"] == row["series"]].to_numpy()
        assert len(own) == row["points"] == 6
        assert row["hypervolume"] == pytest.approx(moocore.hypervolume(own, ref=list(expected), maximise=True))
        assert row["low"] < row["hypervolume"] < row["high"]


def test_paired_differences_come_back_from_the_files(world):
    (section,) = world[2]["sections"]
    reference = by_hand(next(r for r in section["runs"] if r["method"] == "reference"))[1]
    run = next(r for r in section["runs"] if r["series"] == "mavis, beta 4" and r["weights"] == {"help": 1.0})
    table = by_hand(run)[1]
    for score in ("help", "harm", "humor", "judge_help"):
        (row,) = [
            d
            for d in section["differences_to_reference"]
            if (d["series"], d["weights"], d["score"]) == (run["series"], run["weights"], score)
        ]
        difference = table[score] - reference[score]
        assert row["difference"] == pytest.approx(difference.mean()) and row["prompts"] == 20
        assert row["error"] == pytest.approx(difference.std() / math.sqrt(20))


def test_rewards_at_equal_kl_come_back_from_the_files(world):
    (section,) = world[2]["sections"]
    runs = {(r["series"], *r["weights"].values()): by_hand(r)[1] for r in section["runs"]}
    rows = [
        r
        for r in section["at_equal_kl"]
        if r["weights"] == {"help": 0.6, "harm": 0.4} and r["against"] == "token table"
    ]
    assert [r["series"] for r in rows] == ["mavis, beta 2", "mavis, beta 4"]
    for row in rows:
        curve = [runs["reference",], runs["token table, beta 2", 0.6, 0.4], runs["token table, beta 4", 0.6, 0.4]]
        own = runs[row["series"], 0.6, 0.4]
        x, y = zip(*[(t["log_ratio"].mean(), (0.6 * t["help"] + 0.4 * t["harm"]).mean()) for t in curve], strict=True)
        expected = (0.6 * own["help"] + 0.4 * own["harm"]).mean() - np.interp(own["log_ratio"].mean(), x, y)
        assert row["difference"] == pytest.approx(expected) and row["low"] < expected < row["high"]
    beyond = [r for r in section["at_equal_kl"] if r["against"] == "best of N" and r["series"] == "mavis, beta 4"]
    assert beyond and all(r["difference"] is None for r in beyond)  # best of 16 never gets that far: nothing is claimed


def test_the_markdown_embeds_figures_tables_and_unedited_samples(world):
    workspace, folder, report = world
    text = (folder / "report.md").read_text()
    assert text.startswith(f"# Pareto report: {LABEL}\n")
    assert report["sections"][0]["figures"] == ["anthropic_help_harm_front.png", "anthropic_help_harm_kl.png"]
    for name in report["sections"][0]["figures"]:
        assert f"![{name}]({name})" in text and (folder / name).read_bytes().startswith(b"\x89PNG")
    assert text.count("**Prompt ") == 3
    assert "````text\n```mavis``` | answer\n0 to 0\n````" in text
    assert "reference point (help " in text and "mavis, beta 4" in text and "judge_help" in text


def test_an_incomplete_run_is_named_and_left_out(world, capsys):
    workspace, folder, report = world
    assert len(report["left_out"]) == 1 and "mavis_0.5-0.5_" in report["left_out"][0]
    assert "incomplete" in (folder / "report.md").read_text()
    assert not any(r["beta"] == 1.0 for r in report["sections"][0]["runs"])


def test_the_report_needs_no_torch(tmp_path):
    folder = make_run(tmp_path / "w", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(3))
    code = (
        "import sys, pareto_report\n"
        "pareto_report.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--output_dir", str(tmp_path / "r")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mavis, beta 1" in done.stdout and str(tmp_path / "r" / "report.md") in done.stdout


def test_of_a_run_made_twice_the_newest_counts(tmp_path):
    first = make_run(tmp_path, "mavis", {"help": 1.0}, beta=1.0, prompts=range(3))
    second = make_run(tmp_path, "mavis", {"help": 1.0}, beta=1.0, prompts=range(3), rerun=True)
    runs, left_out = load_runs([tmp_path])
    assert [r.folder for r in runs] == [second] and str(first) in left_out[0]


def test_sections_are_the_pairs_that_weights_span(tmp_path):
    for weights in (
        {"help": 1.0},
        {"harm": 1.0},
        {"humor": 1.0},
        {"help": 0.5, "harm": 0.5},
        {"harm": 0.5, "humor": 0.5},
    ):
        make_run(tmp_path, "mavis", weights, beta=1.0, prompts=range(3))
    make_run(tmp_path, "reference", prompts=range(3))
    runs, _ = load_runs([tmp_path])
    assert [s.objectives for s in sections_of(runs)] == [("help", "harm"), ("harm", "humor")]
    assert [len(s.runs) for s in sections_of(runs)] == [4, 4]  # the reference, both ends, the middle
    (named,) = sections_of(runs, ["humor", "help"])
    assert named.objectives == ("humor", "help") and len(named.runs) == 3
    with pytest.raises(DataError, match="faithful"):
        sections_of(runs, ["help", "faithful"])


def test_three_objectives_have_a_section_with_an_exact_hypervolume(tmp_path):
    for seed, weights in enumerate(
        ({"help": 0.4, "harm": 0.3, "humor": 0.3}, {"help": 0.2, "harm": 0.2, "humor": 0.6})
    ):
        make_run(tmp_path / "w", "mavis", weights, beta=1.0, prompts=range(5), seed=0, gain=1 + seed)
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    (section,) = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
    assert section["objectives"] == ["help", "harm", "humor"] and section["figures"] == [
        "anthropic_help_harm_humor_kl.png"
    ]
    assert section["hypervolume"]["series"][0]["hypervolume"] > 0


def test_the_reference_alone_still_makes_a_report(tmp_path):
    make_run(tmp_path / "w", "reference", prompts=range(3), track=False)
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    assert len(json.loads((tmp_path / "r" / "report.json").read_text())["sections"]) == 3


def test_series_are_told_apart_by_whatever_differs(tmp_path):
    make_run(tmp_path, "mavis", {"help": 1.0}, beta=2.0, prompts=range(3))
    make_run(tmp_path, "mavis", {"harm": 1.0}, beta=2.0, prompts=range(3))
    runs, _ = load_runs([tmp_path])
    assert set(series_names(runs).values()) == {"mavis, beta 2"}
    make_run(tmp_path, "mavis", {"harm": 1.0}, beta=2.0, prompts=range(3), seed=5)
    make_run(tmp_path, "best_of_n", {"harm": 1.0}, num_samples=4, prompts=range(3))
    runs, _ = load_runs([tmp_path])
    assert set(series_names(runs).values()) == {"mavis, beta 2, seed 0", "mavis, beta 2, seed 5", "best of 4"}
    assert set(series_names(runs, families=True).values()) == {"mavis, seed 0", "mavis, seed 5", "best of N"}


def test_runs_on_other_prompts_are_noted_and_compared_on_the_shared_ones(tmp_path, capsys):
    make_run(tmp_path / "w", "reference", prompts=range(8))
    make_run(tmp_path / "w", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(4, 12))
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    (section,) = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
    assert section["notes"] == ["the runs differ in prompts: 0-7, 4-11"]
    assert section["hypervolume"]["prompts"] == 4 and section["differences_to_reference"][0]["prompts"] == 4
    assert "note: the runs differ in prompts" in capsys.readouterr().out


def test_two_configurations_are_never_in_one_section(tmp_path):
    make_run(tmp_path / "w", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(3), label="small")
    make_run(tmp_path / "v", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(4), label="large")
    assert pareto_report.main([str(tmp_path / "w"), str(tmp_path / "v"), "--output_dir", str(tmp_path / "r")]) == 0
    sections = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
    assert [s["configuration"] for s in sections] == ["small", "large"]
    assert len({f for s in sections for f in s["figures"]}) == 4


def test_runs_without_a_tracked_kl_take_no_part_in_what_needs_it(tmp_path):
    make_run(tmp_path, "reference", prompts=range(3))
    make_run(tmp_path, "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(3), track=False)
    make_run(tmp_path, "token_table", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(3))
    (section,) = sections_of(load_runs([tmp_path])[0])
    assert at_equal_kl(section) == []


def test_a_files_change_after_the_run_is_noticed(tmp_path):
    folder = make_run(tmp_path, "reference", prompts=range(3))
    text = (folder / "rewards.csv").read_text().splitlines()
    (folder / "rewards.csv").write_text("\n".join(text[:-1]) + "\n")
    with pytest.raises(DataError, match="changed after the run"):
        load_runs([tmp_path])


@pytest.mark.parametrize(
    "argv, error",
    [
        (["nowhere"], DataError),
        (["."], DataError),
        ([".", "--objectives", "help"], UsageError),
        ([".", "--reference_point", "0,0"], UsageError),
        ([".", "--objectives", "help,harm", "--reference_point", "0,x"], UsageError),
        ([".", "--objectives", "help,harm", "--reference_point", "0"], UsageError),
    ],
)
def test_what_cannot_be_reported_ends_in_one_line(tmp_path, monkeypatch, argv, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        pareto_report.main([*argv, "--output_dir", "r"])
    assert not (tmp_path / "r").exists()


def test_a_given_reference_point_is_used(tmp_path):
    make_run(tmp_path / "w", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(3))
    argv = [
        str(tmp_path / "w"),
        "--objectives",
        "harm,help",
        "--reference_point=-9,-8",
        "--output_dir",
        str(tmp_path / "r"),
    ]
    assert pareto_report.main(argv) == 0
    (section,) = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
    means = [section["runs"][0]["rewards"][o]["mean"] for o in ("harm", "help")]
    assert section["hypervolume"]["series"][0]["hypervolume"] == pytest.approx((means[0] + 9) * (means[1] + 8))


def test_text_and_tables_survive_markdown():
    assert fenced("a ``` b") == "````text\na ``` b\n````\n" and fenced("x").startswith("```text\n")
    assert "a\\|b" in markdown_table((["h"], [["a|b"]]))
