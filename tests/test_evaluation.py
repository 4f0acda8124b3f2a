"""One evaluation loop for every method, run on tiny random models from prompts to the run folder."""

import io
import json
import math
import sys

import numpy as np
import pytest

from tests.toy_world import answers, run_folders, status
from utils.answers import evaluate, pick
from utils.completions import Completion
from utils.runs import RunSpec, open_run, read_arguments, read_samples

# ------------------------------------------------------------------------------------------------------- the real thing


def test_mavis_leaves_a_complete_folder_and_is_not_repeated(script, capsys):
    assert script("mavis", "--obj_weights", "0.3,0.7", "--beta", 3) == 0
    (folder,) = run_folders(script)
    assert folder.parent == script.workspace / "mavis_logs" / "toy" / "low_even"
    assert sorted(f.name for f in folder.iterdir()) == ["args.yaml", "rewards.csv", "samples.jsonl", "summary.txt"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"run folder: {folder}") and printed.endswith((folder / "summary.txt").read_text())
    samples = read_samples(folder)
    assert [(s["index"], s["trial"]) for s in samples] == [(i, t) for i in range(4) for t in range(2)]
    assert all(list(s["rewards"]) == ["low", "even", "length"] for s in samples)  # also those without a weight
    assert all(1 <= s["tokens"] <= 6 and s["log_ratio"] == pytest.approx(s["log_ratio"]) for s in samples)
    before = (folder / "samples.jsonl").read_bytes()
    assert script("mavis", "--obj_weights", "0.3,0.7", "--beta", 3, "--batch_size", 2) == 0
    assert "complete and is not repeated" in capsys.readouterr().out
    assert run_folders(script) == [folder] and (folder / "samples.jsonl").read_bytes() == before
    assert script("mavis", "--obj_weights", "0.3,0.7", "--beta", 3, "--rerun") == 0
    assert len(run_folders(script)) == 2


def test_an_interrupted_run_ends_as_an_uninterrupted_one_without_computing_a_row_twice(script, capsys):
    command = ("mavis", "--obj_weights", "0.5,0.5", "--beta", 2, "--num_prompts", 5, "--batch_size", 1)
    script(*command)
    (folder,) = run_folders(script)
    whole = answers(folder)
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    kept = lines[:3]
    (folder / "samples.jsonl").write_bytes(b"".join(kept) + lines[3][:40])
    for name in ("summary.txt", "rewards.csv"):
        (folder / name).unlink()
    script(*command)
    assert "going on after 3 of 10 answers" in capsys.readouterr().out
    assert run_folders(script) == [folder] and answers(folder) == whole
    assert (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)[:3] == kept


def test_batch_size_changes_no_answer(script):
    script("mavis", "--obj_weights", "0.5,0.5", "--beta", 2, "--batch_size", 1)
    script("mavis", "--obj_weights", "0.5,0.5", "--beta", 2, "--batch_size", 8, "--rerun")
    first, second = run_folders(script)
    assert answers(first) == answers(second)  # float64, so no rounding can flip a token


def test_beta_0_with_a_value_model_gives_the_references_answers(script):
    """The same seed gives the same random numbers to every method."""
    script("mavis", "--obj_weights", "1", "--beta", 0)
    script("baseline_eval")
    by_method = {read_arguments(f)["method"]: answers(f) for f in run_folders(script)}
    assert by_method["mavis"] == by_method["reference"]


def test_no_value_model_is_loaded_for_a_weight_of_0(script):
    script("mavis", "--obj_weights", "1,0,0", "--value_model_iter", "0,,9", "--beta", 1)  # there is no iter_9
    (folder,) = run_folders(script)
    assert list(read_arguments(folder)["setting"]["checkpoints"]) == ["reference", "value model of low"]


def test_best_of_n_reports_the_sample_with_the_highest_weighted_reward(script):
    script("baseline_eval", "--num_samples", 8, "--obj_weights", "0.25,,0.75")
    script("baseline_eval")
    best, plain = (f for f in run_folders(script))
    assert "baseline_bon_logs" in str(best) and "low_length" in str(best) and "baseline_logs" in str(plain)
    arguments = read_arguments(best)
    assert arguments["series"] == {"num_samples": 8} and arguments["kl_added"] == pytest.approx(math.log(8) - 7 / 8)
    samples = read_samples(best)
    assert all(s["num_candidates"] == 8 and s["generated_tokens"] >= 8 for s in samples)
    weighted = [
        np.mean([0.25 * s["rewards"]["low"] + 0.75 * s["rewards"]["length"] for s in read_samples(f)])
        for f in (best, plain)
    ]
    assert weighted[0] > weighted[1]
    assert "KL                      <= " in (best / "summary.txt").read_text()


