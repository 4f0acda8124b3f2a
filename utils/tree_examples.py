"""What a value model learns from a tree: which of its nodes, and what each of them is worth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.errors import DataError
from utils.trees import Tree, expected_log_ratio


def node_targets(tree: Tree, objective: str, kl_penalty: float = 0.0, log_ratio: str | None = None) -> np.ndarray:
    """(N,) soft values (paper eq. 8): value - kl_penalty * expected log-ratio, of the label's mode or the future's."""
    values = np.asarray(tree.values[objective], np.float64)
    if kl_penalty == 0:
        return values
    return values - kl_penalty * expected_log_ratio(tree.parent, tree.log_ratio, log_ratio or tree.soft or "future")


def _readable(tree: Tree) -> np.ndarray:
    """(N,) nodes that can be trained on: not the root, and with a token of their own."""
    readable = np.array([len(t) > 0 for t in tree.tokens])
    readable[0] = False
    return readable


def training_nodes(tree: Tree, deepest_fraction: float, seed: int) -> np.ndarray:
    """Every node but the root, with a fraction of this tree's deepest level (its own, not the data set's).

    The choice is a function of (seed, prompt index) alone, not of which trees come before.
    """
    depth, readable = tree.depth, _readable(tree)
    deepest = np.flatnonzero(readable & (depth == depth.max()))
    if deepest_fraction < 1:
        generator = np.random.default_rng([seed, tree.prompt_index + 1])
        left_out = len(deepest) - round(deepest_fraction * len(deepest))
        readable[generator.choice(deepest, size=left_out, replace=False)] = False
    return np.flatnonzero(readable)


def validation_nodes(tree: Tree) -> np.ndarray:
    """Inner nodes only: a leaf's target is one reward, an inner node's a mean that says more about the value."""
    inner = _readable(tree)
    inner[tree.leaves] = False
    return np.flatnonzero(inner)


@dataclass(frozen=True)
class Example:
    """A tree with the nodes that are read of it and the targets of all its nodes."""

    tree: Tree
    nodes: np.ndarray  # (n,) in preorder
    targets: np.ndarray  # (N,) float64

    @cached_property
    def preorder(self) -> list[int]:
        return preorder(self.tree.parent)

    @cached_property
    def path_lengths(self) -> np.ndarray:
        """(N,) tokens of the path root..node."""
        return self.tree.path_lengths


def preorder(parent) -> list[int]:
    """All nodes, each before its descendants and these directly after it."""
    children: list[list[int]] = [[] for _ in parent]
    for node in range(len(parent) - 1, 0, -1):
        children[parent[node]].append(node)  # the last child first, so that the stack gives the first one first
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(children[node])
    return order


def make_examples(
    trees: Iterable[Tree],
    objective: str,
    choose: Callable[[Tree], np.ndarray],
    *,
    kl_penalty: float = 0.0,
    log_ratio: str | None = None,
    vocab_size: int | None = None,
    data_dir: str | Path = "",
) -> list[Example]:
    """Trees to examples; `choose` says which nodes (see `training_nodes`). Trees without any are left out.

    Raises:
        DataError: a tree has no values of the objective, a value that is not finite, or tokens beyond `vocab_size`;
            soft values of trees that are labelled with different log-ratios.
    """
    examples, modes = [], set()
    for tree in trees:
        modes.add(tree.soft)
        if kl_penalty and log_ratio is None and len(modes) > 1:
            raise DataError(
                f"the trees in {data_dir} are labelled with different log-ratios; say which with --log_ratio, or label "
                f"them again: python label_tree.py {data_dir} {objective} --soft"
            )
        name = f"the tree of prompt {tree.prompt_index}" + (f" in {data_dir}" if str(data_dir) else "")
        if objective not in tree.values:
            found = ", ".join(sorted(tree.values)) or "none"
            raise DataError(
                f"{name} has no values of {objective!r} (found: {found}); label the trees first: "
                f"python label_tree.py {data_dir} {objective}"
            )
        targets = node_targets(tree, objective, kl_penalty, log_ratio)
        if not np.isfinite(targets).all():
            raise DataError(f"{name} has values of {objective!r} that are not finite; label it again")
        largest = max((int(t.max()) for t in tree.tokens if len(t)), default=0)
        if vocab_size is not None and largest >= vocab_size:
            raise DataError(
                f"{name} has token {largest}, the value model knows {vocab_size} tokens: the trees were made with "
                "another tokenizer; use the configuration that made them"
            )
        chosen = set(choose(tree).tolist())
        if chosen:
            order = preorder(tree.parent)
            examples.append(Example(tree, np.array([n for n in order if n in chosen], np.int64), targets))
    return examples


def fingerprint(*splits: Sequence[Example]) -> str:
    """What is trained on, in short: a resumed training must see the same nodes, tokens and targets."""
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(b"split")
        for example in examples:
            digest.update(np.int64(example.tree.prompt_index).tobytes())
            digest.update(example.nodes.tobytes())
            digest.update(example.targets[example.nodes].astype("<f8").tobytes())
            for tokens in example.tree.tokens:
                digest.update(np.asarray(tokens, "<i4").tobytes() + b"|")
    return digest.hexdigest()[:16]
