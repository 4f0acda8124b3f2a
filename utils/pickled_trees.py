"""Published trees, which are Python pickles of node objects, to the project's own; `plain_pickle` reads the pickles."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import DataError, UsageError, nearest
from utils.plain_pickle import Global, Instance, read_pickle
from utils.trees import Tree, back_up

MAX_NODES = 1_000_000  # of a tree
MAX_DEPTH = 200  # of a tree

# What a node may call each thing, in the order of preference; `--field` puts another name in front.
FIELDS: dict[str, tuple[str, ...]] = {
    "children": ("children", "child_nodes", "childs"),
    "tokens": ("tokens", "token_ids", "input_ids", "ids"),
    "log_ratio": ("log_ratio", "log_ratios", "logratio", "kl", "KL"),
    "value": ("values", "value", "rewards", "reward"),
    "finished": ("finished", "is_finished", "eos", "terminal"),
    "prompt": ("prompt", "prompt_text", "question"),
    "prompt_index": ("prompt_index", "index", "prompt_id"),
}


@dataclass(frozen=True)
class NodeMap:
    """How nodes are read.

    Attributes:
        fields: {what: names that a node may give it}, see `FIELDS`.
        tokens_are: `segment`, a node's own tokens; `path`, all tokens from the prompt's first to the node's last.
        objective: whose values they are, where a node has one number and not one per objective.
        recompute: take the leaves' values alone, whatever inner nodes say.
    """

    fields: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(FIELDS))
    tokens_are: str = "segment"
    objective: str = ""
    recompute: bool = False

    def with_names(self, given: Sequence[str]) -> NodeMap:
        """With the `what=name` of the command line in front."""
        fields = dict(self.fields)
        for text in given:
            what, _, name = text.partition("=")
            if what not in fields or not name:
                raise UsageError(f"--field {text!r} must be WHAT=NAME; {nearest(what, fields)}")
            fields[what] = (name, *fields[what])
        return replace(self, fields=fields)


def entries_of(node, what: str) -> dict:
    """A node's entries by name."""
    entries = node.attributes or {} if isinstance(node, Instance) else node
    if not isinstance(entries, dict):
        raise DataError(f"{what}: a node must be an object or a dictionary, found {_described(node)}")
    return entries


def _described(value) -> str:
    if isinstance(value, Instance):
        return f"an object of {value.cls}"
    if isinstance(value, Global):
        return f"the name {value.name}"
    return f"a {type(value).__name__}"


def roots_of(data, mapping: NodeMap, what: str) -> list[tuple[int | None, Any]]:
    """The trees of a pickle, (prompt index or None, root): one root, a sequence of them, or {index: root}."""

    def is_node(value) -> bool:
        entries = value.attributes if isinstance(value, Instance) else value
        return isinstance(entries, dict) and any(
            n in entries for k in ("children", "tokens") for n in mapping.fields[k]
        )

    if is_node(data):
        return [(None, data)]
    if isinstance(data, (list, tuple)) and data and all(map(is_node, data)):
        return [(None, root) for root in data]
    if isinstance(data, dict) and data and all(map(is_node, data.values())):
        return [
            (k if type(k) is int else int(k) if isinstance(k, str) and k.isdecimal() else None, v)
            for k, v in data.items()
        ]
    entries = data.attributes if isinstance(data, Instance) else data
    found = ", ".join(map(str, list(entries)[:20])) if isinstance(entries, dict) else _described(data)
    raise DataError(
        f"{what} holds no tree: a node needs its children ({', '.join(mapping.fields['children'])}) or its tokens "
        f"({', '.join(mapping.fields['tokens'])}); found: {found or 'nothing'}; name them with --field"
    )


class _Node:
    """Typed access to a node's entries, with messages that list what was found."""

    def __init__(self, node, mapping: NodeMap, place: str):
        self.entries, self.mapping, self.place = entries_of(node, place), mapping, place

    def get(self, what: str, default=None):
        return next((self.entries[n] for n in self.mapping.fields[what] if n in self.entries), default)

    def fail(self, what: str, problem: str) -> DataError:
        found = ", ".join(f"{k} ({_described(v)[2:]})" for k, v in list(self.entries.items())[:20])
        return DataError(
            f"{self.place}: {problem}; {what} is looked for as {', '.join(self.mapping.fields[what])}; the node has: "
            f"{found or 'nothing'}; name it with --field {what}=NAME"
        )

    def children(self) -> list:
        value = self.get("children")
        if value is None:
            return []
        value = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(value, (list, tuple)):
            raise self.fail("children", f"children are {_described(value)}")
        return list(value)

    def tokens(self) -> np.ndarray | None:
        value = self.get("tokens")
        if value is None:
            return None
        try:
            array = np.asarray(value)
        except (ValueError, TypeError):  # a ragged list, objects
            array = np.zeros(0, object)
        if array.ndim == 2 and len(array) == 1:  # (1, T), as a model was given them
            array = array[0]
        if array.size == 0 and isinstance(value, (list, tuple)) and not value:
            array = np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any() or (array >= 1 << 31).any():
            raise self.fail("tokens", "tokens are no list of token ids")
        return array.astype(np.int64)

    def number(self, what: str, value) -> float:
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.fail(
                what, f"{what} is {value if isinstance(value, float) else _described(value)}, no finite number"
            )
        return float(value)

    def log_ratio(self) -> float:
        value = self.get("log_ratio")
        if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.size > 1):
            return math.fsum(self.number("log_ratio", v) for v in np.asarray(value, object).reshape(-1).tolist())
        return 0.0 if value is None else self.number("log_ratio", value)

    def values(self) -> dict[str, float]:
        value = self.get("value")
        if value is None:
            return {}
        if isinstance(value, dict):
            return {str(k): self.number("value", v) for k, v in value.items() if v is not None}
        if not self.mapping.objective:
            raise self.fail("value", "the node has one value; say whose with --objective NAME")
        return {self.mapping.objective: self.number("value", value)}


