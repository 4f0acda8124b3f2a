"""Several points from one load of the models, the switches of decoding, and the identities that they leave alone."""

import importlib

import pytest
import yaml

import utils.models
import utils.rewards
import utils.value_models
from tests.toy_world import answers, run_folders, status
from utils import evaluation
from utils.cli import parse_front, parse_weights
from utils.errors import UsageError
from utils.runs import read_arguments, read_samples


@pytest.fixture
def loads(monkeypatch):
    """What is loaded, in order: "reference", the objective of a value model, "rewards"."""
    seen = []

    def watch(module, name, label):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **kw: seen.append(label(*a)) or original(*a, **kw))

    watch(utils.models, "load_reference", lambda *a: "reference")
    watch(utils.value_models, "load_value_model", lambda config, folder, *a: folder.name)
    watch(utils.rewards, "RewardSet", lambda *a: "rewards")
    return seen


def by_point(script):
    """{(weights, beta): folder} of the run folders."""
    arguments = {f: read_arguments(f) for f in run_folders(script)}
    return {(tuple(a["weights"].items()), a["series"].get("beta")): f for f, a in arguments.items()}


def save_tables(script):
    import numpy as np

    from utils.token_table import save_token_table

    for name, values in (("low", [1.0] * 20 + [0.0] * 20), ("even", [1.0, 0.0] * 20)):
        save_token_table(script.workspace / "token_tables" / f"{name}.safetensors", np.array([0.0] * 3 + values))


# ------------------------------------------------------------------------------------------------------ several points


def test_points_are_the_runs_of_their_own_commands_from_one_load(script, loads, capsys):
    """Weights and betas, against a command for each: the same folders by identity, the same answers."""
    both = [(w, b) for w in ("1", "0.25,0.75") for b in (1, 4)]
    assert script("mavis", "--obj_weights", "1", "--obj_weights", "0.25,0.75", "--beta", 1, 4) == 0
    assert loads == ["reference", "low", "rewards", "even"]
    printed = capsys.readouterr().out
    together = by_point(script)
    assert len(together) == 4 and printed.count("run folder: ") == 4
    assert "point 4 of 4: low 0.25, even 0.75, beta 4" in printed
    mine = {read_arguments(f)["identity"]: answers(f) for f in together.values()}
    for weights, beta in both:
        script("mavis", "--obj_weights", weights, "--beta", beta, "--rerun")
    again = set(run_folders(script)) - set(together.values())
    assert {read_arguments(f)["identity"]: answers(f) for f in again} == mine and len(again) == 4


def test_one_iteration_is_one_run_however_it_is_said(script, capsys):
    """`0`, `0,0` and `00` name the same value models; `0,` has them for the first objective alone, where it steers."""
    for said in ("0", "0,0", "00", "0,"):
        assert script("mavis", "--obj_weights", "1", "--value_model_iter", said, "--beta", 1) == 0
    assert capsys.readouterr().out.count("is complete and is not repeated") == 3 and len(run_folders(script)) == 1


def test_an_adapter_is_looked_at_once_however_many_points_it_serves(script, monkeypatch):
    looked, look = [], utils.value_models.check_adapter_folder
    monkeypatch.setattr(utils.value_models, "check_adapter_folder", lambda f, *a: looked.append(f.name) or look(f, *a))
    once = ("mavis", "--obj_weights", "0.25,0.75", "--beta", 1)
    script(*once)
    counts = [len(looked)]
    looked.clear()
    script(*once, 2, 3, "--rerun")
    counts.append(len(looked))
    assert counts[0] == counts[1] and set(looked) == {"low", "even"}


def test_the_same_command_loads_nothing_for_complete_points_and_completes_a_killed_one(script, loads, capsys):
    command = ("mavis", "--front", "low,even", "--points", 3, "--beta", 2)
    script(*command)
    folders = by_point(script)
    assert [w for w, _ in folders] == [(("even", 1.0),), (("low", 1.0),), (("low", 0.5), ("even", 0.5))]
    loads.clear()
    table = capsys.readouterr().out.partition("means (and")[2]
    script(*command)
    printed = capsys.readouterr().out
    assert loads == [] and printed.count("complete and is not repeated") == 3
    assert printed.partition("means (and")[2] == table and by_point(script) == folders

    killed = folders[(("low", 1.0),), 2.0]
    before = answers(killed)
    lines = (killed / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "samples.jsonl").write_bytes(b"".join(lines[:5]))
    (killed / "summary.txt").unlink()
    script(*command)
    assert "going on after 5 of 8 answers" in capsys.readouterr().out
    assert loads == ["reference", "low", "rewards"], "the value model of a complete point is not needed"
    assert by_point(script) == folders and answers(killed) == before and (killed / "summary.txt").exists()


