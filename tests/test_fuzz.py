"""Random and damaged input: never a traceback, and never another result in silence.

Each check runs on a few inputs by default and on many behind `slow`: more than 10,000 in all (`MANY`).

    python -m pytest tests/test_fuzz.py -m slow --hypothesis-show-statistics

Whatever is refused must be refused by an exception that `cli.run` turns into one line.
"""

import functools
import importlib
import io
import json
import math
import pickle
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from utils import cli, hdf5_utils, pickled_trees, plain_pickle, report_points, runs, soups
from utils.config import REPOSITORY, load_config
from utils.data import read_prompts
from utils.errors import ConfigError, DataError, UsageError
from utils.given_answers import read_answers
from utils.token_table import load_token_table, save_token_table
from utils.trees import Tree

sys.path[:0] = [str(REPOSITORY / "Finetuning" / n) for n in ("", "PPO", "ARM", "SFT", "RM")]

ONE_LINE = (UsageError, DataError, ConfigError, OSError)  # what `cli.run` turns into one line
MANY = {
    "arguments": 2500, "configurations": 1500, "prompts": 1500, "trees": 2500, "run_folders": 800, "adapters": 600,
    "token_tables": 1000, "answers": 1000, "pickles": 2500,
}  # fmt: skip
assert sum(MANY.values()) >= 10_000


def fuzz(name, few, /, **strategies):
    """The check as two tests: a few inputs that are always the same, and `MANY` random ones."""

    def decorate(check):
        common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

        def again(**inputs):
            check(**inputs)

        module = sys.modules[check.__module__]
        default = settings(max_examples=few, derandomize=True, **common)(given(**strategies)(check))
        many = settings(max_examples=MANY[name], **common)(given(**strategies)(functools.wraps(check)(again)))
        many.__name__ = f"{check.__name__}__{MANY[name]}_times"
        setattr(module, many.__name__, pytest.mark.slow(many))
        return default

    return decorate


@functools.cache
def workplace() -> Path:
    """A folder for this module; removed when the process ends."""
    folder = tempfile.TemporaryDirectory()
    workplace.kept = folder
    return Path(folder.name)


def ends(function, *args):
    """(result, None), or (None, the message) of an error that is one line for the user."""
    found, caught = None, None
    try:
        found = function(*args)
    except ONE_LINE as error:
        caught = error
    if caught is not None:
        out = io.StringIO()

        def fail():
            raise caught

        with redirect_stderr(out):
            assert cli.run(fail) in (1, 2)
        assert out.getvalue().startswith("error: ") and out.getvalue().count("\n") == 1, out.getvalue()
        return None, str(caught)
    return found, None


@st.composite
def damage(draw):
    """A function that damages bytes: flips, cuts, repeats, or overwrites a part of them."""
    kind = draw(st.sampled_from(["flip", "flips", "cut", "head", "drop", "repeat", "zero", "noise", "insert"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=8, max_size=8))
    noise = draw(st.binary(min_size=1, max_size=12))

    def apply(data: bytes) -> bytes:
        if not data:
            return noise
        at = [int(p * len(data)) for p in places]
        a, b = sorted(at[:2])
        if kind in ("flip", "flips"):
            out = bytearray(data)
            for place in at[: 1 if kind == "flip" else 8]:
                out[place] ^= 1 << (noise[0] % 8)
            return bytes(out)
        return {
            "cut": data[:a], "head": data[b:], "drop": data[:a] + data[b:], "repeat": data[:b] + data[a:],
            "zero": data[:a] + bytes(b - a) + data[b:], "noise": data[:a] + noise + data[a + len(noise) :],
            "insert": data[:a] + noise + data[a:],
        }[kind]  # fmt: skip

    return apply


@st.composite
def text_damage(draw):
    """A function that replaces a number or a word of a text by another."""
    place, new = draw(st.floats(0, 1, exclude_max=True)), draw(WORDS)

    def apply(data: bytes) -> bytes:
        import re

        words = list(re.finditer(rb"[\w.+-]+", data))
        if not words:
            return data
        word = words[int(place * len(words))]
        return data[: word.start()] + new.encode() + data[word.end() :]

    return apply


NUMBERS = st.one_of(
    st.integers(-3, 40).map(str), st.integers().map(str), st.floats().map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "-0", "1_0", "0x10", "1e-400", "٣", "²", "99999999999999999999"]),
)  # fmt: skip
WORDS = st.one_of(
    NUMBERS, st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12),
    st.sampled_from(["", "help", "harm", "all", "anthropic", "summary", "train", "test", "cpu", "cuda:0", "meta", ",",
                     "-", "0.5,0.5", "1,", "0.5,,0.5", "help,harm", "help,help", "tiny", "minmax", "v3", "/dev/null/x",
                     "."]),
)  # fmt: skip
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)