def as_tree(root, prompt_index: int, prompt: str | None, mapping: NodeMap, place: str, encode=None) -> Tree:
    """A root node and all below it as a `Tree`, in the order of layers.

    Args:
        prompt: the data set's prompt, where the root does not have it.
        encode: text of a prompt to token ids, for a root without tokens.

    Raises:
        DataError: nodes that do not fit; the message lists the fields that were found.
    """
    parents, tokens, log_ratios, finished, values = [-1], [], [], [], []
    queue, seen = [(root, 0)], {id(root)}
    prefixes: list[np.ndarray] = []
    for number, (raw, depth) in enumerate(queue):  # grows while it is walked: a layer at a time
        node = _Node(raw, mapping, f"{place}, node {number}")
        if depth > MAX_DEPTH:
            raise DataError(f"{place}: deeper than {MAX_DEPTH} layers")
        own = node.tokens()
        if number == 0:
            text = node.get("prompt")
            prompt = text if isinstance(text, str) else prompt
            if own is None and isinstance(prompt, str) and encode is not None:
                own = np.asarray(encode(prompt), np.int64)
        if own is None or (mapping.tokens_are == "segment" and len(own) == 0):
            raise node.fail("tokens", "the node has no tokens")
        whole = own
        if mapping.tokens_are == "path" and number:
            before = prefixes[parents[number]]
            if len(own) <= len(before) or not np.array_equal(own[: len(before)], before):
                raise node.fail(
                    "tokens", "the tokens do not go on from the parent's (they are segments: --tokens segment)"
                )
            own = own[len(before) :]
        if mapping.tokens_are == "path":
            prefixes.append(whole)
        tokens.append(own.astype(np.int32))
        log_ratios.append(node.log_ratio() if number else 0.0)
        finished.append(node.get("finished"))
        values.append(node.values())
        for child in node.children():
            if id(child) in seen:
                raise DataError(f"{node.place}: a child is also another node's child or its own ancestor")
            seen.add(id(child))
            parents.append(number)
            queue.append((child, depth + 1))
            if len(queue) > MAX_NODES:
                raise DataError(f"{place}: more than {MAX_NODES} nodes")
    if not isinstance(prompt, str):
        raise _Node(root, mapping, f"{place}, node 0").fail("prompt", "the tree does not have its prompt's text")
    tree = Tree(
        parent=np.array(parents, np.int64), tokens=tokens, log_ratio=np.array(log_ratios), prompt=prompt,
        prompt_index=prompt_index,
        finished=np.array([bool(f) for f in finished]) if all(isinstance(f, bool) for f in finished[1:]) else None,
    )  # fmt: skip
    return _labelled(tree, values, mapping, place)


def _labelled(tree: Tree, values: Sequence[Mapping[str, float]], mapping: NodeMap, place: str) -> Tree:
    """The tree with the values of every objective that all leaves have."""
    leaves = tree.leaves
    names = set.intersection(*(set(values[n]) for n in leaves)) if len(leaves) else set()
    if missing := {name for v in values for name in v} - names:
        raise DataError(f"{place}: some leaves have no value of {', '.join(sorted(missing))}")
    for name in sorted(names):
        given = np.array([v.get(name, math.nan) for v in values])
        backed = back_up(tree.parent, np.where(np.isnan(given), 0.0, given))
        if not mapping.recompute and (np.abs(given - backed) > 1e-4).any():  # nan: an inner node without a value
            node = int(np.flatnonzero(np.abs(given - backed) > 1e-4)[0])
            raise DataError(
                f"{place}, node {node}: its value of {name} is {given[node]:g}, the mean of its children's "
                f"{backed[node]:g}; --recompute takes the leaves' values alone"
            )
        tree = tree.labelled(name, given)
    return tree


def read_trees_of(path: Path, mapping: NodeMap, first: int, prompt_of, encode=None) -> list[Tree]:
    """The trees of a pickle file.

    A tree's prompt is the one that its root says (`prompt_index`), or its key in a dictionary, or, for a file with one
    tree, the number in the file's name (prompt12_tree.pkl), or else `first` and so on.
    """
    roots = roots_of(read_pickle(path.read_bytes(), str(path)), mapping, str(path))
    numbers = re.findall(r"\d+", path.stem)
    trees = []
    for place, (key, root) in enumerate(roots):
        where = f"{path}, tree {place}"
        said = _Node(root, mapping, where).get("prompt_index", key)
        index = said if type(said) is int else int(numbers[-1]) if len(roots) == 1 and numbers else first + place
        if index < 0:
            raise DataError(f"{where}: prompt index {index}")
        trees.append(as_tree(root, index, prompt_of(index), mapping, where, encode))
    return trees
