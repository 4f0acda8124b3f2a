"""The report: every number can be recomputed from the run folders with pandas alone."""

import base64
import functools
import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import pareto_report
from tests.runs_for_tests import LABEL, make_run, make_world
from utils.errors import DataError, UsageError
from utils.report_pages import Table, amount, fenced, markdown_table, shortened
from utils.report_points import load_points, series_names, spans
from utils.reports import at_equal_kl, between_methods, point_rows, sections_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(workspace, report folder, report.json) of a made-up world; one point has three seeds, another two parts."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder / "workspace", judge=True)
    make_run(folder / "workspace", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, finish=False)
    weights = {"help": 0.6, "harm": 0.4}
    shared = {"beta": 4.0, "gain": 0.4 * 4**0.8, "kl": 4.4, "judge": True}
    for seed in (1, 2):
        make_run(folder / "workspace", "mavis", weights, seed=seed, **shared)
    for part in (range(0, 12), range(12, 20)):
        make_run(folder / "workspace", "mavis", {"help": 0.5, "harm": 0.5}, prompts=part, **shared)
    pareto_report.main([str(folder / "workspace"), "--output_dir", str(folder / "report")])
    return folder / "workspace", folder / "report", json.loads((folder / "report" / "report.json").read_text())


# ------------------------------------------------------------------------------------ recomputed with pandas from files