def test_a_command_that_is_killed_between_points_goes_on_at_the_next(script, monkeypatch):
    command = ("mavis", "--front", "low,even", "--points", 3, "--beta", 2)
    whole, calls = evaluation.evaluate_run, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(evaluation, "evaluate_run", interrupted)
    assert status(script, *command) == 130
    assert [(f / "summary.txt").exists() for f in run_folders(script)].count(True) == 1
    assert status(script, *command) == 0
    assert len(calls) == 4 and len(run_folders(script)) == 3
    assert all((f / "summary.txt").exists() for f in run_folders(script))


def test_what_a_later_point_cannot_use_is_said_before_the_first_is_decoded(script, capsys, tmp_path):
    import shutil

    models = tmp_path / "value_models"
    shutil.copytree(script.toy / "workspace" / "value_models", models)
    (models / "iter_0" / "even" / "adapter_model.safetensors").write_bytes(b"damaged")
    argv = ("mavis", "--obj_weights", "1", "--obj_weights", "0,1", "--beta", 2, "--value_model_dir", models)
    assert status(script, *argv) == 1
    assert "iter_0/even" in capsys.readouterr().err and run_folders(script) == []
    assert status(script, "mavis", "--obj_weights", "1", "--obj_weights", ",,1", "--beta", 2) == 1  # no such model
    assert "iter_0/length" in capsys.readouterr().err and run_folders(script) == []


def test_value_models_of_several_points_are_loaded_once_and_share_an_untrained_backbone(toy, loads):
    import torch

    from utils.config import load_config

    config, cpu = load_config(toy / "toy.yaml", toy / "workspace"), torch.device("cpu")
    _, tokenizer = utils.models.load_reference(config, config.dataset("toy"), cpu)
    kept, models = {}, {}
    for names in (("low",), ("low", "even"), ("even",)):
        iterations = dict.fromkeys(names, 0)
        models |= utils.value_models.load_value_models(config, None, iterations, tokenizer, 43, cpu, loaded=kept)
    assert loads == ["reference", "low", "even"]
    assert models["low"].model is models["even"].model and models["low"].score is not models["even"].score


def test_of_stacked_value_models_no_base_but_the_first_stays_in_memory_for_the_next(toy, tmp_path, monkeypatch):
    import gc
    import shutil
    import weakref

    import torch

    from utils.config import load_config

    config, cpu = load_config(toy / "toy.yaml", toy / "workspace"), torch.device("cpu")
    _, tokenizer = utils.models.load_reference(config, config.dataset("toy"), cpu)
    bases, alive, adapted = [], [], utils.value_models._adapted_value_model

    def watched(*args):
        gc.collect()
        alive.append(sum(base() is not None for base in bases))
        model = adapted(*args)
        bases.append(weakref.ref(model.get_base_model().model))
        return model

    monkeypatch.setattr(utils.value_models, "_adapted_value_model", watched)
    monkeypatch.setattr(utils.value_models, "_only_head_is_trained", lambda folder: False)
    folders, kept = [toy / "workspace" / "value_models", tmp_path / "again"], {}
    shutil.copytree(*folders)
    for folder in folders:
        iterations = {"low": 0, "even": 0}
        utils.value_models.load_value_models(config, folder, iterations, tokenizer, 43, cpu, kept, adapters="stacked")
    assert alive == [0, 1, 1, 1]  # the stack's backbone alone


def test_the_table_has_a_line_per_point(script, capsys):
    script("mavis", "--front", "low,even", "--points", 2, "--beta", 0.5, 2, "--num_trials", 1)
    header, *lines = capsys.readouterr().out.partition("over prompts)\n")[2].splitlines()
    assert header.split() == ["weights", "beta", "low", "even", "length", "KL"]
    assert [line.split()[:3] for line in lines] == [
        [name, "1", beta] for name in ("even", "low") for beta in ("0.5", "2")
    ]
    folder = by_point(script)[(("low", 1.0),), 2.0]
    mean = sum(s["rewards"]["low"] for s in read_samples(folder)) / 4
    assert lines[-1].split()[3] == f"{mean:.4f}"
    script("baseline_eval", "--obj_weights", "1", "--obj_weights", "0,1", "--num_samples", 2, "--no-track_KL")
    header = capsys.readouterr().out.partition("over prompts)\n")[2].splitlines()[0]
    assert header.split() == ["weights", "low", "even", "length"]  # no column that nothing fills


def test_every_script_takes_several_points(script, loads):
    save_tables(script)
    script("baseline_eval", "--token_table", "--front", "low,even", "--points", 2, "--beta", 1, 3)
    assert loads == ["reference", "rewards"] and len(by_point(script)) == 4
    loads.clear()
    script("baseline_eval", "--num_samples", 3, "--obj_weights", "1", "--obj_weights", "0.5,0.5")
    assert loads == ["reference", "rewards"] and len(by_point(script)) == 6
    loads.clear()
    script("mavis_bs", "--front", "low,even", "--points", 3, "--beta", 2, "--Q", 2)
    assert loads == ["reference", "even", "rewards", "low"] and len(run_folders(script)) == 9
    assert all((f / "summary.txt").exists() for f in run_folders(script))