# ---------------------------------------------------------------------------------------------------------- arguments

SCRIPTS = (
    "dataset_preprocess", "get_data_base", "get_data_iter", "label_tree", "label_tree_soft", "split_data",
    "train_value_model", "fit_token_table", "fit_judges", "convert_trees", "mavis", "mavis_bs", "baseline_eval",
    "baseline_eval_KL", "mod_eval", "answers_eval", "pareto_report", "ppo", "train_arm", "sft", "merge_sft_lora",
    "reward_soup_merge", "train_reward_model",
)  # fmt: skip


@functools.cache
def parser_of(script):
    module = importlib.import_module(script)
    return module.build_parser() if hasattr(module, "build_parser") else None


@st.composite
def command(draw):
    """A script with random values for some of its arguments, sensible ones for those that it needs."""
    script = draw(st.sampled_from(SCRIPTS))
    parser = parser_of(script)
    argv = []
    for action in [] if parser is None else parser._actions:
        if (
            "--help" in action.option_strings
            or "--workspace" in action.option_strings
            or "--prompt" in action.option_strings
        ):
            continue
        needed = action.required or not action.option_strings
        if not needed and draw(st.integers(0, 5)):
            continue
        if action.option_strings:
            argv.append(draw(st.sampled_from(action.option_strings)))
        if action.nargs != 0:
            value = st.one_of(
                WORDS, NUMBERS, st.sampled_from(list(map(str, action.choices))) if action.choices else WORDS
            )
            count = (
                draw(st.integers(1, 3)) if action.nargs == "+" else action.nargs if isinstance(action.nargs, int) else 1
            )
            argv += [draw(value) for _ in range(count)]
    if parser is None:
        argv = draw(st.lists(WORDS, max_size=6))
    return script, argv


@functools.cache
def config_file() -> str:
    data = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    file = workplace() / "tiny.yaml"
    file.write_text(yaml.safe_dump(data | {"workspace": str(workplace() / "empty")}))
    return str(file)


@fuzz("arguments", 60, given_command=command())
def test_no_argument_ends_in_a_traceback(given_command):
    """A dry run checks every argument; where nothing has been made yet, no stage comes further."""
    script, argv = given_command
    if script != "pareto_report":
        argv = [*argv, "--dry_run", "--config", config_file()]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.run(lambda: importlib.import_module(script).main(argv))
        except SystemExit as stopped:  # argparse
            status = stopped.code
    assert status in (0, 1, 2) and "Traceback" not in err.getvalue()
    assert status or not err.getvalue()
    assert status in (0, 2) or err.getvalue().count("\n") == 1


# ------------------------------------------------------------------------------------------------------ configurations


@st.composite
def changed_configuration(draw):
    """configs/tiny.yaml with some entries replaced, removed or added, or with damaged bytes."""
    text = (REPOSITORY / "configs/tiny.yaml").read_bytes()
    if draw(st.booleans()):
        return draw(st.one_of(damage(), text_damage()))(text)
    data = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while True:
            key = draw(st.sampled_from(sorted(place, key=str)))
            if isinstance(place[key], dict) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            break
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            del place[key]
        else:
            place[key if change == "replace" else draw(WORDS)] = draw(PLAIN)
        assume(data)
        if not place:
            break
    return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")


@fuzz("configurations", 40, text=changed_configuration())
def test_no_configuration_ends_in_a_traceback(text):
    file = workplace() / "changed.yaml"
    file.write_bytes(text)
    config, _ = ends(load_config, file)
    if config is None:
        return
    import mavis
    import train_value_model

    for main, argv in (
        (mavis.main, ["--obj_weights", "1", "--beta", "2"]),
        (train_value_model.main, ["--objective", "help"]),
    ):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            ends(main, [*argv, "--dataset", "anthropic", "--dry_run", "--config", str(file)])


# ------------------------------------------------------------------------------------------------------------- prompts