def test_a_token_table_steers_towards_its_tokens_alone_and_as_best_of_n(script):
    from utils.token_table import save_token_table

    tables = script.workspace / "token_tables"
    save_token_table(tables / "low.safetensors", np.array([0.0] * 3 + [1.0] * 20 + [0.0] * 20))  # w0 to w19
    weights = ("--obj_weights", "1", "--num_trials", 4)
    script("baseline_eval", "--token_table", "--beta", 6, *weights)
    script("baseline_eval", "--token_table", tables, "--beta", 6, "--num_samples", 2, *weights)
    script("baseline_eval", "--num_trials", 4)
    low, kl = {}, {}
    for folder in run_folders(script):
        method, samples = read_arguments(folder)["method"], read_samples(folder)
        low[method] = np.mean([s["rewards"]["low"] for s in samples])
        kl[method] = np.mean([s["log_ratio"] for s in samples])
    assert set(low) == {"token_table", "token_table_best_of_n", "reference"}
    assert low["token_table_best_of_n"] >= low["token_table"] > low["reference"] + 0.2  # e^6 to one, against even odds
    assert kl["token_table"] > kl["reference"] > 0  # the top-k cut alone costs something


def test_beam_search_reports_the_best_of_its_texts_by_weighted_reward(script, monkeypatch):
    from utils import beams

    found, search = [], beams.beam_search
    monkeypatch.setattr(beams, "beam_search", lambda *a, **kw: found.extend(search(*a, **kw)) or found)
    arguments = ("--obj_weights", "0.3,0.7", "--beta", 3, "--num_trials", 1)
    assert script("mavis_bs", *arguments, "--Q", 3, "--N", 2, "--num_samples", 2) == 0
    (folder,) = run_folders(script)
    assert folder.parent == script.workspace / "mavis_bs_logs" / "toy" / "low_even"
    samples = read_samples(folder)
    assert len(samples) == len(found) == 4
    for sample, texts in zip(samples, found, strict=True):
        assert sample["num_candidates"] == len(texts) == 2 and "log_ratio" not in sample
        assert sample["tokens"] in [len(text.token_ids) for text in texts]
    assert status(script, "mavis_bs", *arguments, "--Q", 1) == 2
    assert status(script, "mavis_bs", *arguments, "--Q", 2, "--N", 0) == 2


def test_the_exact_kl_of_the_steps_is_kept_of_single_answers_of_a_tilted_reference(script, monkeypatch):
    """As decoding gave it; of the best of several, and where nothing is tracked, there is none."""
    from utils import decoding

    made, original = [], decoding._finish

    def noted(*arguments):
        results = original(*arguments)
        made.extend(completion for _, completion, _ in results)
        return results

    monkeypatch.setattr(decoding, "_finish", noted)
    script("mavis", "--obj_weights", "1", "--beta", 4)
    [folder] = run_folders(script)
    kept = sorted((s["kl_exact"], s["kl_top_k"]) for s in read_samples(folder))
    assert kept == sorted((round(c.kl_exact, 9), round(c.kl_top_k, 9)) for c in made)
    assert all(0 <= cut < exact for exact, cut in kept)
    summary = (folder / "summary.txt").read_text()
    mean = np.mean([exact for exact, _ in kept])
    assert f"KL, exact in each step  {mean:.4f} nats" in summary and "to the top k alone" in summary
    script("mavis", "--obj_weights", "1", "--beta", 4, "--no-track_KL")
    script("baseline_eval", "--num_samples", 2, "--obj_weights", "1")
    others = [f for f in run_folders(script) if f != folder]
    assert len(others) == 2 and not any("kl_exact" in s for f in others for s in read_samples(f))


def test_the_log_ratio_is_left_out_where_it_is_not_tracked(script):
    script("baseline_eval", "--no-track_KL")
    (folder,) = run_folders(script)
    assert "log_ratio" not in (folder / "rewards.csv").read_text()
    assert not any("log_ratio" in s for s in read_samples(folder))
    assert "KL" not in (folder / "summary.txt").read_text()