def lines_of(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def by_hand(row):
    """A point's files, read without the project: (args.yaml of one, a row per prompt and seed, samples)."""
    return read_folders(tuple(row["folders"]))


@functools.cache
def read_folders(folders):
    arguments, tables, samples = [], [], []
    for folder in map(Path, folders):
        arguments.append(yaml.safe_load((folder / "args.yaml").read_text()))
        seed = arguments[-1]["arguments"]["seed"]
        tables.append(pd.read_csv(folder / "rewards.csv").assign(seed=seed))
        samples.append(pd.json_normalize(lines_of(folder)).assign(seed=seed))
    return arguments[0], pd.concat(tables), pd.concat(samples)


def per_prompt(row, column):
    """(prompts,) means over the seeds, from rewards.csv."""
    return by_hand(row)[1].groupby("index")[column].mean()


def one(rows, **wanted):
    (found,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return found


def test_every_number_of_the_table_comes_back_from_the_files(world):
    _, _, report = world
    (section,) = report["sections"]
    assert section["objectives"] == ["help", "harm"] and len(section["runs"]) == 1 + 6 * 5 + 1
    for row in section["runs"]:
        arguments, table, samples = by_hand(row)
        assert arguments["weights"] == row["weights"] and row["prompts"] == table["index"].nunique() == 20
        for objective in ("help", "harm", "humor"):
            mean = samples.groupby(["index", "seed"])[f"rewards.{objective}"].mean().groupby("index").mean()
            entry = row["rewards"][objective]
            assert entry["mean"] == pytest.approx(mean.mean()) == pytest.approx(per_prompt(row, objective).mean())
            assert entry["error"] == pytest.approx(mean.std() / math.sqrt(20))
            assert entry["low"] < entry["mean"] < entry["high"]
            # the bootstrap's width is near the normal one
            assert entry["high"] - entry["low"] == pytest.approx(2 * 1.96 * entry["error"], rel=0.15)
        assert row["rewards"]["judge_help"]["mean"] == pytest.approx(samples["extra.judge_help"].mean())
        n = arguments["arguments"]["num_samples"]
        log_ratio = samples.groupby("index")["log_ratio"].mean()
        assert row["kl"] == pytest.approx(log_ratio.mean() + math.log(n) - (n - 1) / n)
        assert row["kl_error"] == pytest.approx(log_ratio.std() / math.sqrt(20))
        assert row["kl_is_upper_bound"] == (n > 1)
        assert row["seconds_per_prompt"] == pytest.approx(samples["seconds"].mean())
        assert row["tokens"] == pytest.approx(samples["tokens"].mean())
        assert row["generated_tokens"] == pytest.approx(n * samples["tokens"].mean())
        for what in ("language_tokens", "value_tokens", "gflop"):
            assert row[what] == pytest.approx(samples[what].mean())
        assert row["distinct"] == pytest.approx(samples["distinct"].mean())
        assert row["reference_log_prob"] == pytest.approx((samples["reference_log_prob"] / samples["tokens"]).mean())
        assert row["finished"] == pytest.approx(samples["finished"].mean())

        def dominated(others, row=row):
            x, y = (row["rewards"][o]["mean"] for o in section["objectives"])
            points = [[r["rewards"][o]["mean"] for o in section["objectives"]] for r in others if r is not row]
            return any(a >= x and b >= y for a, b in points)

        assert row["dominated"] == dominated(section["runs"])
        own = [r for r in section["runs"] if r["series"] == row["series"]]
        assert row["dominated_in_series"] == dominated(own)


def test_seeds_are_pooled_by_prompt_and_their_spread_is_stated(world):
    workspace, folder, report = world
    row = one(report["sections"][0]["runs"], series="mavis, beta 4", weights={"help": 0.6, "harm": 0.4})
    assert row["seeds"] == [0, 1, 2] and len(row["folders"]) == 3
    table = by_hand(row)[1]
    for score in ("help", "harm", "judge_help"):
        means = table.groupby("seed")[score].mean()
        entry = row["rewards"][score]
        assert entry["seed_means"] == pytest.approx(list(means)) and entry["seed_sd"] == pytest.approx(means.std())
    assert row["kl_seed_sd"] == pytest.approx(table.groupby("seed")["log_ratio"].mean().std())
    line = f"| mavis, beta 4 | help 0.6, harm 0.4 | 0, 1, 2 | {row['rewards']['help']['seed_sd']:.3f} |"
    assert line in (folder / "report.md").read_text()
    assert "seeds: 0; 0-2" in report["sections"][0]["notes"][0]
    single = one(report["sections"][0]["runs"], series="mavis, beta 2", weights={"help": 0.6, "harm": 0.4})
    assert single["rewards"]["help"]["seed_sd"] is None


def test_parts_of_one_evaluation_are_one_point(world):
    row = one(world[2]["sections"][0]["runs"], series="mavis, beta 4", weights={"help": 0.5, "harm": 0.5})
    assert len(row["folders"]) == 2 and row["prompts"] == 20 and row["seeds"] == [0]
    assert row["rewards"]["help"]["mean"] == pytest.approx(per_prompt(row, "help").mean())
    assert spans([3, 4, 5, 9, 1]) == "1, 3-5, 9"


def test_parts_that_overlap_count_each_prompt_once_and_the_later_answers(tmp_path):
    first = make_run(tmp_path, "reference", prompts=range(8), trials=1)
    later = make_run(tmp_path, "reference", prompts=range(4, 12), trials=1)
    (point,), left_out = load_points([tmp_path])
    assert list(point.table.index) == list(range(12)) and "prompts 4-7 were answered again" in left_out[0]
    read = {f: pd.read_csv(f / "rewards.csv", index_col="index")["help"] for f in (first, later)}
    assert list(point.table["help"]) == [*read[first].loc[:3], *read[later]]
    answers = {s["index"]: s["rewards"]["help"] for s in lines_of(later)}
    assert {i: a[0]["rewards"]["help"] for i, a in point.samples.items() if i > 3} == answers


def test_runs_of_other_models_are_no_parts_of_a_point(tmp_path):
    shared = {"weights": {"help": 1.0}, "beta": 1.0}
    old = make_run(tmp_path, "mavis", prompts=range(5), determining={"checkpoints": "a", "prompts": "x"}, **shared)
    make_run(tmp_path, "mavis", prompts=range(5, 9), determining={"checkpoints": "b", "prompts": "y"}, **shared)
    make_run(tmp_path, "mavis", prompts=range(9, 12), determining={"checkpoints": "b", "prompts": "z"}, **shared)
    (point,), left_out = load_points([tmp_path])
    assert list(point.table.index) == list(range(5, 12)) and len(left_out) == 1 and str(old) in left_out[0]


def test_two_prompts_under_one_index_are_never_compared(tmp_path):
    make_run(tmp_path, "reference", prompts=range(3))
    make_run(tmp_path, "mavis", {"help": 1.0}, beta=1.0, prompts=range(3), ask="another question {}")
    with pytest.raises(DataError, match="different prompts under index 0"):
        load_points([tmp_path])


def test_splits_have_sections_of_their_own(tmp_path):
    for split, ask in (("test", "question {}"), ("train", "another question {}")):
        make_run(tmp_path, "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(3), split=split, ask=ask)
    assert [s.title for s in sections_of(load_points([tmp_path])[0])] == [
        "anthropic: help and harm", "anthropic (train): help and harm",
    ]  # fmt: skip


def brute_volume(points, reference):
    """Area that points dominate, strip by strip along the first objective."""
    xs = sorted({reference[0], *(x for x, _ in points)})
    tops = [
        (b - a, max((y for x, y in points if x >= b), default=reference[1])) for a, b in zip(xs, xs[1:], strict=False)
    ]
    return sum(width * (top - reference[1]) for width, top in tops)


def test_hypervolumes_come_back_from_the_files(world):
    (section,) = world[2]["sections"]
    points = pd.DataFrame(
        [{"series": r["series"], **{o: per_prompt(r, o).mean() for o in ("help", "harm")}} for r in section["runs"]]
    )
    means = points[["help", "harm"]]
    expected = means.min() - 0.1 * (means.max() - means.min())
    assert section["hypervolume"]["reference_point"] == pytest.approx(list(expected))
    assert f"(help {expected['help']:.4f}, harm {expected['harm']:.4f})" in (world[1] / "report.md").read_text()
    assert len(section["hypervolume"]["series"]) == 5
    volumes = {}
    for row in section["hypervolume"]["series"]:
        own = means[points["series"] == row["series"]].to_numpy()
        assert len(own) == row["points"] == 6 + (row["series"] == "mavis, beta 4")
        assert row["hypervolume"] == pytest.approx(brute_volume(own.tolist(), list(expected)))
        assert row["low"] < row["hypervolume"] < row["high"]
        volumes[row["series"]] = row
    for row in section["hypervolume"]["differences"]:
        a, b = volumes[row["a"]], volumes[row["b"]]
        assert row["difference"] == pytest.approx(a["hypervolume"] - b["hypervolume"])
        assert row["high"] - row["low"] < a["high"] - a["low"] + b["high"] - b["low"]  # pairing only helps here


def test_paired_differences_come_back_from_the_files(world):
    (section,) = world[2]["sections"]
    runs = {(r["series"], *r["weights"].items()): r for r in section["runs"]}
    checked = 0
    for row in [*section["differences_to_reference"], *section["differences"]]:
        weights, score = row["weights"], row["score"]
        a = runs[row["a"], *weights.items()]
        b = runs["reference",] if row["b"] == "reference" else runs[row["b"], *weights.items()]
        if score == "weighted reward":
            a, b = (sum(w * per_prompt(r, o) for o, w in weights.items()) for r in (a, b))
        else:
            a, b = per_prompt(a, score), per_prompt(b, score)
        d = a - b
        assert row["difference"] == pytest.approx(d.mean()) and row["prompts"] == len(d.dropna()) == 20
        assert row["error"] == pytest.approx(d.std() / math.sqrt(20))
        assert (row["wins"], row["ties"], row["losses"]) == ((d > 0).sum(), (d == 0).sum(), (d < 0).sum())
        assert row["low"] < row["difference"] < row["high"]
        checked += 1
    # 5 series at 6 weights and one more point, against the reference; 10 pairs of series at 6 weights; 5 scores each
    assert checked == (31 + 60) * 5


def test_rewards_at_equal_kl_come_back_from_the_files(world):
    (section,) = world[2]["sections"]
    runs = {(r["series"], *r["weights"].values()): r for r in section["runs"]}
    weights = {"help": 0.6, "harm": 0.4}

    def place(run):
        reward = (0.6 * per_prompt(run, "help") + 0.4 * per_prompt(run, "harm")).mean()
        return per_prompt(run, "log_ratio").mean(), reward

    for a, b in (("mavis", "token table"), ("token table", "mavis")):
        rows = [r for r in section["at_equal_kl"]
                if r["weights"] == weights and r["b"] == b and r["a"].startswith(a)]  # fmt: skip
        assert [r["a"] for r in rows] == [f"{a}, beta 2", f"{a}, beta 4"]
        curve = [place(runs["reference",]), *(place(runs[f"{b}, beta {beta}", 0.6, 0.4]) for beta in (2, 4))]
        x, y = zip(*curve, strict=True)
        for row in rows:
            kl, reward = place(runs[row["a"], 0.6, 0.4])
            if kl > max(x):
                assert row["difference"] is None and row["highest_kl"] == pytest.approx(max(x))
                continue
            expected = reward - np.interp(kl, x, y)
            assert row["difference"] == pytest.approx(expected) and row["low"] < expected < row["high"]
            assert row["left_kl"] == pytest.approx(max(v for v in x if v <= kl)) and row["bound"] == "exact"
    rows = [r for r in section["at_equal_kl"] if r["b"] == "best of N"]
    assert rows and all(r["bound"] == "at most" for r in rows)  # best of N's KL is at most what is drawn
    (row,) = [r for r in rows if r["a"] == "mavis, beta 2" and r["weights"] == weights]
    (x0, y0), (x1, y1) = place(runs["reference",]), place(runs["best of 16", 0.6, 0.4])
    kl, reward = place(runs["mavis, beta 2", 0.6, 0.4])
    expected = reward - np.interp(kl, [x0, x1 + math.log(16) - 15 / 16], [y0, y1])
    assert row["difference"] == pytest.approx(expected) and row["low"] < expected < row["high"]
    # best of 16 never gets as far as beta 4: nothing is claimed
    assert all(r["difference"] is None for r in rows if r["a"] == "mavis, beta 4")


def test_the_kls_of_an_equal_kl_row_are_those_of_the_prompts_that_it_compares(tmp_path):
    weights = {"help": 0.5, "harm": 0.5}
    make_run(tmp_path, "mavis", weights, beta=2.0, kl=2.0, prompts=range(20))
    for beta, kl in ((1.0, 1.0), (4.0, 3.0)):
        make_run(tmp_path, "token_table", weights, beta=beta, kl=kl, prompts=range(6))
    pareto_report.main([str(tmp_path), "--output_dir", str(tmp_path / "r")])
    section = json.loads((tmp_path / "r" / "report.json").read_text())["sections"][0]
    [row] = [r for r in section["at_equal_kl"] if r["a"] == "mavis, beta 2"]
    [run] = [r for r in section["runs"] if r["series"] == "mavis, beta 2"]
    of_six = per_prompt(run, "log_ratio").loc[range(6)].mean()
    assert row["prompts"] == 6 and row["kl"] == pytest.approx(of_six) and of_six != pytest.approx(run["kl"])
    assert row["lowest_kl"] <= row["left_kl"] <= row["kl"] <= row["right_kl"] <= row["highest_kl"]


def test_the_exact_kl_stands_beside_the_estimate_where_it_is_known(tmp_path):
    make_run(tmp_path, "mavis", {"help": 0.5, "harm": 0.5}, beta=2.0, kl=2.0)
    make_run(tmp_path, "mod", {"help": 0.5, "harm": 0.5}, kl=1.0)
    pareto_report.main([str(tmp_path), "--output_dir", str(tmp_path / "r")])
    rows = {r["method"]: r for r in json.loads((tmp_path / "r" / "report.json").read_text())["sections"][0]["runs"]}
    exact = 2.0 + np.mean([0.01 * (i % 7) for i in range(20)])
    assert rows["mavis"]["kl_exact"][0] == pytest.approx(exact) and rows["mavis"]["kl_top_k"][0] == pytest.approx(
        exact - 0.4
    )
    assert rows["mod"]["kl_exact"] is None and rows["mod"]["kl"] == pytest.approx(1.0, abs=0.3)
    for page in ("report.md", "report.html"):
        text = (tmp_path / "r" / page).read_text()
        assert text.count("KL in three conventions") == 1 and f"{exact:.2f} +- " in text


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


# ----------------------------------------------------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """What a browser would see: tags, texts by the tag that holds them, and everything that is asked for by address."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.texts, self.links, self.scripts, self.handlers = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "img", "source", "link", "br"):
            self.stack.append((tag, attributes.get("class", "")))
        self.links += [attributes[k] for k in ("src", "srcset", "href", "action", "data") if attributes.get(k)]
        self.handlers += [k for k in attributes if k.startswith("on")]

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, tag

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] == "script":
            self.scripts.append(data)
        elif self.stack:
            self.texts.append((self.stack[-1][1], data))


def test_the_page_needs_nothing_but_itself(world):
    text = (world[1] / "report.html").read_text()
    page = Page(text)
    assert not page.stack and page.tags.count("script") == 1 and "link" not in page.tags and "iframe" not in page.tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert len([link for link in page.links if link.startswith("data:")]) == 4  # two figures, light and dark
    for link in page.links:
        assert link.startswith("#") or base64.b64decode(link.partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "viewport" in text


def test_the_pages_policy_lets_its_own_script_run_and_no_other(world):
    import hashlib

    text = (world[1] / "report.html").read_text()
    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed


def test_the_page_shows_answers_by_weight_with_their_figures(world):
    text = (world[1] / "report.html").read_text()
    first = text[text.index('class="prompt"') : text.index('class="prompt"', text.index('class="prompt"') + 1)]
    rows = re.findall(r"<h4>(.*?)</h4>", first)
    assert rows == ["without weights", "mavis, beta 2", "mavis, beta 4", "best of 16", "token table, beta 2",
                    "token table, beta 4"]  # fmt: skip
    row = first[first.index("<h4>mavis, beta 4") : first.index("<h4>best of 16")]
    titles = re.findall(r'--at: (\d)">\s*<strong>(.*?)</strong>', row)
    assert [t for _, t in titles] == ["help 1", "help 0.8, harm 0.2", "help 0.6, harm 0.4", "help 0.5, harm 0.5",
                                      "help 0.4, harm 0.6", "help 0.2, harm 0.8", "harm 1"]  # fmt: skip
    assert [int(n) for n, _ in titles] == [1, 2, 3, 4, 5, 6, 7]
    assert row.count("seed 2, trial 1") == 1  # the other seeds' and trials' answers are folded away
    sample = lines_of(
        one(world[2]["sections"][0]["runs"], series="mavis, beta 4", weights={"help": 1.0})["folders"][0]
    )[0]
    assert f"help <b>{sample['rewards']['help']:.2f}</b>" in row and f"log-ratio {sample['log_ratio']:.1f}" in row
    assert text.count('class="prompt"') == 20


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} {{0}} & \"'</div></details>`|$\\x$"
)


def test_hostile_text_stays_text(tmp_path):
    """In answers, prompts and names; a browser's own parser would see no further tag."""
    shared = {"prompts": range(3), "ask": HOSTILE.replace("{", "{{").replace("}", "}}"), "label": HOSTILE}
    answer = HOSTILE.replace("{", "{{").replace("}", "}}")
    make_run(tmp_path / "w", "reference", answer=answer, **shared)
    make_run(tmp_path / "w", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, answer=answer, **shared)
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    page = Page((tmp_path / "r" / "report.html").read_text())
    assert page.tags.count("script") == 1 and page.tags.count("img") == 2 and not page.handlers and not page.stack
    assert "alert" not in "".join(page.scripts)
    joined = "".join(data for _, data in page.texts)
    assert joined.count(HOSTILE) >= 3 * (1 + 2 * 2)  # each prompt, and two answers of two points
    assert json.loads((tmp_path / "r" / "report.json").read_text())["sections"][0]["configuration"] == HOSTILE


def test_the_page_shows_as_many_prompts_as_are_asked_for(tmp_path):
    make_run(tmp_path / "w", "reference", prompts=range(5))
    for count in (2, 0):
        pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r"), "--prompts", str(count)])
        assert (tmp_path / "r" / "report.html").read_text().count('class="prompt"') == 3 * count  # three sections
    assert "first 2 of 5 prompts" not in (tmp_path / "r" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------- what stands together


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
    (point,), left_out = load_points([tmp_path])
    assert [r.folder for r in point.runs] == [second] and str(first) in left_out[0] and "again later" in left_out[0]


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
    runs, _ = load_points([tmp_path])
    assert [s.objectives for s in sections_of(runs)] == [("help", "harm"), ("harm", "humor")]
    assert [len(s.points) for s in sections_of(runs)] == [4, 4]  # the reference, both ends, the middle
    (named,) = sections_of(runs, ["humor", "help"])
    assert named.objectives == ("humor", "help") and len(named.points) == 3
    with pytest.raises(DataError, match="faithful"):
        sections_of(runs, ["help", "faithful"])


def test_three_objectives_have_a_section_with_an_exact_hypervolume(tmp_path):
    for seed, weights in enumerate(
        ({"help": 0.4, "harm": 0.3, "humor": 0.3}, {"help": 0.2, "harm": 0.2, "humor": 0.6})
    ):
        make_run(tmp_path / "w", "mavis", weights, beta=1.0, prompts=range(5), seed=0, gain=1 + seed)
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    (section,) = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
    assert section["objectives"] == ["help", "harm", "humor"]
    pairs = [f"anthropic_help_harm_humor_{pair}_front.png" for pair in ("help_harm", "help_humor", "harm_humor")]
    assert section["figures"] == [*pairs, "anthropic_help_harm_humor_kl.png"]
    assert section["hypervolume"]["series"][0]["hypervolume"] > 0


def test_the_reference_alone_still_makes_a_report(tmp_path):
    make_run(tmp_path / "w", "reference", prompts=range(3), track=False)
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    assert len(json.loads((tmp_path / "r" / "report.json").read_text())["sections"]) == 3


def test_series_are_told_apart_by_whatever_differs(tmp_path):
    make_run(tmp_path, "mavis", {"help": 1.0}, beta=2.0, prompts=range(3))
    make_run(tmp_path, "mavis", {"harm": 1.0}, beta=2.0, prompts=range(3))
    runs, _ = load_points([tmp_path])
    assert set(series_names(runs).values()) == {"mavis, beta 2"}
    make_run(tmp_path, "mavis", {"harm": 1.0}, beta=2.0, prompts=range(3), seed=5)  # a seed is no setting
    make_run(tmp_path, "mavis", {"harm": 1.0}, beta=2.0, prompts=range(3), topk=9)
    make_run(tmp_path, "best_of_n", {"harm": 1.0}, num_samples=4, prompts=range(3))
    runs, _ = load_points([tmp_path])
    assert set(series_names(runs).values()) == {"mavis, beta 2, topk 15", "mavis, beta 2, topk 9", "best of 4"}
    assert set(series_names(runs, families=True).values()) == {"mavis, topk 15", "mavis, topk 9", "best of N"}


def test_single_policies_are_the_ends_of_every_front_that_is_mixed_from_them(tmp_path):
    make_run(tmp_path, "reference", kl=0.6)
    for objective in ("help", "harm"):
        make_run(tmp_path, "single_policy", {objective: 1.0}, gain=2.0, kl=3.0)
        make_run(tmp_path, "single_policy_best_of_n", {objective: 1.0}, num_samples=4, gain=2.5, kl=3.0)

    def report():
        pareto_report.main([str(tmp_path), "--output_dir", str(tmp_path / "r")])
        return json.loads((tmp_path / "r" / "report.json").read_text())["sections"][0]

    alone = report()
    assert {r["series"] for r in alone["runs"]} == {"reference", "single policy", "single policy, best of 4"}
    for method in ("mod", "rewarded_soup"):
        make_run(tmp_path, method, {"help": 0.5, "harm": 0.5}, gain=1.5, kl=2.0)
    found = report()
    weights = {}
    for row in found["runs"]:
        weights.setdefault(row["series"], []).append(row["weights"].get("help", 0.0))
    ends = {"mod": [1.0, 0.5, 0.0], "rewarded soup": [1.0, 0.5, 0.0], "single policy, best of 4": [1.0, 0.0]}
    assert weights == {"reference": [0.0]} | ends
    assert {r["series"]: r["points"] for r in found["hypervolume"]["series"]} == {k: len(v) for k, v in ends.items()}
    between = [r["weights"] for r in found["differences"] if {r["a"], r["b"]} == {"mod", "rewarded soup"}]
    assert between and all(w == {"help": 0.5, "harm": 0.5} for w in between)  # an end is not compared with itself
    make_run(tmp_path, "mod", {"help": 1.0}, gain=1.9, kl=3.1)  # of an earlier version: its own end stays the only one
    mod = [r for r in report()["runs"] if r["series"] == "mod"]
    assert [r["weights"].get("help", 0.0) for r in mod] == [1.0, 0.5, 0.0] and mod[0]["kl"] > 3.05


def test_beam_searches_that_draw_unequally_are_two_series(tmp_path):
    """`--num_samples` of mavis_bs.py says what each beam draws; the arguments' number is candidates per answer, 1."""
    for draws in (1, 2):
        beams = {"Q": 4, "N": 4, "num_samples": draws}
        make_run(tmp_path, "mavis_bs", {"help": 0.5, "harm": 0.5}, beta=4.0, more_series=beams, prompts=range(3))
    points, _ = load_points([tmp_path])
    names = sorted(series_names(points).values())
    assert names == ["mavis bs, beta 4, draws 1", "mavis bs, beta 4, draws 2"]
    assert set(series_names(points[:1]).values()) == {"mavis bs, beta 4"}


def test_runs_on_other_prompts_are_noted_and_compared_on_the_shared_ones(tmp_path, capsys):
    make_run(tmp_path / "w", "reference", prompts=range(8))
    make_run(tmp_path / "w", "mavis", {"help": 0.5, "harm": 0.5}, beta=1.0, prompts=range(4, 12))
    assert pareto_report.main([str(tmp_path / "w"), "--output_dir", str(tmp_path / "r")]) == 0
    (section,) = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
    assert section["notes"] == ["the runs differ in prompts: 0-7; 4-11"]
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
    (section,) = sections_of(load_points([tmp_path])[0])
    assert at_equal_kl(section) == []


def test_a_files_change_after_the_run_is_noticed(tmp_path):
    folder = make_run(tmp_path, "reference", prompts=range(3))
    text = (folder / "rewards.csv").read_text().splitlines()
    (folder / "rewards.csv").write_text("\n".join(text[:-1]) + "\n")
    with pytest.raises(DataError, match="changed after the run"):
        load_points([tmp_path])


@pytest.mark.parametrize(
    "argv, error",
    [
        (["nowhere"], DataError),
        (["."], DataError),
        ([".", "--objectives", "help"], UsageError),
        ([".", "--reference_point", "0,0"], UsageError),
        ([".", "--objectives", "help,harm", "--reference_point", "0,x"], UsageError),
        ([".", "--objectives", "help,harm", "--reference_point", "0"], UsageError),
        ([".", "--prompts", "-1"], UsageError),
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
    assert "a\\|b" in markdown_table(Table("t", "", ["h"], [["a|b"]]))


def test_a_long_table_is_cut_and_says_so():
    body = [["a", "b", score] for score in ("help", "weighted reward") for _ in range(7)]
    table = Table("t", "Note.", ["method", "less", "reward"], body)
    assert shortened(table, 14) is table
    short = shortened(table, 10)
    assert short.body == body[7:] and short.note == (
        "Note. Shown are 7 of 14 rows; report.html and report.json have all."
    )
    assert len(shortened(table, 5).body) == 5


def test_named_methods_are_compared_and_no_others(tmp_path, capsys):
    weights = {"help": 0.5, "harm": 0.5}
    make_run(tmp_path / "w", "reference", prompts=range(6))
    for beta in (1.0, 2.0):
        make_run(tmp_path / "w", "mavis", weights, beta=beta, prompts=range(6))
    make_run(tmp_path / "w", "token_table", weights, beta=1.0, prompts=range(6))
    make_run(tmp_path / "w", "token_table", {"help": 1.0}, beta=1.0, prompts=range(6))
    make_run(tmp_path / "w", "prompt_words", beta=1.0, prompts=range(6))

    def pairs(*compare):
        argv = [str(tmp_path / "w"), "--output_dir", str(tmp_path / "r"), *compare]
        pareto_report.main(argv)
        (section,) = json.loads((tmp_path / "r" / "report.json").read_text())["sections"]
        rows = [d for d in section["differences"] if d["score"] == "weighted reward"]
        return [(d["a"], d["b"], *d["weights"].values()) for d in rows]

    table, words = "token table, beta 1", "prompt words, beta 1"
    assert pairs("--compare", "token table", "mavis") == [
        (table, "mavis, beta 1", 0.5, 0.5), (table, "mavis, beta 2", 0.5, 0.5),
    ]  # fmt: skip
    assert pairs("--compare", "mavis, beta 2", "reference", "--compare", "token_table", "prompt_words") == [
        ("mavis, beta 2", "reference", 0.5, 0.5), (table, words, 1.0), (table, words, 0.5, 0.5),
    ]  # fmt: skip
    assert len(pairs()) == 3 + 4  # pairs at equal weights, and the words, which take none, against everything
    with pytest.raises(UsageError, match="'mavvis' names no method"):
        pairs("--compare", "mavvis", "reference")


def test_methods_without_weights_are_in_the_figures_and_compared_at_every_weights(tmp_path):
    make_run(tmp_path, "reference", kl=0.1, prompts=range(6))
    make_run(tmp_path, "prompt_words", beta=1.0, kl=2.0, prompts=range(6))
    for weights in ({"help": 1.0}, {"help": 0.5, "harm": 0.5}):
        make_run(tmp_path, "mavis", weights, beta=1.0, kl=1.0, prompts=range(6))
    (section,) = sections_of(load_points([tmp_path])[0])
    assert list(section.series) == ["mavis, beta 1", "prompt words, beta 1"]
    rows = at_equal_kl(section)
    assert [(r["a"], r["b"], len(r["weights"])) for r in rows if math.isfinite(r["difference"])] == [
        ("mavis, beta 1", "prompt words", 1), ("mavis, beta 1", "prompt words", 2),
    ]  # fmt: skip
    assert len(rows) == 4 and {len(r["weights"]) for r in between_methods(section)} == {1, 2}


def test_seeds_on_unequal_prompts_are_pooled_and_their_spread_is_over_the_shared_ones(tmp_path):
    folders = [make_run(tmp_path, "reference", prompts=range(n), seed=s) for s, n in ((0, 8), (1, 6))]
    (point,), _ = load_points([tmp_path])
    tables = [pd.read_csv(f / "rewards.csv", index_col="index")["help"] for f in folders]
    assert point.table["help"].mean() == pytest.approx(pd.concat(tables).groupby("index").mean().mean())
    assert point.over_seeds("help")[0] == pytest.approx([tables[0].loc[:5].mean(), tables[1].mean()])
    (row,) = point_rows(sections_of([point])[0])
    assert row["seeds"] == [0, 1] and row["prompts"] == 8


def test_a_price_is_shown_to_three_digits_however_small_it_is():
    shown = {0.000412: "0.000412", 1.2264: "1.23", 73.44: "73.4", 203.6: "204", 999.7: "1000", math.nan: "-"}
    assert [amount(price) for price in shown] == list(shown.values())


def test_generated_tokens_are_in_both_files_so_that_a_change_of_one_shows(tmp_path):
    folder = make_run(tmp_path, "reference")
    csv, samples = folder / "rewards.csv", folder / "samples.jsonl"
    whole = samples.read_text()
    before = load_points([folder])[0][0]
    samples.write_text(re.sub(r'"generated_tokens": \d+', '"generated_tokens": 1', whole, count=1))
    with pytest.raises(DataError, match="does not hold the means"):
        load_points([folder])
    samples.write_text(whole)
    table = pd.read_csv(csv, index_col="index")
    table.drop(columns="generated_tokens").to_csv(csv)  # as an earlier version wrote it
    [again], _ = load_points([folder])
    assert again.table.equals(before.table) and again.mean("generated_tokens") > 0
