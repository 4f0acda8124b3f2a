"""Growing trees: many prompts' trees in one batch, each segment forked from its parent's cached row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils import tilting
from utils.completions import Completion, check_prompts
from utils.decoding import Job, Prefix, run_jobs
from utils.policy_base import Policy
from utils.trees import Tree

LENGTH_STREAM, TOKEN_STREAM, CUT_STREAM = 1, 2, 3  # keep the randomness of lengths, tokens and cuts apart


@dataclass(frozen=True)
class TreeShape:
    """Children of the root, of every other node, layers below the root, and tokens from the prompt's end to a leaf.

    With `dynamic_splitting` a child of the root that ended by itself is cut at a random point: its tail becomes a leaf
    and the other children are grown from the cut, so that no child of the root of more than one token is a leaf.
    """

    root_children: int
    non_root_children: int
    num_layers: int
    max_new_tokens: int
    dynamic_splitting: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "dynamic_splitting" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def segment_length(tokens_left: int, layer: int, num_layers: int, key: Sequence[int]) -> int:
    """Tokens of a segment in a layer (the root's children are layer 0).

    Below the last layer it is uniform on 1 .. 2 * floor(tokens_left / (num_layers - layer)) - 1 (1 where that range is
    empty); in the last layer it is all that is left.
    """
    if layer >= num_layers - 1:
        return tokens_left
    longest = max(2 * (tokens_left // (num_layers - layer)) - 1, 1)
    draw = tilting.fold_key((*key, LENGTH_STREAM)) % (1 << 64)
    return min(1 + draw * longest // (1 << 64), tokens_left)


class _Growing:
    """One tree while it grows: segments by their path of child numbers."""

    def __init__(self):
        self.segments: dict[tuple[int, ...], tuple[list[int], float, bool]] = {}
        self.open = 0

    def as_tree(self, root: Sequence[int], prompt_index: int, prompt: str) -> Tree:
        """Flat arrays, layer by layer, each in the order of the paths: the same however the batch ran."""
        paths = [(), *sorted(self.segments, key=lambda path: (len(path), path))]
        number = {path: i for i, path in enumerate(paths)}
        segments = [(list(root), 0.0, False), *(self.segments[p] for p in paths[1:])]
        return Tree(
            parent=np.array([-1] + [number[p[:-1]] for p in paths[1:]], np.int64),
            tokens=[np.array(tokens, np.int32) for tokens, _, _ in segments],
            log_ratio=np.array([log_ratio for _, log_ratio, _ in segments], np.float64),
            finished=np.array([finished for _, _, finished in segments], bool),
            prompt=prompt,
            prompt_index=prompt_index,
        )


def grow_trees(
    policy: Policy,
    prompts: Mapping[int, Sequence[int]],
    texts: Mapping[int, str],
    shape: TreeShape,
    *,
    seed: int,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int,
    on_tokens=None,
) -> Iterator[Tree]:
    """Grow one tree per prompt and yield each as it is complete.

    Args:
        prompts: {prompt index: token ids}.
        texts: {prompt index: the data set's prompt}, kept in the tree.
        seed: with the prompt's index and a node's path it decides every token and length, so a tree does not depend on
            which other prompts ride along.
        on_tokens: called with the number of tokens of each finished segment.
    """
    check_prompts(list(prompts.values()), shape.max_new_tokens, policy.context)
    growing = {index: _Growing() for index in prompts}

    def child_jobs(index: int, path: tuple[int, ...], start, used: int, first: int = 0) -> list[Job]:
        layer, left = len(path), shape.max_new_tokens - used
        if layer >= shape.num_layers or left < 1:
            return []
        count = shape.non_root_children if path else shape.root_children
        jobs = []
        for child in range(first, count):
            key = (seed, index, *path, child)
            budget = segment_length(left, layer, shape.num_layers, key)
            goes_on = layer + 1 < shape.num_layers and budget < left
            jobs.append(Job((*key, TOKEN_STREAM), start, budget, goes_on, (index, (*path, child), used), index))
        growing[index].open += len(jobs)
        return jobs

    def split(index: int, path: tuple[int, ...], done: Completion) -> list[Job]:
        """Cut an ended child of the root: the tail is its first child; jobs of the others."""
        tokens, ratios = done.token_ids, done.step_log_ratios
        draw = tilting.fold_key((seed, index, *path, CUT_STREAM)) % (1 << 64)
        cut = 1 + draw * (len(tokens) - 1) // (1 << 64)  # 1 .. len - 1
        growing[index].segments[path] = (tokens[:cut], sum(ratios[:cut]), False)
        growing[index].segments[(*path, 0)] = (tokens[cut:], sum(ratios[cut:]), True)
        prefix = Prefix([*prompts[index], *tokens[:cut]], response_start=len(prompts[index]))
        return child_jobs(index, path, prefix, cut, first=1)

    queue: deque[Job] = deque()
    for index, tokens in prompts.items():
        queue.extend(child_jobs(index, (), Prefix(list(tokens)), 0))
    for job, completion, state in run_jobs(policy, queue, eos_token_id=eos_token_id, batch_size=batch_size):
        index, path, used = job.tag
        tree = growing[index]
        tree.segments[path] = (completion.token_ids, completion.log_ratio, completion.finished)
        if on_tokens is not None:
            on_tokens(len(completion.token_ids))
        if (
            shape.dynamic_splitting
            and len(path) == 1 < shape.num_layers
            and completion.finished
            and len(completion.token_ids) > 1
        ):
            queue.extendleft(reversed(split(index, path, completion)))
        if state is not None:  # depth first, so that few states wait for their turn
            queue.extendleft(reversed(child_jobs(index, path, state, used + len(completion.token_ids))))
        tree.open -= 1
        if tree.open == 0:
            yield growing.pop(index).as_tree(prompts[index], index, texts[index])
