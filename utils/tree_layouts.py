"""Nodes of trees as rows of tokens that a model reads, and batches of rows.

The value of a node is `score(hidden state at the last token of the path root..node)`. Two ways to read the nodes give
the same values, and with them the same loss and gradients:

- `node`, as published: one right-padded path per node;
- `tree`: a tree's tokens once, in preorder, each token seeing its own path only. A tree of 28 nodes has about a
  quarter of its paths' tokens.

Both are one `Layout`: a set of nodes of one tree that is read in one row. A path is a layout with one node in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.prefix_tree import tree_mask
from utils.tree_examples import Example

TOKENS_PER_PASS = 8192  # padded tokens of one forward pass; what has more is done in several
Unit = tuple[int, np.ndarray]  # (index of an example, nodes that are read in one row)


@dataclass(frozen=True)
class Layout:
    """Nodes of one tree, read in one row of L tokens: the union of their paths, in preorder.

    A token i sees exactly the tokens j with `j <= i < ends[j]`: in preorder a segment's descendants follow it directly,
    so `ends[j]`, where they end, says who reads token j.
    """

    tokens: np.ndarray  # (L,) int64
    positions: np.ndarray  # (L,) each token's place on its own path
    ends: np.ndarray  # (L,)
    places: np.ndarray  # (m,) the positions that are trained on: each node's last token, or all of its tokens
    targets: np.ndarray  # (m,) float32
    weights: np.ndarray  # (m,) float32, 1 for each node in all
    nodes: np.ndarray  # (m,) int64, the node of the tree that is trained there
    response: int  # where the prompt ends

    @property
    def is_path(self) -> bool:
        """Whether causal attention says the same."""
        return bool((self.ends == len(self.tokens)).all())


def lay_out(example: Example, nodes: Sequence[int], dense: bool = False) -> Layout:
    """The row that reads `nodes` and their ancestors once each; `dense` puts a node's target at each of its tokens."""
    parent, tokens = example.tree.parent, example.tree.tokens
    needed = set()
    for node in nodes:
        node = int(node)
        while node >= 0 and node not in needed:
            needed.add(node)
            node = int(parent[node])
    order = [n for n in example.preorder if n in needed]
    stop, length = {}, 0
    for node in order:
        length += len(tokens[node])
        stop[node] = length
    end = dict(stop)
    for node in reversed(order[1:]):
        above = int(parent[node])
        end[above] = max(end[above], end[node])
    paths = example.path_lengths
    nodes = np.asarray(nodes, np.int64)
    sizes = np.array([len(tokens[n]) if dense else 1 for n in nodes], np.int64)
    owners = np.repeat(nodes, sizes)
    places = np.concatenate(
        [np.arange(stop[int(n)] - size, stop[int(n)]) for n, size in zip(nodes, sizes, strict=True)]
    )
    return Layout(
        tokens=np.concatenate([tokens[n] for n in order]).astype(np.int64),
        positions=np.concatenate([np.arange(paths[n] - len(tokens[n]), paths[n]) for n in order]),
        ends=np.concatenate([np.full(len(tokens[n]), end[n]) for n in order]),
        places=places,
        targets=example.targets[owners].astype(np.float32),
        weights=np.repeat(1 / sizes, sizes).astype(np.float32),
        nodes=owners,
        response=len(tokens[0]),
    )


@dataclass(frozen=True)
class Batch:
    """Layouts padded on the right to one length, on the device."""

    inputs: dict[str, torch.Tensor]  # what the backbone reads
    rows: torch.Tensor  # (m,) the rows of what is trained on
    places: torch.Tensor  # (m,) and its positions there
    targets: torch.Tensor  # (m,) float32
    weights: torch.Tensor  # (m,) float32
    ends: torch.Tensor  # (B, L), see `Layout`
    response: torch.Tensor  # (B,)


def collate(layouts: Sequence[Layout], device=None) -> Batch:
    """B layouts to tensors (B, L). Paths get an ordinary 2-D mask, trees a 4-D additive one."""
    size, length = len(layouts), max(len(x.tokens) for x in layouts)
    tokens, positions = np.zeros((size, length), np.int64), np.zeros((size, length), np.int64)
    ends = np.tile(np.arange(1, length + 1), (size, 1))  # padding sees, and is seen by, itself alone
    for row, x in enumerate(layouts):
        tokens[row, : len(x.tokens)], positions[row, : len(x.tokens)] = x.tokens, x.positions
        ends[row, : len(x.tokens)] = x.ends

    def put(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    inputs = {"input_ids": put(tokens)}
    if all(x.is_path for x in layouts):
        real = [np.arange(length) < len(x.tokens) for x in layouts]
        inputs["attention_mask"] = put(np.stack(real).astype(np.int64))
    else:
        inputs |= {"attention_mask": tree_mask(put(ends)), "position_ids": put(positions)}  # (B, 1, L, L), (B, L)
    return Batch(
        inputs,
        rows=put(np.repeat(np.arange(size), [len(x.places) for x in layouts])),
        places=put(np.concatenate([x.places for x in layouts])),
        targets=put(np.concatenate([x.targets for x in layouts])),
        weights=put(np.concatenate([x.weights for x in layouts])),
        ends=put(ends),
        response=put(np.array([x.response for x in layouts])),
    )


def response_mean(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """(m, L) weights of the mean over the response's tokens, from its first to each place."""
    j = torch.arange(batch.ends.shape[1], device=batch.ends.device)
    place = batch.places[:, None]
    own = (j <= place) & (place < batch.ends[batch.rows]) & (j >= batch.response[batch.rows, None])
    return own.to(dtype) / own.sum(-1, keepdim=True).clamp(min=1)


def passes(layouts: Sequence[Layout], max_tokens: int = TOKENS_PER_PASS) -> list[list[int]]:
    """Indices of layouts in groups of like length, each at most `max_tokens` padded tokens (or one layout)."""
    order = sorted(range(len(layouts)), key=lambda i: len(layouts[i].tokens))
    groups: list[list[int]] = []
    for i in order:  # growing lengths: the newest is the group's padded length
        if not groups or (len(groups[-1]) + 1) * len(layouts[i].tokens) > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def make_units(examples: Sequence[Example], packing: str, batch_size: int) -> list[Unit]:
    """The rows of an epoch; a tree's nodes are cut, in preorder, into near-equal parts where they exceed a batch."""
    if packing == "node":
        return [(i, nodes) for i, x in enumerate(examples) for nodes in x.nodes[:, None]]
    if packing != "tree":
        raise ValueError(f"unknown packing {packing!r}; valid: node, tree")
    parts = [max(1, round(len(x.nodes) / batch_size)) for x in examples]
    return [(i, nodes) for i, x in enumerate(examples) for nodes in np.array_split(x.nodes, parts[i])]


def unit_tokens(example: Example, nodes: np.ndarray) -> int:
    """How many tokens the unit's row has."""
    return int(example.path_lengths[nodes[0]]) if len(nodes) == 1 else len(lay_out(example, nodes).tokens)
