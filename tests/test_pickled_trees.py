"""Pickled trees are read without unpickling: round trips, and hostile files that are refused with nothing executed."""

import collections
import datetime
import os
import pickle
import sys
import types

import numpy as np
import pytest

import convert_trees
import utils.sharding  # noqa: F401 (loaded before imports are watched)
from utils import plain_pickle
from utils.cli import run
from utils.errors import DataError, UsageError
from utils.hdf5_utils import read_tree, tree_indices
from utils.pickled_trees import NodeMap, as_tree, roots_of
from utils.plain_pickle import Instance, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def make_nodes(slots=False):
    """A tree of objects of a class that is gone before its pickle is read; `parent` makes it a cycle."""
    module = types.ModuleType("published_tree_code")
    names = "('tokens', 'children', 'parent', 'value', 'log_ratio', 'extra')"
    code = "class Node:\n    " + (f"__slots__ = {names}\n" if slots else "pass\n")
    exec(code, module.__dict__)
    module.Node.__module__ = "published_tree_code"

    def node(tokens, value, log_ratio, children=(), parent=None):
        made = module.Node()
        made.tokens, made.value, made.log_ratio = tokens, value, log_ratio
        made.children, made.parent, made.extra = list(children), parent, {"set": {1, 2}, "none": None, "yes": True}
        for child in made.children:
            child.parent = made
        return made

    leaves = [node(np.array([7, 8], np.int64), 1.0, 0.25), node([9], 0.0, np.float64(-0.5))]
    inner = node(np.array([5, 6], np.int32), 0.5, np.float32(0.125), leaves)
    return module, node([1, 2, 3, 4], 1.25, 0.0, [inner, node([10, 11, 12], 2.0, 1.0)])


def dumped(protocol, slots=False):
    module, root = make_nodes(slots)
    sys.modules[module.__name__] = module
    try:
        return pickle.dumps(root, protocol)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nodes_of_a_class_that_is_gone_come_back_as_a_tree(protocol, slots):
    if slots and protocol < 2:
        pytest.skip("objects with slots cannot be pickled by protocols 0 and 1")
    root = read_pickle(dumped(protocol, slots))
    assert isinstance(root, Instance) and root.cls == "published_tree_code.Node"
    assert "published_tree_code" not in sys.modules
    tree = as_tree(root, 3, "a prompt", NodeMap(objective="help"), "here")
    assert tree.parent.tolist() == [-1, 0, 0, 1, 1] and tree.prompt_index == 3
    assert [t.tolist() for t in tree.tokens] == [[1, 2, 3, 4], [5, 6], [10, 11, 12], [7, 8], [9]]
    assert tree.log_ratio.tolist() == [0.0, 0.125, 1.0, 0.25, -0.5]
    assert tree.values["help"].tolist() == [1.25, 0.5, 2.0, 1.0, 0.0]


