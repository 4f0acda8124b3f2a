"""Trees of generated text as flat arrays: backed-up values, expected log-ratios, checks.

Node 0 is the root and holds the prompt's tokens; every other node holds the tokens of one segment. Parents come
before their children.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Tree:
    """One prompt's tree.

    Attributes:
        parent: (N,) int64; parent[0] is -1.
        tokens: N int32 arrays; tokens[0] is what the reference read of the prompt.
        log_ratio: (N,) float64, the sum over a segment's steps of log(p_policy / p_reference); 0 for the root.
        values: {objective: (N,) float64}, empty until labelled.
        finished: (N,) bool, whether the segment ended with the end-of-sequence token.
        soft: the mode of `expected_log_ratio` that the tree is labelled with, or None.
    """

    parent: np.ndarray
    tokens: list[np.ndarray]
    log_ratio: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    prompt: str = ""
    prompt_index: int = -1
    finished: np.ndarray | None = None
    soft: str | None = None

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def leaves(self) -> np.ndarray:
        """Indices of the nodes without children."""
        inner = np.zeros(len(self.parent), bool)
        inner[self.parent[1:]] = True
        return np.flatnonzero(~inner)

    @property
    def depth(self) -> np.ndarray:
        """(N,) layers below the root; the root is 0."""
        depth = np.zeros(len(self.parent), np.int64)
        for node in range(1, len(self.parent)):
            depth[node] = depth[self.parent[node]] + 1
        return depth

    @property
    def path_lengths(self) -> np.ndarray:
        """(N,) tokens of the path root..node, the prompt's included."""
        lengths = np.array([len(t) for t in self.tokens], np.int64)
        for node in range(1, len(lengths)):
            lengths[node] += lengths[self.parent[node]]
        return lengths

    def children(self, node: int) -> np.ndarray:
        """Indices of a node's children, in order."""
        return np.flatnonzero(self.parent == node)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def path_tokens(self, node: int) -> np.ndarray:
        """All tokens from the prompt's first to the segment's last."""
        return np.concatenate([self.tokens[n] for n in self.path(node)])

    def response_tokens(self, node: int) -> np.ndarray:
        """The tokens of the path without the prompt."""
        return np.concatenate([np.zeros(0, np.int32), *(self.tokens[n] for n in self.path(node)[1:])])

    def labelled(self, objective: str, leaf_values: np.ndarray) -> Tree:
        """The tree with an objective's values: (N,) whose leaf entries are rewards, backed up to every node."""
        return replace(self, values={**self.values, objective: back_up(self.parent, leaf_values)})


def back_up(parent, leaf_values) -> np.ndarray:
    """Values of all nodes: an inner node is the mean of its children's, a leaf keeps its own.

    Args:
        parent: (N,) with parents before children and parent[0] = -1.
        leaf_values: (N,); entries of inner nodes are ignored.
    """
    parent = np.asarray(parent)
    values = np.array(leaf_values, np.float64)
    total, count = np.zeros(len(parent)), np.zeros(len(parent), np.int64)
    for node in range(len(parent) - 1, 0, -1):  # children before parents
        if count[node]:
            values[node] = total[node] / count[node]
        total[parent[node]] += values[node]
        count[parent[node]] += 1
    if len(parent) and count[0]:
        values[0] = total[0] / count[0]
    return values


def expected_log_ratio(parent, log_ratio, mode: str = "future") -> np.ndarray:
    """The log-ratio that a node's soft value pays for, (N,).

    Args:
        parent: (N,) with parents before children and parent[0] = -1.
        log_ratio: (N,), of each node's own segment.
        mode: `future` counts from the node on: 0 at a leaf, elsewhere the mean over the children of what their segment
            and their own future cost. That is the definition of a soft value. `whole` is what was published: the mean
            over the leaves below of the whole sequence's log-ratio, prefix included.
    """
    parent, own = np.asarray(parent), np.asarray(log_ratio, np.float64)
    prefix = own.copy()
    if mode == "whole":
        for node in range(1, len(parent)):
            prefix[node] += prefix[parent[node]]
        return back_up(parent, prefix)
    if mode != "future":
        raise ValueError(f"unknown mode {mode!r} of the expected log-ratio; valid: future, whole")
    future, count = np.zeros(len(parent)), np.zeros(len(parent), np.int64)
    for node in range(len(parent) - 1, -1, -1):
        if count[node]:
            future[node] /= count[node]
        if node:
            future[parent[node]] += own[node] + future[node]
            count[parent[node]] += 1
    return future


def check_tree(tree: Tree) -> None:
    """Raise a ValueError that says which invariant of a tree does not hold."""
    n, parent = len(tree.parent), tree.parent
    if n == 0 or parent[0] != -1:
        raise ValueError("a tree starts with its root, whose parent is -1")
    if (parent[1:] < 0).any() or (parent[1:] >= np.arange(1, n)).any():
        raise ValueError("a node's parent must come before it")
    if len(tree.tokens) != n or len(tree.log_ratio) != n:
        raise ValueError(f"{n} nodes, {len(tree.tokens)} token arrays, {len(tree.log_ratio)} log-ratios")
    if any(len(t) == 0 for t in tree.tokens):
        raise ValueError("a node has no tokens")
    if not np.isfinite(tree.log_ratio).all():
        raise ValueError("a log-ratio is not finite")
    for name, values in tree.values.items():
        if len(values) != n or not np.isfinite(values).all():
            raise ValueError(f"the values of {name} are not {n} finite numbers")
        if not np.allclose(values, back_up(parent, values), atol=1e-9):
            raise ValueError(f"the values of {name} are not the means of the children's")