def test_best_of_n_draws_its_samples_once_for_all_weights(script, monkeypatch):
    """Against a command for each weight: the same answers from fewer completions, with what making them took."""
    import utils.decoding

    drawn, decode = [], utils.decoding.decode
    monkeypatch.setattr(utils.decoding, "decode", lambda *a, **kw: drawn.append(len(a[1])) or decode(*a, **kw))
    command = ("baseline_eval", "--num_samples", 3)
    weights = ("1", "0.5,0.5", ",,1")
    script(*command, *(part for w in weights for part in ("--obj_weights", w)))
    assert sum(drawn) == 4 * 2 * 3
    together = {read_arguments(f)["identity"]: f for f in run_folders(script)}
    seconds = [[s["seconds"] for s in read_samples(f)] for f in together.values()]
    assert len(together) == 3 and seconds[0] == seconds[1] == seconds[2] and min(seconds[0]) > 0
    chosen = {tuple(s["response"] for s in read_samples(f)) for f in together.values()}
    assert len(chosen) == 3, "each weight ranks otherwise"
    for w in weights:
        script(*command, "--obj_weights", w, "--rerun")
    assert sum(drawn) == 4 * 4 * 2 * 3
    for folder in set(run_folders(script)) - set(together.values()):
        assert answers(folder) == answers(together[read_arguments(folder)["identity"]])


def test_best_of_n_draws_what_a_killed_point_lacks(script, monkeypatch):
    import utils.decoding

    command = ("baseline_eval", "--num_samples", 3, "--obj_weights", "1", "--obj_weights", ",,1")
    script(*command)
    killed = by_point(script)[(("length", 1.0),), None]
    before = answers(killed)
    lines = (killed / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "samples.jsonl").write_bytes(b"".join(lines[:5]))
    (killed / "summary.txt").unlink()
    drawn, decode = [], utils.decoding.decode
    monkeypatch.setattr(utils.decoding, "decode", lambda *a, **kw: drawn.append(len(a[1])) or decode(*a, **kw))
    script(*command)
    assert sum(drawn) == 3 * 3 and answers(killed) == before


def test_a_text_is_answered_at_each_point(script, loads, capsys):
    argv = ("--obj_weights", "1", "--obj_weights", "0,1", "--beta", 1, 6)
    texts = ("--prompt", "w1 w2", "--prompt", "w7")
    assert script("mavis", *argv, *texts) == 0
    assert loads == ["reference", "low", "rewards", "even"]
    printed = capsys.readouterr().out
    head, first, second = printed.split("\n> ")
    assert head.startswith("mavis: iteration 0, ") and "beta" not in head
    points = ["low 1, beta 1:", "low 1, beta 6:", "even 1, beta 1:", "even 1, beta 6:"]
    for asked, part in (("w1 w2", first), ("w7", second)):
        assert part.startswith(asked + "\n") and [li for li in part.splitlines() if li.endswith(":")] == points
        assert part.count("log-ratio") == 4
    assert run_folders(script) == []
    script("mavis", "--obj_weights", "0,1", "--beta", 6, *texts)
    alone = capsys.readouterr().out.split("\n> ")
    assert alone[0].startswith("mavis: even 1, beta 6.0, iteration 0, ")
    assert alone[1].splitlines()[1] == first[first.index("even 1, beta 6:") :].splitlines()[1]