def test_answers_to_the_users_own_texts_leave_no_folder(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w7 w8\n"))
    assert script("mavis", "--obj_weights", "0.5,0.5", "--beta", 2, "--prompt", "w1 w2", "--prompt", "-") == 0
    printed = capsys.readouterr().out
    assert "> w1 w2\n" in printed and "> w7 w8\n" in printed
    assert printed.count("log-ratio") == 2 and printed.count("[low ") == 2
    assert run_folders(script) == [] and not (script.workspace / "mavis_logs").exists()


def test_a_dry_run_loads_nothing_and_makes_nothing(script, capsys):
    assert script("mavis", "--obj_weights", "0.5,0.5", "--beta", 2, "--value_model_iter", "3", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "iter_3/low" in printed and "made by: python train_value_model.py" in printed and "base_model" in printed
    assert sorted(f.name for f in script.workspace.iterdir()) == ["base_model", "datasets", "value_models"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--beta", "nan"], "--beta"),
        (["--beta", "inf"], "--beta"),
        (["--beta", "-1"], "--beta"),
        (["--beta", "1", "--obj_weights", "0.5,0.6"], "sum to"),
        (["--beta", "1", "--topk", "0"], "--topk"),
        (["--beta", "1", "--temperature", "0"], "--temperature"),
        (["--beta", "1", "--num_trials", "0"], "--num_trials"),
        (["--beta", "1", "--value_model_iter", "0,x"], "--value_model_iter"),
        (["--beta", "1", "--data_split", "tset"], "did you mean 'test'"),
        (["--beta", "1", "--prompt", "  "], "empty"),
        ([], "--beta"),
    ],
)
def test_a_command_that_cannot_be_meant_exits_2_before_any_folder(script, capsys, argv, said):
    if "--obj_weights" not in argv:
        argv = [*argv, "--obj_weights", "0.5,0.5"]
    assert status(script, "mavis", *argv) == 2
    assert said in capsys.readouterr().err
    assert not (script.workspace / "mavis_logs").exists()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--obj_weights", "0.5,0.5"], "takes no --obj_weights"),
        (["--num_samples", "4"], "needs --obj_weights"),
        (["--num_samples", "0"], "--num_samples"),
        (["--beta", "2"], "--beta has no meaning"),
        (["--token_table", "t", "--obj_weights", "1"], "needs --beta"),
        (["--token_table", "t", "--beta", "1"], "needs --obj_weights"),
    ],
)
def test_baselines_refuse_flags_that_do_not_go_together(script, capsys, argv, said):
    assert status(script, "baseline_eval", *argv) == 2
    assert said in capsys.readouterr().err and run_folders(script) == []


@pytest.mark.parametrize(
    "name, argv, said",
    [
        (
            "mavis",
            ["--obj_weights", "0.5,0.5", "--beta", "1", "--value_model_iter", "2"],
            "iter_2/low; make it with: python train_value_model.py",
        ),
        ("mavis", ["--obj_weights", ",,1", "--beta", "1"], "iter_0/length"),
        ("baseline_eval", ["--token_table", "nowhere", "--beta", "1", "--obj_weights", "1"], "fit_token_table.py"),
        ("baseline_eval", ["--token_table", "--beta", "1", "--obj_weights", "1"], "token_tables/low.safetensors"),
        ("baseline_eval", ["--num_prompts", "6"], "has 5 prompts"),
        ("baseline_eval", ["--start_index", "5"], "has 5 prompts"),
        ("baseline_eval", ["--max_new_tokens", "40"], "leaves no room"),
    ],
)
def test_what_is_missing_exits_1_and_says_where_it_was_looked_for(script, capsys, name, argv, said):
    assert status(script, name, *argv) == 1
    assert said in capsys.readouterr().err


def test_a_default_number_of_prompts_may_reach_past_the_end_of_a_short_split(script):
    script("baseline_eval", "--start_index", 3, "--num_trials", 1)
    (folder,) = run_folders(script)
    assert [s["index"] for s in read_samples(folder)] == [3, 4]


def test_a_prompts_answer_depends_on_its_index_and_not_on_the_range(script):
    script("baseline_eval", "--start_index", 3, "--num_prompts", 1)
    script("baseline_eval", "--num_prompts", 5)
    part, whole = sorted(map(answers, run_folders(script)), key=len)
    assert part == [a for a in whole if a["index"] == 3]


def test_a_retrained_value_model_is_another_run(script):
    import shutil

    script("mavis", "--obj_weights", "1", "--beta", 1)
    (script.workspace / "value_models").unlink()
    low = script.workspace / "value_models" / "iter_0" / "low"
    shutil.copytree(script.workspace / "base_model" / ".." / "value_models" / "iter_0" / "even", low)
    script("mavis", "--obj_weights", "1", "--beta", 1)
    assert len(run_folders(script)) == 2


