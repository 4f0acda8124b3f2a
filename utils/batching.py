"""Batches of texts by length: little padding, and the caller's order kept by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def length_batches(
    lengths: Sequence[int], batch_size: int, token_budget: int | None = None, fullness: float = 0.0
) -> Iterator[np.ndarray]:
    """Index arrays that cover all texts, the longest first (so that what does not fit in memory fails at once).

    Args:
        lengths: tokens of each text.
        batch_size: most texts in a batch.
        token_budget: most tokens in a batch, padding included; a longer text gets a batch of its own.
        fullness: a text with less than this share of a batch's longest begins another one; 0: none does.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    ordered = np.asarray(lengths, np.int64)[order]
    start = 0
    while start < len(order):
        size = batch_size
        if token_budget:
            size = min(size, max(1, token_budget // max(1, int(ordered[start]))))
        size = min(size, int((ordered[start:] >= fullness * ordered[start]).sum()))
        yield order[start : start + size]
        start += size


def pad_right(rows: Sequence[Sequence[int]], pad_id: int):
    """Token ids and attention mask, both (B, L) int64 tensors."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask
