"""Labelling trees: a leaf's value is its reward, an inner node's the mean of its children's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from utils import cli
from utils.hdf5_utils import read_tree, tree_indices, update_tree
from utils.rewards import RewardSet
from utils.trees import Tree, expected_log_ratio

CHUNK = 32  # trees whose leaves are scored together


def leaf_texts(tree: Tree, tokenizer) -> list[str]:
    """The response of each leaf, in the order of `tree.leaves`."""
    return tokenizer.batch_decode([tree.response_tokens(n) for n in tree.leaves], skip_special_tokens=True)


def label_trees(
    data_dir: Path, objectives: Sequence[str], rewards: RewardSet, tokenizer, relabel: bool = False
) -> Iterator[Tree]:
    """Score the leaves of every tree that lacks one of the objectives, write the values, and yield the tree."""
    indices = tree_indices(data_dir)
    bar = cli.progress(total=len(indices), desc="labels", unit="tree")
    for first in range(0, len(indices), CHUNK):
        trees = [read_tree(data_dir, i) for i in indices[first : first + CHUNK]]
        todo = [t for t in trees if relabel or any(o not in t.values for o in objectives)]
        if todo:
            texts = [leaf_texts(t, tokenizer) for t in todo]
            prompts = [t.prompt for t, leaves in zip(todo, texts, strict=True) for _ in leaves]
            scores = rewards.score(prompts, [text for leaves in texts for text in leaves])
            bar.tokens(sum(len(t.response_tokens(n)) for t in todo for n in t.leaves))
            start = 0
            for i, tree in enumerate(todo):
                own = {name: scores[name][start : start + len(tree.leaves)] for name in objectives}
                start += len(tree.leaves)
                todo[i] = update_tree(data_dir, tree.prompt_index, partial(_labelled, rewards=own))
        bar.update(len(trees))
        yield from todo
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