def test_a_dry_run_names_what_all_points_need_once(script, capsys):
    assert script("mavis", "--front", "low,even", "--points", 5, "--beta", 1, 2, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert all(printed.count(part) == 1 for part in ("iter_0/low", "iter_0/even", "reference "))


def test_a_front_is_evenly_spaced_and_its_weights_are_those_that_are_typed():
    names = ("help", "harm", "humor")
    assert parse_front("help,harm", 6, names) == [
        parse_weights(text, names) for text in ("0,1", "0.2,0.8", "0.4,0.6", "0.6,0.4", "0.8,0.2", "1,0")
    ]
    assert parse_front("humor,help", 3, names) == [{"help": 1.0}, {"help": 0.5, "humor": 0.5}, {"humor": 1.0}]
    assert list(parse_front("humor,help", 3, names)[1]) == ["help", "humor"]  # the data set's order
    assert parse_front("all", 3, names) == [
        parse_weights(text, names) for text in ("0,1", "0.5,0.5", "1", "0,0,1", "0.5,,0.5", ",0.5,0.5")
    ], "every pair, a shared end once"
    for points in range(2, 60):
        assert all(abs(sum(w.values()) - 1) < 1e-12 for w in parse_front("harm,humor", points, names))
    for text, points, said in (
        ("help,ham", 6, "unknown objective 'ham'; did you mean 'harm'?"),
        ("help", 6, "must name two different objectives of help,harm,humor, or all"),
        ("help,help", 6, "two different"),
        ("help,harm,humor", 6, "two different"),
        ("help,harm", 1, "--points must be at least 2"),
    ):
        with pytest.raises(UsageError) as error:
            parse_front(text, points, names)
        assert said in str(error.value)


PAIR = ("--obj_weights", "0.5,0.5")


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        (
            "mavis",
            (*PAIR, "--obj_weights", "0.50,0.5", "--beta", 1),
            "--obj_weights names the same point twice: low",
        ),
        ("mavis", (*PAIR, "--beta", 1, 2, 1.0), "--beta names the same point twice: 1"),
        ("mavis", (*PAIR, "--beta", 1, "nan"), "--beta must be a finite number"),
        ("mavis", (*PAIR, "--beta", 1, -2), "--beta must be a finite number of at least 0, got -2"),
        ("mavis", ("--front", "low,evn", "--beta", 1), "unknown objective 'evn'; did you mean 'even'?"),
        ("mavis", ("--front", "low,even", "--points", 1, "--beta", 1), "--points must be at least 2"),
        ("mavis", ("--front", "low,even", *PAIR, "--beta", 1), "--front and --obj_weights both name the points"),
        ("mavis", (*PAIR, "--points", 3, "--beta", 1), "give --front too"),
        ("mavis", (*PAIR,), "--beta (or --kl_budget) is needed"),
        ("mavis_bs", (*PAIR, "--Q", 2), "--beta is needed"),
        ("mavis", (*PAIR, "--beta", 1, "--kl_budget", 3), "--beta and --kl_budget both say"),
        ("mavis", (*PAIR, "--kl_budget", "nan"), "--kl_budget must be a finite number of nats above 0, got nan"),
        ("mavis", (*PAIR, "--kl_budget", "inf"), "--kl_budget must be a finite number"),
        ("mavis", (*PAIR, "--kl_budget", 0), "--kl_budget must be a finite number"),
        ("mavis", (*PAIR, "--kl_budget", 2, "--no-track_KL"), "--kl_budget needs the log-ratios"),
        ("mavis", (*PAIR, "--kl_budget", 2, "--prompt", "w1"), "--kl_budget is met on the data set's prompts"),
        ("mavis", (*PAIR, "--beta", 1, "--normalization", "minimax"), "did you mean 'minmax'?"),
        ("mavis", (*PAIR, "--beta", 1, "--normalization", "none", "--normalize_values"), "contradict each other"),
        ("mavis", (*PAIR, "--beta", 1, "--normalization", "zscore", "--no-normalize_values"), "contradict each other"),
        ("mavis", (*PAIR, "--beta", 1, "--no-clip_values"), "--no-clip_values has a meaning for values as they are"),
        ("mavis", (*PAIR, "--beta", 1, "--preset", "v2"), "--preset 'v2'; did you mean"),
        ("mavis", (*PAIR, "--beta", 1, "--suppress_first_eos", "--topk", 43), "fewer than --topk 43 of the 43 tokens"),
        ("baseline_eval", ("--kl_budget", 2), "--kl_budget has no meaning for the reference"),
        ("baseline_eval", ("--normalization", "none"), "--normalization has no meaning for the reference"),
        ("baseline_eval", ("--front", "low,even"), "the reference takes no --obj_weights"),
        ("baseline_eval", ("--prompt_words", "--kl_budget", 2, "--num_samples", 2, *PAIR), "that of the best of N"),
    ],
)
def test_points_and_switches_that_cannot_be_meant_exit_2_and_leave_nothing(script, capsys, name, argv, said):
    assert status(script, name, *argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert run_folders(script) == []


# ------------------------------------------------------------------------------------------------ decoding's switches


def settings_and_specs(name, *argv):
    """(settings, run spec) of each point of a command under the paper's configuration, nothing loaded."""
    module, caught = importlib.import_module(name), []

    def catch(points, method_of):
        caught.extend((s, evaluation.run_spec(s, method_of(s), {0: "a", 3: "b"})) for s in points)
        return 0

    common = ("--dataset", "anthropic", "--config", "paper_7b", "--workspace", "/nonexistent")
    original, module.evaluate_method = module.evaluate_method, catch
    try:
        assert module.main([*map(str, argv), *common]) == 0
    finally:
        module.evaluate_method = original
    return caught


@pytest.mark.parametrize(
    ("identity", "command"),
    [
        ("450232d3", "mavis --obj_weights 0.2,,0.8 --value_model_iter 1,,0 --beta 4 --value_model_dir v"),
        ("61fbaf46", "mavis --obj_weights 1 --beta 2 --value_model_dir v --no-normalize_values"),
        ("61fbaf46", "mavis --obj_weights 1 --beta 2 --value_model_dir v --normalization none --clip_values"),
        ("61fbaf46", "mavis --obj_weights 1 --beta 2 --value_model_dir v --preset v1 --normalization none"),
        ("a5221a5a", "mavis --obj_weights 1 --beta 2 --value_model_dir v --normalize_values --topk 40 --no-track_KL"),
        ("3579d1b9", "mavis_bs --obj_weights 0.5,0.5 --beta 4 --Q 4 --value_model_dir v"),
        ("f07d00de", "baseline_eval"),
        ("f07d00de", "baseline_eval --preset v1 --no-suppress_first_eos"),
        ("4b7a6f53", "baseline_eval --num_samples 16 --obj_weights 0.5,0.5"),
        ("6a3cc0ed", "baseline_eval --token_table t --beta 4 --obj_weights 0.6,0.4"),
        ("6a3cc0ed", "baseline_eval --token_table t --beta 4 --obj_weights 0.6,0.4 --normalization minmax"),
        ("8152202a", "baseline_eval --token_table t --beta 4 --obj_weights 0.6,0.4 --num_samples 2"),
        ("cf49b665", "baseline_eval --prompt_words --beta 1.5"),
    ],
)
def test_a_runs_identity_is_what_it_was_before_there_were_points_and_switches(identity, command):
    """Else complete runs would be made again. The numbers were printed by the code as it was then."""
    [(_, spec)] = settings_and_specs(*command.split())
    assert spec.identity == identity


def test_presets_are_the_published_versions_and_other_flags_win_over_them():
    steer = ("mavis", "--obj_weights", "1", "--beta", 2)

    def decoding(*argv):
        [(s, spec)] = settings_and_specs(*steer, *argv)
        series = {k: v for k, v in spec.series.items() if k in ("normalization", "clip_values")}
        return s.top_k, s.tilt["clip"], spec.arguments.get("suppress_first_eos", False), series

    plain = (15, 6.0, False, {"normalization": "minmax"})
    assert decoding() == decoding("--preset", "v1") == plain
    assert decoding("--preset", "v3") == (40, None, True, {"normalization": "none", "clip_values": False})
    assert decoding("--preset", "v3", "--topk", 7)[0] == 7
    assert decoding("--preset", "v3", "--no-suppress_first_eos")[2] is False
    assert decoding("--preset", "v3", "--normalize_values")[3] == {"normalization": "minmax"}
    assert decoding("--preset", "v3", "--normalization", "zscore")[3] == {"normalization": "zscore"}
    assert decoding("--preset", "v3", "--clip_values")[1::2] == (6.0, {"normalization": "none"})
    assert decoding("--preset", "v1", "--no-normalize_values")[1::2] == (6.0, {"normalization": "none"})
    assert decoding("--suppress_first_eos") == (15, 6.0, True, {"normalization": "minmax"})


def test_a_switch_reaches_the_policy_and_makes_another_run(script, monkeypatch):
    """v3 in full through the script equals the policy that is asked for by hand."""
    from utils.config import load_config
    from utils.data import encode_prompts, prompts_csv, read_prompts
    from utils.decoding import decode
    from utils.policies import MavisPolicy

    script("mavis", "--obj_weights", "1", "--beta", 2)
    script("mavis", "--obj_weights", "1", "--beta", 2, "--preset", "v3", "--batch_size", 4)
    assert len(run_folders(script)) == 2
    folder = next(f for f in run_folders(script) if read_arguments(f)["arguments"]["topk"] == 40)
    arguments = read_arguments(folder)
    assert arguments["arguments"]["suppress_first_eos"] is True
    assert arguments["series"] == {
        "beta": 2.0, "iteration": "0", "value_model_dir": "value_models", "normalization": "none", "clip_values": False,
    }  # fmt: skip

    import torch

    config = load_config(script.toy / "toy.yaml", script.workspace)
    spec, cpu = config.dataset("toy"), torch.device("cpu")
    reference, tokenizer = utils.models.load_reference(config, spec, cpu)
    value = utils.value_models.load_value_models(config, None, {"low": 0}, tokenizer, 43, cpu)
    policy = MavisPolicy(reference, value, {"low": 1.0}, beta=2.0, top_k=40, normalization="none", clip=None)
    prompts = encode_prompts(spec, tokenizer, read_prompts(prompts_csv(config, spec, "test"), config)[:4], 34)
    keys = [(0, i, t) for i in range(4) for t in range(2)]
    expected = decode(
        policy, [prompts[i] for _, i, _ in keys], keys=keys, max_new_tokens=6, eos_token_id=0, batch_size=4,
        suppress_first_eos=True,
    )  # fmt: skip
    samples = read_samples(folder)
    assert [s["log_ratio"] for s in samples] == pytest.approx([c.log_ratio for c in expected], abs=1e-9)
    assert [s["tokens"] for s in samples] == [len(c.token_ids) for c in expected]


def test_beam_search_and_baselines_take_the_switches(script, monkeypatch):
    import utils.beams

    seen, search = [], utils.beams.beam_search
    spy = lambda policy, *a, **kw: seen.append((policy.clip, kw["suppress_first_eos"])) or search(policy, *a, **kw)  # noqa: E731
    monkeypatch.setattr(utils.beams, "beam_search", spy)
    save_tables(script)
    switches = ("--preset", "v3", "--topk", 6, "--num_trials", 1)
    script("mavis_bs", "--obj_weights", "1", "--beta", 2, "--Q", 2, *switches)
    script("baseline_eval", *switches)
    script("baseline_eval", "--token_table", "--beta", 2, "--obj_weights", "1", *switches)
    assert set(seen) == {(None, True)}
    arguments = {read_arguments(f)["method"]: read_arguments(f) for f in run_folders(script)}
    assert set(arguments) == {"mavis_bs", "reference", "token_table"}
    for method, of_method in arguments.items():
        assert of_method["arguments"]["suppress_first_eos"] is True
        assert of_method["series"].get("normalization", "none") == "none"
        assert method == "reference" or of_method["series"]["clip_values"] is False


# -------------------------------------------------------------------------------------------------------- a KL budget


SEARCH = ("--num_prompts", 5, "--topk", 40)  # of 43 tokens, so that beta 0 has a KL of half a nat


def test_a_kl_budget_is_met_recorded_and_not_searched_again(script, loads, capsys):
    command = ("mavis", "--obj_weights", "1", "--kl_budget", 2.5, *SEARCH, "--num_trials", 3)
    script(*command)
    printed = capsys.readouterr().out
    [folder] = run_folders(script)
    assert sorted(f.name for f in folder.iterdir()) == [
        "args.yaml", "kl_search.csv", "rewards.csv", "samples.jsonl", "summary.txt"
    ]  # fmt: skip
    arguments = read_arguments(folder)
    search = arguments["kl_search"]
    assert list(arguments)[-1] == "configuration"
    assert search["budget"] == 2.5 and search["beta"] == arguments["series"]["beta"] > 0 and search["met"] is True
    assert abs(search["kl"] - 2.5) <= search["error"] and search["trials"] == 1
    assert "KL budget               2.5 nats" in (folder / "summary.txt").read_text()
    header, *rows = (folder / "kl_search.csv").read_text().splitlines()
    rows = [tuple(map(float, row.split(","))) for row in rows]
    assert header == "beta,kl,error" and rows[0][0] == 0 and rows[-1] == (search["beta"], search["kl"], search["error"])
    assert len(rows) == search["tried"] == printed.count("\nbeta ") - 1  # and what came of it

    # The first answers of the final run are the ones that the KL was measured on.
    first = [s["log_ratio"] for s in read_samples(folder) if s["trial"] == 0]
    assert sum(first) / 5 == pytest.approx(search["kl"], abs=1e-9)
    loads.clear()
    script(*command)
    assert loads == [] and run_folders(script) == [folder] and "is not repeated" in capsys.readouterr().out
    # It is an ordinary run of that beta.
    script(*[repr(search["beta"]) if a == 2.5 else "--beta" if a == "--kl_budget" else a for a in command])
    assert loads == [] and run_folders(script) == [folder]


def test_a_search_that_was_killed_goes_on(script, monkeypatch, capsys):
    command = ("mavis", "--obj_weights", "0.5,0.5", "--kl_budget", 2.2, *SEARCH)
    measure, calls = evaluation.measure_kl, []

    def interrupted(settings, *arguments):
        calls.append(settings.beta)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(settings, *arguments)

    monkeypatch.setattr(evaluation, "measure_kl", interrupted)
    assert status(script, *command) == 130
    assert run_folders(script) == []
    [file] = (script.workspace / "mavis_logs" / "toy" / "low_even").glob("kl_mavis_0.5-0.5-*.csv")
    assert len(file.read_text().splitlines()) == 3
    file.write_text(file.read_text() + "4.0,1.")  # a torn line
    assert status(script, *command) == 0
    [folder] = run_folders(script)
    tried = [float(row.split(",")[0]) for row in (folder / "kl_search.csv").read_text().splitlines()[1:]]
    assert calls[3:] == tried[2:] and calls[:2] == tried[:2], "no beta was measured twice"
    assert file.read_text() == (folder / "kl_search.csv").read_text()


def test_the_token_table_meets_the_same_budget_with_a_beta_of_its_own(script, capsys):
    save_tables(script)
    points = ("--front", "low,even", "--points", 2, "--kl_budget", 2.5, *SEARCH)
    script("mavis", *points)
    script("baseline_eval", "--token_table", *points)
    searches = {f: read_arguments(f)["kl_search"] for f in run_folders(script)}
    assert len(searches) == 4 and {s["budget"] for s in searches.values()} == {2.5}
    assert all(abs(s["kl"] - 2.5) <= s["error"] for s in searches.values() if s["met"])
    assert capsys.readouterr().out.count("point 2 of 2: low 1\n") == 2

    from utils.report_points import load_points, series_names

    runs, _ = load_points([script.workspace])
    names = set(series_names(runs).values())
    assert names == {"mavis, kl_budget 2.5", "token table, kl_budget 2.5"}, "one front, though its betas differ"


def test_a_run_by_hand_that_meets_a_budget_stays_in_the_front_of_its_beta(script, capsys):
    import pareto_report
    from utils.report_points import load_points, series_names

    script("mavis", "--front", "low,even", "--points", 2, "--beta", 1, *SEARCH)
    folder = by_point(script)[(("low", 1.0),), 1.0]
    budget = sum(s["log_ratio"] for s in read_samples(folder) if s["trial"] == 0) / 5
    script("mavis", "--obj_weights", "1", "--kl_budget", budget, *SEARCH)
    runs, _ = load_points([script.workspace])
    assert len(runs) == 2 and read_arguments(folder)["kl_search"]["budget"] == budget
    assert set(series_names(runs).values()) == {"mavis, beta 1"}, "one front, as before the search"
    capsys.readouterr()
    output = script.workspace / "report"
    assert pareto_report.main([str(script.workspace), "--output_dir", str(output)]) == 0
    assert "mavis, beta 1 at low 1 met the KL budget of" in capsys.readouterr().out


def test_a_budget_that_no_beta_meets_is_said_with_what_there_is(script, capsys):
    steer = ("mavis", "--obj_weights", "1", *SEARCH)
    assert status(script, *steer, "--kl_budget", 0.01) == 1
    assert "--kl_budget 0.01 is below the KL of beta 0" in capsys.readouterr().err
    assert status(script, *steer, "--kl_budget", 500) == 1
    error = capsys.readouterr().err
    assert "not reached: beta 64, the largest that is tried, has a KL of" in error and error.count("\n") == 1
    assert run_folders(script) == []


def test_a_search_whose_models_cannot_be_loaded_leaves_nothing(script, capsys):
    assert status(script, "mavis", "--obj_weights", "1", "--kl_budget", 2, "--max_new_tokens", 40) == 1
    assert "leaves no room" in capsys.readouterr().err
    assert not [f for f in (script.workspace / "mavis_logs").rglob("*") if f.is_file() and f.name != ".lock"]


def test_the_budget_of_a_complete_run_is_noted_in_it(script):
    """A beta that a plain command has run before: its rows stay, and the folder says what the search found."""
    script("mavis", "--obj_weights", "1", "--beta", 1, *SEARCH)
    [folder] = run_folders(script)
    rows = (folder / "samples.jsonl").read_bytes()
    budget = sum(s["log_ratio"] for s in read_samples(folder) if s["trial"] == 0) / 5
    script("mavis", "--obj_weights", "1", "--kl_budget", budget, *SEARCH)
    assert run_folders(script) == [folder] and (folder / "samples.jsonl").read_bytes() == rows
    assert read_arguments(folder)["kl_search"]["beta"] == 1.0 and (folder / "kl_search.csv").exists()
    assert "KL budget" in (folder / "summary.txt").read_text()
    yaml.safe_load((folder / "args.yaml").read_text())


# ------------------------------------------------------------------------------------------------------- shell scripts

FRONTS = {
    "anthropic/get_pareto_front_help_harm.sh": ("anthropic", "help,harm"),
    "anthropic/get_pareto_front_help_humor.sh": ("anthropic", "help,humor"),
    "anthropic/get_pareto_front_harm_humor.sh": ("anthropic", "harm,humor"),
    "summary/get_pareto_front_summarization_faithfulness.sh": ("summary", "summarization,faithful"),
}
RECORDER = """#!/usr/bin/env bash
if [ "$1" = - ]; then exec "$REAL_PYTHON" "$@"; fi
echo "$*" >> "$RECORD"
case "$*" in *"$FAILS"*) exit 3;; esac
"""


def stages(tmp_path, script, *argv, fails="nothing"):
    """(exit status, the stages' commands) of a shell script, in an environment whose python writes down what it is."""
    import os
    import subprocess
    import sys

    from utils.config import REPOSITORY

    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    wanted = subprocess.run("cksum < requirements.txt", shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    (tmp_path / "venv" / ".requirements").write_text(wanted.stdout)
    environment = {
        "MAVIS_VENV": str(tmp_path / "venv"), "REAL_PYTHON": sys.executable, "RECORD": str(tmp_path / "record"),
        "FAILS": fails,
    }  # fmt: skip
    command = ["bash", str(REPOSITORY / "scripts" / script), *argv]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    record = tmp_path / "record"
    return done.returncode, record.read_text().splitlines() if record.exists() else [], done.stderr


@pytest.mark.parametrize("script_name", FRONTS)
def test_a_front_script_runs_the_front_the_reference_and_the_report(tmp_path, script_name):
    dataset, pair = FRONTS[script_name]
    more = f"--config tiny --workspace {tmp_path}/ws --num_prompts 3"
    code, commands, _ = stages(tmp_path, script_name, "1,1,0", "4", *more.split())
    assert code == 0
    data, logs = f"--dataset {dataset} {more}", f"{tmp_path}/ws"
    assert commands == [
        f"mavis.py --front {pair} --points 6 --value_model_iter 1,1,0 --beta 4 {data}",
        f"baseline_eval.py {data}",
        f"pareto_report.py {logs}/mavis_logs/{dataset} {logs}/baseline_logs/{dataset} --objectives {pair} "
        f"--output_dir {logs}/report/{dataset}_{pair.replace(',', '_')}",
    ]
    for command in commands:
        name, *argv = command.split()
        importlib.import_module(name.removesuffix(".py")).build_parser().parse_args(argv)


def test_all_pairs_are_one_command_with_the_tables_that_are_there(tmp_path):
    tables = tmp_path / "ws" / "token_tables"
    tables.mkdir(parents=True)
    for objective in ("help", "harm", "humor"):
        (tables / f"{objective}.safetensors").touch()
    world = f"--config tiny --workspace {tmp_path}/ws"
    code, commands, _ = stages(tmp_path, "anthropic/get_pareto_fronts.sh", "0", "4", *world.split())
    data, logs = f"--dataset anthropic {world}", f"{tmp_path}/ws"
    assert code == 0 and commands == [
        f"mavis.py --front all --points 6 --value_model_iter 0 --beta 4 {data}",
        f"baseline_eval.py --token_table --front all --points 6 --beta 4 {data}",
        f"baseline_eval.py {data}",
        f"pareto_report.py {logs}/mavis_logs/anthropic {logs}/baseline_logs/anthropic "
        f"--output_dir {logs}/report/anthropic_all",
    ]
    (tables / "humor.safetensors").unlink()
    code, commands, _ = stages(tmp_path / "again", "anthropic/get_pareto_fronts.sh", "0", "4", *world.split())
    assert code == 0 and len(commands) == 3, "a table of each objective is needed"


def test_a_front_script_stops_at_the_first_failure_and_says_its_usage(tmp_path):
    script_name = "anthropic/get_pareto_front_help_harm.sh"
    code, commands, _ = stages(tmp_path, script_name, "0", "4", "--config", "tiny", fails="mavis.py")
    assert code == 3 and len(commands) == 1
    code, commands, error = stages(tmp_path / "again", script_name, "0")
    assert code == 2 and not commands and "ITERS BETA" in error


def test_stacked_adapters_give_the_answers_of_merged_ones(script, tmp_path, monkeypatch):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from utils.shared_base import AdapterStack

    reads, read = [], AdapterStack.read

    def watched(stack, members, *args, **inputs):
        reads.append(members)
        return read(stack, members, *args, **inputs)

    monkeypatch.setattr(AdapterStack, "read", watched)
    values = tmp_path / "values"
    shutil.copytree(script.toy / "workspace" / "value_models", values)
    for name in ("low", "even"):  # adapters that change the backbone: an untrained one is shared without being stacked
        file = values / "iter_0" / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(len(name))
        tensors = load_file(file)
        save_file(
            tensors | {k: torch.randn(t.shape, generator=generator) for k, t in tensors.items() if "lora_B" in k}, file
        )
    steer = ("mavis", "--front", "low,even", "--points", 3, "--beta", 3, "--batch_size", 3, "--value_model_dir", values)
    assert script(*steer) == 0 and script(*steer, "--value_adapters", "stacked") == 0
    runs = {}
    for folder in run_folders(script):
        arguments = read_arguments(folder)
        kind = arguments["series"].get("value_adapters", "merged")
        runs.setdefault(tuple(arguments["weights"].items()), {})[kind] = read_samples(folder)
    assert len(runs) == 3 and set(reads) == {(0,), (1,), (1, 0)}
    for kinds in runs.values():
        assert [s["response"] for s in kinds["stacked"]] == [s["response"] for s in kinds["merged"]]
        for one, other in zip(kinds["stacked"], kinds["merged"], strict=True):
            assert one["log_ratio"] == pytest.approx(other["log_ratio"], abs=2e-4)
            assert one["value_tokens"] == other["value_tokens"]