@fuzz(
    "prompts", 60,
    data=st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda t: ("prompt\n" + t).encode("utf-8", "replace")),
        st.builds(lambda hit: hit(b"prompt\n\"a\n\nb\"\nc,d\ne\n"), damage()),
    ),
)  # fmt: skip
def test_a_prompts_file_is_read_whole_or_refused(data):
    file = workplace() / "prompts.csv"
    file.write_bytes(data)
    prompts, _ = ends(read_prompts, file)
    assert prompts is None or (prompts and all(isinstance(p, str) and p.strip() for p in prompts))


# --------------------------------------------------------------------------------------------------------------- trees


def make_tree(index: int) -> Tree:
    rng = np.random.default_rng(index)
    tree = Tree(
        parent=np.array([-1, 0, 0, 1, 1]), tokens=[rng.integers(0, 500, 1 + i).astype(np.int32) for i in range(5)],
        log_ratio=rng.normal(size=5), prompt=f"prompt ü {index}", prompt_index=index, finished=rng.random(5) < 0.5,
        soft="future",
    )  # fmt: skip
    return tree.labelled("help", rng.normal(size=5))


def same_tree(a: Tree, b: Tree) -> bool:
    return (
        a.prompt == b.prompt and a.prompt_index == b.prompt_index and a.soft == b.soft
        and set(a.values) == set(b.values)
        and np.array_equal(a.parent, b.parent) and np.array_equal(a.log_ratio, b.log_ratio)
        and all(np.array_equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True))
        and all(np.array_equal(a.values[n], b.values[n]) for n in a.values) and np.array_equal(a.finished, b.finished)
    )  # fmt: skip


@functools.cache
def tree_folder() -> Path:
    folder = workplace() / "trees"
    for index in range(3):
        hdf5_utils.write_tree(folder, make_tree(index))
    hdf5_utils.consolidate(folder)
    hdf5_utils.write_tree(folder, make_tree(3))  # its tokens are still in parts/
    return folder


@fuzz(
    "trees", 60, name=st.sampled_from(["all_tokens.hdf5"] * 3 + ["prompt1_tree.json", "parts/prompt3.npy"]),
    hit=st.one_of(damage(), text_damage()),
)  # fmt: skip
def test_a_damaged_tree_is_refused_or_read_as_it_was(name, hit):
    folder = workplace() / "damaged_trees"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tree_folder(), folder)
    (folder / name).write_bytes(hit((folder / name).read_bytes()))
    for index in range(4):
        tree, _ = ends(hdf5_utils.read_tree, folder, index)
        assert tree is None or same_tree(tree, make_tree(index))
    ends(hdf5_utils.tree_indices, folder)
    total, _ = ends(hdf5_utils.consolidate, folder)
    if total is not None:  # what could be read has not been made worse
        for index in range(4):
            tree, _ = ends(hdf5_utils.read_tree, folder, index)
            assert tree is None or same_tree(tree, make_tree(index))


# --------------------------------------------------------------------------------------------------------- run folders


@functools.cache
def run_folder() -> Path:
    from tests.runs_for_tests import make_run

    return make_run(workplace() / "runs", weights={"help": 0.5, "harm": 0.5}, beta=2.0, prompts=range(3), judge=True)


@fuzz(
    "run_folders", 30, name=st.sampled_from(["args.yaml", "rewards.csv", "samples.jsonl"]),
    hit=st.one_of(damage(), text_damage()),
)  # fmt: skip
def test_a_damaged_run_is_refused_or_reported(name, hit):
    folder = workplace() / "damaged_run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run_folder(), folder)
    (folder / name).write_bytes(hit((folder / name).read_bytes()))
    found, _ = ends(report_points.load_points, [folder])
    ends(lambda: runs.Run(folder, runs.read_arguments(folder), None))
    if found is None:
        return
    [point], _ = found
    expected, _ = report_points.load_points([run_folder()])
    for column in set(point.table.columns) | set(expected[0].table.columns):
        # rewards.csv and samples.jsonl say the same numbers, so damage to one of them shows
        assert point.mean(column) == pytest.approx(expected[0].mean(column), rel=1e-6, nan_ok=True), column


# ------------------------------------------------------------------------------------------------ adapters and tables


@functools.cache
def adapter_folder() -> Path:
    import torch
    from peft import get_peft_model

    from tests.models_for_tests import causal_lm
    from utils.adapters import lora_config
    from utils.places import record_checksum
    from utils.specs import LoraSpec

    torch.manual_seed(0)
    folder = workplace() / "adapter"
    model = get_peft_model(causal_lm("llama_grouped_tied", dtype=torch.float32), lora_config(LoraSpec(2, 4, 0.0)))
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "metrics.json").write_text('{"kind": "ppo"}\n')
    record_checksum(folder)
    return folder


