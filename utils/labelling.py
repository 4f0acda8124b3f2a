"""Labelling trees: a leaf's value is its reward, an inner node's the mean of its children's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from utils import cli
from utils.hdf5_utils import read_tree, tree_indices, update_tree, value_names
from utils.rewards import RewardSet
from utils.sharding import Alone, Claims, share
from utils.text_formats import answer_texts
from utils.trees import Tree, expected_log_ratio

CHUNK = 32  # prompts whose trees' leaves are scored together: what a process takes at a time


def leaf_texts(tree: Tree, tokenizer) -> list[str]:
    """The response of each leaf, in the order of `tree.leaves`."""
    return answer_texts(tokenizer, [tree.response_tokens(n) for n in tree.leaves])


def label_trees(
    data_dir: Path,
    objectives: Sequence[str],
    rewards: Callable[[], RewardSet],
    tokenizer,
    relabel: bool = False,
    *,
    chunk: int = CHUNK,
    claims: Claims | Alone | None = None,
    wait: bool = False,
) -> Iterator[Tree]:
    """Score the leaves of every tree that lacks one of the objectives, write the values, and yield the tree.

    All trees of a chunk are scored where one of them lacks values, and only what lacks them is written: a reward then
    does not depend on where an earlier run was killed, also where another batch would round it otherwise.

    Args:
        rewards: loads them; called where something is to be scored.
        relabel: write the values of all trees; only for a process that labels alone.
        chunk: so many prompts' trees are scored together: those of indices n * chunk to (n + 1) * chunk - 1.
        claims, wait: as in `sharding.share`.
    """
    units: dict[str, list[int]] = {}
    for index in tree_indices(data_dir):
        units.setdefault(f"{index // chunk:07d}", []).append(index)
    written: set[int] = set()

    def lacking(unit: list[int]) -> set[int]:
        if relabel:
            return set(unit) - written
        return {i for i in unit if not value_names(data_dir, i).issuperset(objectives)}

    bar = cli.progress(total=sum(map(len, units.values())), desc="labels", unit="tree")
    for unit in share(units, done=lambda unit: not lacking(unit), claims=claims or Alone(), wait=wait):
        todo = lacking(unit)
        trees = [read_tree(data_dir, i) for i in unit]
        texts = [leaf_texts(t, tokenizer) for t in trees]
        prompts = [t.prompt for t, leaves in zip(trees, texts, strict=True) for _ in leaves]
        scores = rewards().score(prompts, [text for leaves in texts for text in leaves])
        bar.tokens(sum(len(t.response_tokens(n)) for t in trees for n in t.leaves))
        start = 0
        labelled = []
        for tree in trees:
            own = {name: scores[name][start : start + len(tree.leaves)] for name in objectives}
            start += len(tree.leaves)
            if tree.prompt_index in todo:
                labelled.append(update_tree(data_dir, tree.prompt_index, partial(_labelled, rewards=own)))
        written |= todo
        bar.update(len(trees))
        yield from labelled
    bar.close()


def _labelled(tree: Tree, rewards: Mapping[str, np.ndarray]) -> Tree:
    """The tree with the values of its leaves' rewards, {objective: (leaves,)}."""
    for objective, scores in rewards.items():
        values = np.zeros(len(tree))
        values[tree.leaves] = scores
        tree = tree.labelled(objective, values)
    return tree


def label_softly(data_dir: Path, trees: Sequence[Tree], mode: str) -> list[np.ndarray]:
    """Write the expected log-ratios (see `expected_log_ratio`) of a folder's trees and return them, a tree each."""
    found = []
    for tree in trees:
        if tree.soft != mode:
            update_tree(data_dir, tree.prompt_index, lambda now: replace(now, soft=mode))
        found.append(expected_log_ratio(tree.parent, tree.log_ratio, mode))
    return found


def variance_within(trees: Sequence[Tree], objective: str) -> tuple[float, float]:
    """(variance of the leaves' rewards, its share that lies within a prompt and so can be steered)."""
    leaves = [t.values[objective][t.leaves] for t in trees]
    total = np.concatenate(leaves).var()
    within = float(np.average([v.var() for v in leaves], weights=[len(v) for v in leaves]))
    return float(total), within / total if total > 0 else float("nan")