def test_a_judge_of_the_workspace_is_a_further_column(script):
    from utils.judge import Judge, judge_path

    config = type("Config", (), {"default_path": lambda self, *parts: script.workspace.joinpath(*parts)})()
    Judge(("w1", "w2"), np.array([1.0, -1.0]), 0.5).save(judge_path(config, "even"))
    script("baseline_eval", "--num_prompts", 2)
    (folder,) = run_folders(script)
    assert (folder / "rewards.csv").read_text().startswith("index,low,even,length,judge_even,log_ratio")
    assert "judge_even" in (folder / "summary.txt").read_text()
    assert all(list(s["extra"]) == ["judge_even"] for s in read_samples(folder))


def test_the_report_reads_what_the_scripts_wrote(script, capsys):
    import pareto_report

    for weights in ("1,0", "0.5,0.5", "0,1"):
        script("mavis", "--obj_weights", weights, "--beta", 2)
    script("baseline_eval")
    script("baseline_eval", "--num_samples", 4, "--obj_weights", "0.5,0.5")
    capsys.readouterr()
    output = script.workspace / "report"
    assert pareto_report.main([str(script.workspace), "--output_dir", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "toy: low and even  [toy]" in printed and "mavis, beta 2: " in printed and "(3 points)" in printed
    assert sorted(f.name for f in output.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "toy_low_even_front.png",
        "toy_low_even_kl.png",
    ]


# ---------------------------------------------------------------------------------------------------------- with fakes


def answer(token_ids, log_ratio=0.0):
    return Completion(token_ids, log_ratio, True, reference_log_prob=-1.0)


def test_the_best_candidate_is_chosen_within_its_own_answer():
    candidates = [[answer([1]), answer([5])], [answer([9]), answer([2]), answer([3])]]
    seen = []

    def read(prompts, completions):
        for prompt, completion in zip(prompts, completions, strict=True):
            seen.append((prompt, completion.token_ids))
            completion.log_ratio = 10.0 * prompt[0]

    rows = pick(
        [(0, 0), (7, 1)], candidates, {0: "a", 7: "b"}, {0: [4], 7: [6]}, to_text=str, read=read,
        score=lambda prompts, texts: {
            "value": [float(t[1:-1]) for t in texts], "other": [float(p == "b") for p in prompts]
        },
        weights={"value": 1.0}, seconds=0.25, track_kl=True,
        extra={"judge_value": lambda prompts, texts: [len(t) for t in texts]}, work={"gflop": 0.5},
    )  # fmt: skip
    assert [r["response"] for r in rows] == ["[5]", "[9]"]
    assert [r["rewards"] for r in rows] == [{"value": 5.0, "other": 0.0}, {"value": 9.0, "other": 1.0}]
    assert [r["num_candidates"] for r in rows] == [2, 3] and rows[0]["extra"] == {"judge_value": 3.0}
    assert [r["gflop"] for r in rows] == [1.0, 1.5]  # of two and of three candidates
    # Of the candidates, the reference reads those alone that are answers.
    assert seen == [([4], [5]), ([6], [9])] and [r["log_ratio"] for r in rows] == [40.0, 60.0]


def test_a_policy_without_a_log_ratio_leaves_it_out():
    (row,) = pick(
        [(0, 0)], [[answer([1], float("nan"))]], {0: "a"}, {0: [4]}, to_text=str, score=lambda p, t: {"r": np.zeros(1)},
        weights={}, seconds=0.0, track_kl=True, read=None, extra={}, work={},
    )  # fmt: skip
    assert "log_ratio" not in row and json.dumps(row, allow_nan=False)


def test_rows_are_written_chunk_by_chunk_with_a_key_per_answer(tmp_path):
    spec = RunSpec("baseline_logs", "toy", "reference", ("r",), indices=(4, 6), num_trials=2)
    seen = []

    def generate(prompts, keys, on_completion):
        seen.append(list(zip(map(tuple, prompts), keys, strict=True)))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return [[answer([1, 1, 2])] for _ in keys]

    options = {
        "generate": generate,
        "to_text": str,
        "score": lambda p, t: {"r": np.ones(len(t))},
        "weights": {},
        "num_trials": 2,
        "seed": 9,
        "chunk": 3,
    }
    with open_run(tmp_path, spec) as run, pytest.raises(KeyboardInterrupt):
        evaluate(run, {4: "a", 6: "b"}, {4: [4], 6: [6]}, **options)
    with open_run(tmp_path, spec) as run:
        evaluate(run, {4: "a", 6: "b"}, {4: [4], 6: [6]}, **options)
        run.finish()
    assert seen[0] == [((4,), (9, 4, 0)), ((4,), (9, 4, 1)), ((6,), (9, 6, 0))]
    assert seen[1] == seen[2] == [((6,), (9, 6, 1))]
    assert read_samples(run.folder)[0]["distinct"] == pytest.approx(2 / 3)