@fuzz(
    "adapters", 25, name=st.sampled_from(["adapter_model.safetensors", "adapter_config.json", "metrics.json"]),
    hit=st.one_of(damage(), text_damage()),
)  # fmt: skip
def test_a_damaged_adapter_is_refused_or_read_as_it_was(name, hit):
    folder = workplace() / "damaged_adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter_folder(), folder)
    (folder / name).write_bytes(hit((folder / name).read_bytes()))
    found, _ = ends(soups.read_adapter, folder)
    if found is not None:
        config, tensors = soups.read_adapter(adapter_folder())
        assert found[0] == config and all((found[1][n] == t).all() for n, t in tensors.items())


@fuzz("token_tables", 40, hit=damage(), size=st.integers(1, 40))
def test_a_damaged_token_table_is_refused_or_read_as_it_was(hit, size):
    file, table = workplace() / "table.safetensors", np.linspace(-1, 1, size).astype(np.float32)
    save_token_table(file, table, {"objective": "help"})
    file.write_bytes(hit(file.read_bytes()))
    found, _ = ends(load_token_table, file, size)
    assert found is None or np.array_equal(found, table)


# -------------------------------------------------------------------------------------------------------- given answers

ASKED = {index: f"question {index}" for index in range(3)}
GIVEN = [
    {"index": i, "trial": t, "prompt": ASKED[i], "response": f"answer {i} {t}", "log_prob": -1.5 * i, "finished": i > 0}
    for i in ASKED
    for t in range(2)
]


@fuzz("answers", 40, hit=st.one_of(damage(), text_damage()))
def test_damaged_answers_are_refused_or_answer_every_prompt(hit):
    file = workplace() / "answers.jsonl"
    file.write_bytes(hit("".join(json.dumps(row) + "\n" for row in GIVEN).encode()))
    with redirect_stdout(io.StringIO()):
        found, _ = ends(read_answers, file, ASKED)
    if found is not None:
        trials = 1 + max(trial for _, trial in found)
        assert list(found) == [(i, t) for i in ASKED for t in range(trials)]
        for answer in found.values():
            assert answer.response.encode() is not None and answer.seconds >= 0 and not answer.log_prob > 0


# ------------------------------------------------------------------------------------------------------------- pickles


class Published:
    def __init__(self, tokens):
        self.tokens = tokens


@functools.cache
def pickles() -> list[bytes]:
    array = {
        "children": [{"tokens": np.arange(4), "value": 1.5, "children": []}],
        "tokens": [1, 2],
        "log_ratio": np.float64(2),
    }
    return [pickle.dumps(x, p) for p in range(6) for x in (array, [array, array], {"a": {1, "b"}}, Published([1]))]


OPCODES = st.sampled_from(
    [bytes([c]) for c in range(256)] + [b"c__main__\nNode\n", b")\x81", b"}b", b"K\x01", b"q\x00", b"h\x00", b"(l"]
)


@fuzz(
    "pickles", 80,
    data=st.one_of(
        st.builds(lambda which, hit: hit(pickles()[which]), st.integers(0, 23), damage()),
        st.lists(OPCODES, max_size=40).map(lambda parts: b"".join(parts) + b"."),
    ),
)  # fmt: skip
def test_no_pickle_ends_in_a_traceback(data):
    found, _ = ends(plain_pickle.read_pickle, data)
    if found is not None:
        names = pickled_trees.NodeMap(objective="help", recompute=True)
        listed, _ = ends(pickled_trees.roots_of, found, names, "fuzz")
        for index, (_, root) in enumerate(listed or []):
            ends(pickled_trees.as_tree, root, index, "prompt", names, "fuzz")


def test_what_is_damaged_here_is_read_where_it_is_whole():
    """Otherwise every check above would pass on files that nothing can read."""
    assert all(same_tree(hdf5_utils.read_tree(tree_folder(), i), make_tree(i)) for i in range(4))
    assert len(report_points.load_points([run_folder()])[0]) == 1
    assert soups.read_adapter(adapter_folder())[1]
    whole = workplace() / "whole.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in GIVEN))
    assert [a.response for a in read_answers(whole, ASKED).values()] == [row["response"] for row in GIVEN]
    for data in pickles():
        plain_pickle.read_pickle(data)
    assert math.isfinite(json.loads("1"))
