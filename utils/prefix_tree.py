"""Token sequences in rows that read what they have in common once.

A row is a trie of sequences that begin alike, written in preorder: each token stands at the position that it has in its
own text, and sees its ancestors and itself. For a causal model its state is then what it would be with the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from utils.batching import length_batches

ROW_TOKENS = 768  # of a row that sequences share: its mask, and its attention, grow with the square
SHARE = 1 / 3  # of a sequence that its row must have already: less would not pay for the attention of a longer row
FULLNESS = 0.75  # a batch's shortest row by its longest: rows differ more in length than texts do
# Decoders whose attention is told by the mask and whose order by `position_ids`, and nothing else by where a token
# stands in its row; a classifier reads `score` at its text's last token. Not here: relative biases (Bloom, T5), places
# that are counted from the mask (OPT), encoders, and what nobody has tried (tests/test_prefix_tree.py tries these).
ARCHITECTURES = frozenset({"gemma", "gpt2", "gpt_neox", "llama", "mistral", "phi", "qwen2", "qwen3"})
LENGTHS_OWN_ROPE = ("dynamic", "longrope")  # rotations that depend on the longest text of a batch


@dataclass(frozen=True)
class PackedRow:
    """Some sequences as L tokens. Token i sees exactly the tokens j with `j <= i < ends[j]`."""

    tokens: np.ndarray  # (L,) int64
    positions: np.ndarray  # (L,) each token's place in its own sequences
    ends: np.ndarray  # (L,) behind the last descendant
    members: list[int]  # (m,) indices of the sequences
    paths: list[np.ndarray]  # (m,) where in the row the tokens of each one stand


def pack(sequences: Sequence[list[int]], limit: int = ROW_TOKENS) -> list[PackedRow]:
    """Rows of at most `limit` tokens that hold every sequence once; a longer sequence has a row of its own.

    A sequence joins the row of the one before it in lexicographic order, with which it shares most, where a third of
    its tokens are there already: what shares little stays alone. With a limit of 0 all do.

    Raises:
        ValueError: a sequence without tokens.
    """
    rows: list[_Growing] = []
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        ids = np.asarray(sequences[i], np.int64)
        if not len(ids):
            raise ValueError(f"sequence {i} of {len(sequences)} has no tokens")
        if rows:
            shared, size = rows[-1].shared_with(ids), rows[-1].size
            new = len(ids) - shared
        if not rows or size + new > limit or shared < SHARE * len(ids):
            rows.append(_Growing())
            shared = 0
        rows[-1].add(i, ids, shared)
    return [row.packed() for row in rows]


class _Growing:
    """A row to which sequences are added in lexicographic order, so that the tokens come in preorder."""

    def __init__(self):
        self.size = 0
        self.tokens: list[np.ndarray] = []  # of each sequence, those behind what it shares
        self.positions: list[np.ndarray] = []
        self.closed: list[tuple[np.ndarray, int]] = []  # tokens that get no more descendants, and where that is
        self.members: list[int] = []
        self.paths: list[np.ndarray] = []
        self.last = np.zeros(0, np.int64)

    def shared_with(self, ids: np.ndarray) -> int:
        """How many tokens a sequence has in common with the last one: no other of the row shares more."""
        both = min(len(ids), len(self.last))
        differ = np.flatnonzero(ids[:both] != self.last[:both])
        return int(differ[0]) if len(differ) else both

    def add(self, index: int, ids: np.ndarray, shared: int) -> None:
        path = self.paths[-1] if self.paths else np.zeros(0, np.int64)
        self.closed.append((path[shared:], self.size))
        self.tokens.append(ids[shared:])
        self.positions.append(np.arange(shared, len(ids)))
        stop = self.size + len(ids) - shared
        self.paths.append(np.concatenate([path[:shared], np.arange(self.size, stop)]))
        self.members.append(index)
        self.last, self.size = ids, stop

    def packed(self) -> PackedRow:
        ends = np.full(self.size, self.size)
        for places, end in self.closed:
            ends[places] = end
        return PackedRow(np.concatenate(self.tokens), np.concatenate(self.positions), ends, self.members, self.paths)


def tree_mask(ends, dtype=None):
    """Additive attention mask (B, 1, L, L), query by key, of rows in preorder: token i sees j where `j <= i < ends[j]`.

    Args:
        ends: (B, L) int64 tensor; padding is to see itself alone (`ends[j] = j + 1`), for no row may see nothing.
        dtype: the mask's, float32 by default.
    """
    import torch

    i = torch.arange(ends.shape[1], device=ends.device)
    visible = (i[None, :] <= i[:, None]) & (i[:, None] < ends[:, None, :])  # (B, L, L) query, key
    mask = torch.zeros(visible.shape, dtype=dtype or torch.float32, device=ends.device)
    return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[:, None]


def classifies_rows(model, longest: int) -> bool:
    """Whether a sequence-classification model of transformers reads rows of texts (up to `longest` tokens) as it reads
    each text alone: a known decoder, with a window that no text passes and an attention that takes a 4-D mask."""
    from utils.cached_models import attention_window

    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return (
        config.model_type in ARCHITECTURES
        and not config.is_encoder_decoder
        and hasattr(model, "score")
        and longest <= (attention_window(config) or longest)
        and rope not in LENGTHS_OWN_ROPE
        and config._attn_implementation in ("eager", "sdpa")
    )


def read_rows(
    backbone, sequences: Sequence[list[int]], pad_id: int, *, batch_size: int, token_budget: int, row_tokens: int
) -> Iterator[tuple[list[PackedRow], object]]:
    """Batches of B rows with the hidden states (B, L, H) of their tokens; what stands behind a row is padding.

    Args:
        backbone: headless causal model that takes an additive 4-D mask and positions. Where some text is longer than
            its attention's window, each is read alone, under the masks that the model itself makes.
        batch_size: most rows in a forward pass; token_budget: most tokens, padding included.
        row_tokens: most tokens of a row that sequences share, or twice the longest's; 0 reads each one alone.
    """
    import torch

    from utils.cached_models import attention_window, text_config

    parameter = next(backbone.parameters())
    longest = max(map(len, sequences), default=0)
    windowed = longest > (attention_window(text_config(backbone)) or longest)
    row_tokens = 0 if windowed else row_tokens
    rows = pack(sequences, min(max(row_tokens, 2 * longest), token_budget) if row_tokens else 0)
    lengths = [len(row.tokens) for row in rows]
    for batch in length_batches(lengths, batch_size, token_budget, FULLNESS):
        chosen = [rows[r] for r in batch]
        size = (len(batch), lengths[batch[0]])  # (B, L); the longest comes first
        ids, position = np.full(size, pad_id), np.zeros(size, np.int64)
        ends = np.tile(np.arange(1, size[1] + 1), (len(batch), 1))
        for b, row in enumerate(chosen):
            at = slice(len(row.tokens))
            ids[b, at], position[b, at], ends[b, at] = row.tokens, row.positions, row.ends
        ids, position, ends = (torch.as_tensor(a, device=parameter.device) for a in (ids, position, ends))
        own = torch.arange(size[1]) < torch.tensor([len(row.tokens) for row in chosen])[:, None]
        mask = own.to(ids) if windowed else tree_mask(ends, parameter.dtype)
        output = backbone(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
        yield chosen, output.last_hidden_state