PLAIN = [
    None, True, False, 0, -1, 255, 1 << 15, 1 << 40, -(1 << 70), 0.0, -1.5, 1e308, float("inf"), "",
    "a\nb\\'\"", "é☃\U0001f600",
    b"", b"\x00\xff\n", "x" * 300, b"y" * 300, [], [1, [2, [3]]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {},
    {"a": 1, 2: "b", (1, 2): 3},
    set(), {1, "a"}, {"deep": [{"er": ({"est": [1.0]},)}]}, ["same", "same"], collections.OrderedDict(a=1, b=[2]),
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_come_back_as_pickle_gives_them(protocol):
    for value in [*PLAIN, PLAIN]:
        data = pickle.dumps(value, protocol)
        assert read_pickle(data) == pickle.loads(data) == value
    shared = [1, 2]
    again = read_pickle(pickle.dumps([shared, shared], protocol))
    assert again[0] is again[1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "f2", "<f4", ">f8", "?"])
def test_arrays_and_scalars_come_back_as_pickle_gives_them(protocol, dtype):
    for shape in ((), (0,), (5,), (2, 3), (2, 0, 4)):
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        for value in (array, np.asfortranarray(array)):
            back = read_pickle(pickle.dumps([value, value], protocol))
            assert back[0].dtype == value.dtype and back[0].shape == value.shape and np.array_equal(back[0], value)
            assert back[0] is back[1]
    scalar = np.array([1], dtype)[0]
    assert read_pickle(pickle.dumps(scalar, protocol)) == scalar


# ------------------------------------------------------------------------------------------------------------- hostile

FIRED = []


def fire(*args, **kwargs):  # what a hostile file would call
    FIRED.append(args)
    return {}


class Reduces:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class SetsState:
    def __getstate__(self):
        return [1]

    def __setstate__(self, state):
        fire(state)


def op(text: bytes, *more: bytes) -> bytes:
    return b"\x80\x02" + text + b"".join(more) + b"."


HERE = __name__.encode()
HOSTILE = {
    "a shell by REDUCE": pickle.dumps(Reduces(os.system, ("echo fired > /tmp/fired",))),
    "a shell by REDUCE, protocol 0": pickle.dumps(Reduces(os.system, ("echo fired > /tmp/fired",)), 0),
    "the test's function by REDUCE": pickle.dumps(Reduces(fire, (1,))),
    "eval": op(b"c__builtin__\neval\n", b"(X\x04\x00\x00\x001+1.tR"),
    "getattr": pickle.dumps(Reduces(getattr, ("x", "upper"))),
    "a call inside a state": pickle.dumps({"children": [{"tokens": Reduces(fire, (2,))}]}),
    "a call of a call's result": op(b"cbuiltins\ngetattr\n(", b"cos\nsystem\ntR)R"),
    "a class made with arguments": pickle.dumps(Reduces(datetime.date, (2020, 1, 1))),
    "a state for __setstate__": pickle.dumps(SetsState()),
    "a state with __setstate__ in it": op(b"c" + HERE + b"\nSetsState\n)\x81}X\x0c\x00\x00\x00__setstate__K\x01sb"),
    "a state with __class__ in it": op(b"c" + HERE + b"\nSetsState\n)\x81}X\x09\x00\x00\x00__class__K\x01sb"),
    "one state on another": op(b"c" + HERE + b"\nSetsState\n)\x81}b}b"),
    "a state on a class": op(b"c" + HERE + b"\nSetsState\n}b"),
    "a state on a list": op(b"]}b"),
    "INST": b"(S'echo fired > /tmp/fired'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'echo fired > /tmp/fired'\no.",
    "a persistent id": b"Pfire\n.",
    "a binary persistent id": op(b"X\x04\x00\x00\x00fireQ"),
    "EXT1": op(b"\x82\x01"), "EXT2": op(b"\x83\x01\x00"), "EXT4": op(b"\x84\x01\x00\x00\x00"),
    "an out-of-band buffer": b"\x80\x05\x97.",
    "a memo entry that is not there": op(b"h\x07"),
    "NEWOBJ of a string": op(b"X\x01\x00\x00\x00a)\x81"),
    "NEWOBJ with arguments": op(b"cos\nsystem\nX\x01\x00\x00\x00a\x85\x81"),
    "a name made of numbers": b"\x80\x04K\x01K\x02\x93.",
    "an object of a built-in base": op(b"ccopy_reg\n_reconstructor\n(c" + HERE + b"\nfire\nc__builtin__\nlist\n]tR"),
    "a list as a key": op(b"}]K\x01s"), "an object as a key": op(b"}c" + HERE + b"\nfire\n)\x81K\x01s"),
    "an empty stack": b".", "two things at the end": op(b"K\x01K\x02"), "a mark at the end": op(b"("),
    "an append to a number": op(b"K\x01K\x02a"), "items without a mark": op(b"]K\x01e"), "a bad opcode": op(b"\xff"),
    "no STOP": b"\x80\x02K\x01", "nothing": b"", "text": b"not a pickle at all",
    "an array of objects": pickle.dumps(np.array([{}, fire], object)),
    "an array of text": pickle.dumps(np.array(["abc"])),
    "an array larger than its bytes": pickle.dumps(np.zeros(4)).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "a structured array": pickle.dumps(np.zeros(2, [("a", "i4")])),
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a length behind the end": op(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_is_executed(kind, tmp_path, capsys, monkeypatch):
    FIRED.clear()
    called = []
    for function in ("system", "popen"):
        monkeypatch.setattr(os, function, lambda *a: called.append(a))
    "".encode("raw_unicode_escape")  # protocol 0 needs the codec, which is imported at its first use
    monkeypatch.setattr("builtins.__import__", watched := _Imports(__import__))
    file = tmp_path / "hostile.pkl"
    file.write_bytes(HOSTILE[kind])
    watched.on = True
    assert run(lambda: print(read_pickle(file.read_bytes(), str(file)))) == 1
    watched.on = False
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {file}") and err.count("\n") == 1 and len(err) < 500 and "Traceback" not in err
    assert not out and not FIRED and not called and not watched.seen


class _Imports:
    """__import__ that notes what is imported while a file is read."""

    def __init__(self, real):
        self.real, self.seen, self.on = real, [], False

    def __call__(self, name, *args, **kwargs):
        if self.on and name not in ("pickletools", "warnings", "utils.sharding"):  # what the message itself needs
            self.seen.append(name)
        return self.real(name, *args, **kwargs)


@pytest.mark.parametrize("name", ["a shell by REDUCE", "EXT1", "INST", "a persistent id"])
def test_the_refusal_names_what_was_asked_for_and_where(name):
    said = {"a shell by REDUCE": r"REDUCE at byte \d+: a call of (posix|os)\.system", "EXT1": "EXT1 at byte 2",
            "INST": r"INST at byte \d+", "a persistent id": "PERSID at byte 0"}[name]  # fmt: skip
    with pytest.raises(DataError, match=said):
        read_pickle(HOSTILE[name])


def test_every_truncation_is_refused_or_a_whole_pickle():
    data = dumped(4)
    for length in range(len(data)):
        with pytest.raises(DataError):
            read_pickle(data[:length])


def test_bombs_end_at_a_limit(monkeypatch):
    deep = b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b"."
    root = read_pickle(deep)  # no recursion reads it ...
    with pytest.raises(DataError, match="holds no tree"):
        roots_of(root, NodeMap(), "deep")
    nested = node = {"tokens": [1], "children": []}
    for _ in range(300):
        node["children"] = [{"tokens": [1], "children": []}]
        node = node["children"][0]
    with pytest.raises(DataError, match="deeper than 200"):
        as_tree(nested, 0, "p", NodeMap(), "deep")
    layer = {"tokens": [1], "children": []}
    for _ in range(40):  # 2^40 nodes in 40 objects
        layer = {"tokens": [1], "children": [layer, layer]}
    with pytest.raises(DataError, match="also another node's child"):
        as_tree(read_pickle(pickle.dumps(layer)), 0, "p", NodeMap(), "laughs")
    layer["children"] = [layer]
    with pytest.raises(DataError, match="its own ancestor"):
        as_tree(read_pickle(pickle.dumps(layer)), 0, "p", NodeMap(), "cycle")
    for name, limit, said in (
        ("MAX_MEMO", 10, "memo entries"),
        ("MAX_OPCODES", 20, "opcodes"),
        ("MAX_BYTES", 50, "bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(plain_pickle, name, limit)
            with pytest.raises(DataError, match=f"more than {limit} ?{said}|bytes, more than {limit}"):
                read_pickle(pickle.dumps([[i] for i in range(100)]))


# ------------------------------------------------------------------------------------------------------ nodes that do


def node(tokens, *children, **more):
    return {"tokens": tokens, "children": list(children), **more}


@pytest.mark.parametrize(
    ("root", "names", "said"),
    [
        (node([1], node([2], {"text": "x"})), {}, r"node 2: the node has no tokens; .* as tokens, .*has: text \(str\)"),
        (node([1], node("abc")), {}, "no list of token ids"),
        (node([1], node([1.5])), {}, "no list of token ids"),
        (node([1], node([-1])), {}, "no list of token ids"),
        (node([1], node([])), {}, "no tokens"),
        (node([1], node([2], value=1.0)), {}, "say whose with --objective"),
        (node([1], node([2], value=float("nan"))), {"objective": "help"}, "no finite number"),
        (node([1], node([2], log_ratio="x")), {}, "log_ratio is a str, no finite number"),
        (node([1], node([2], values={"help": 1}), node([3])), {}, "some leaves have no value of help"),
        (node([1], node([2], value=1.0), value=3.0), {"objective": "help"}, "--recompute"),
        (node([1], 5), {}, "must be an object or a dictionary, found a int"),
        (node([1], node([2]), prompt=3), {"prompt": None}, "prompt's text"),
        (node([1, 2], node([3, 4])), {"tokens_are": "path"}, "do not go on from the parent's"),
    ],
)  # fmt: skip
def test_nodes_that_do_not_fit_are_refused_with_the_fields_that_were_found(root, names, said):
    names = dict(names)
    prompt = names.pop("prompt", "p")
    with pytest.raises(DataError, match=said):
        as_tree(root, 0, prompt, NodeMap(**names), "file")


def test_names_tokens_and_values_are_read_as_asked():
    root = {
        "ids": [[1, 2]],
        "kids": {"a": {"ids": np.array([1, 2, 3]), "r": {"help": 1, "harm": None}, "kl": [0.5, 0.25]}},
    }
    names = NodeMap(tokens_are="path").with_names(["children=kids", "value=r"])
    tree = as_tree(root, 0, "p", replace_recompute(names), "file")
    assert [t.tolist() for t in tree.tokens] == [[1, 2], [3]] and tree.log_ratio.tolist() == [0.0, 0.75]
    assert tree.values["help"].tolist() == [1.0, 1.0]
    with pytest.raises(UsageError, match="WHAT=NAME; did you mean 'tokens'|WHAT=NAME; .*tokens"):
        NodeMap().with_names(["token=x"])


def replace_recompute(names):
    import dataclasses

    return dataclasses.replace(names, recompute=True)


def test_the_script_makes_a_folder_of_trees_and_refuses_a_hostile_file_whole(toy, tmp_path, capsys):
    _, root = make_nodes()
    (tmp_path / "prompt2_tree.pkl").write_bytes(dumped(4))
    many = {0: node([1, 2], node([3], values={"low": 1.0}), prompt="zero"), "4": node([1], node([5, 6]), prompt="four")}
    (tmp_path / "many.pkl").write_bytes(pickle.dumps(many))
    out = tmp_path / "trees"
    common = ["--dataset", "toy", "--data_split", "test", "--output_dir", str(out)]
    common += ["--config", str(toy / "toy.yaml"), "--workspace", str(toy / "workspace")]
    files = [str(tmp_path / "prompt2_tree.pkl"), str(tmp_path / "many.pkl")]
    argv = [*files, *common, "--objective", "low", "--recompute"]
    assert run(lambda: convert_trees.main(argv)) == 0
    assert tree_indices(out) == [0, 2, 4]
    assert read_tree(out, 4).prompt == "four" and [t.tolist() for t in read_tree(out, 4).tokens] == [[1], [5, 6]]
    assert read_tree(out, 2).values["low"].tolist() == [1.25, 0.5, 2.0, 1.0, 0.0]
    assert (
        read_tree(out, 2).prompt == "\n\nHuman: w2 w3\n\nAssistant: "
    )  # of the data set's CSV, since the root has none
    before = sorted(p.name for p in out.rglob("*"))
    (tmp_path / "bad.pkl").write_bytes(HOSTILE["a shell by REDUCE"])
    capsys.readouterr()
    assert run(lambda: convert_trees.main([str(tmp_path / "bad.pkl"), *common])) == 1
    assert "refused REDUCE" in capsys.readouterr().err and before == sorted(p.name for p in out.rglob("*"))
    assert run(lambda: convert_trees.main([files[0], files[0], *common, "--objective", "low"])) == 1
    assert "both hold a tree of prompt 2" in capsys.readouterr().err
