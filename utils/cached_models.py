"""A transformers model and what it has read of a batch of rows: attention masks, key-value caches, one forward pass.

Each row's keys and values lie in columns of one buffer per model; a mask says which columns are the row's own, and
positions are given explicitly, so that columns may lie in any order and a new text can take the place of a finished one
at any step. Models that have read the same tokens share one layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.errors import DataError

# --------------------------------------------------------------------------------------------------------- attention


def _grouped_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """torch's attention with the queries that share a key-value head stacked, so that no key or value is repeated.

    query (B, H, q, D), key and value (B, H / G, W, D), attention_mask (B, 1, q, W).
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or groups == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    b, h, q, d = query.shape
    stacked = query.reshape(b, h // groups, groups * q, d)
    mask = attention_mask.expand(b, 1, q, -1).repeat(1, 1, groups, 1) if q > 1 else attention_mask
    out = nn.functional.scaled_dot_product_attention(
        stacked, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(b, h, q, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("mavis_grouped", _grouped_sdpa)


# ------------------------------------------------------------------------------------------------------------- caches


class Layout:
    """Which cache columns of each row hold its tokens; shared by all models of a policy.

    valid (B, capacity) bool; length (B,) int64, the number of tokens read, which is the next token's position.
    `lengths` is the same on the host, so that nothing has to be read back from a device.

    Where steps are recorded (`graphs`), nothing of a step may depend on a number of the host's: `place` (1,) int64 is
    then `width` on the device, and models read all columns that there are, behind a mask.
    """

    def __init__(self, rows: int, device: torch.device, capacity: int = 64):
        self.valid = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.width = 0  # columns in use
        self.place: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def ensure(self, columns: int) -> None:
        """Room for that many columns."""
        have = self.valid.shape[1]
        if columns > have:
            self.valid = resized(self.valid, 1, max(columns, have + have // 2))

    def fit(self, columns: int) -> None:
        """Exactly that many columns, at least those in use, and `width` on the device: a recorded step comes."""
        self.valid = resized(self.valid, 1, columns)
        if self.place is None:
            self.place = self.length.new_zeros(1)
        self.place.fill_(self.width)

    def target(self, queries: int) -> slice | Tensor:
        """The columns of the next q tokens, as an index."""
        if self.place is None:
            return slice(self.width, self.width + queries)
        return self.place + torch.arange(queries, device=self.place.device)

    def reach(self, queries: int) -> int:
        """How many columns are read with the next q tokens."""
        return self.width + queries if self.place is None else self.valid.shape[1]

    def mark(self) -> None:
        """On the device: every row has read one more token, in column `width`."""
        if self.place is None:
            self.ensure(self.width + 1)
            self.valid[:, self.width] = True
        else:
            self.valid.index_fill_(1, self.place, True)
        self.length += 1

    def count(self) -> None:
        """The same on the host."""
        self.lengths = [n + 1 for n in self.lengths]
        self.width += 1

    def step_mask(self, queries: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (B, 1, q, reach) of q tokens at one position: each sees the row's past and itself."""
        if self.place is None:
            past = self.valid[:, None, : self.width].expand(-1, queries, -1)
            own = torch.eye(queries, dtype=torch.bool, device=self.valid.device).expand(self.rows, -1, -1)
            return additive(torch.cat([past, own], dim=-1), dtype)
        columns = torch.arange(self.reach(queries), device=self.valid.device)
        return additive(self.valid[:, None] | (columns == self.target(queries)[:, None]), dtype)


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A tensor cut or filled up with zeros at the end of one dimension."""
    more = size - tensor.shape[dim]
    if more == 0:
        return tensor  # itself: another view of it would have to be copied before each recorded step
    if more < 0:
        return tensor.narrow(dim, 0, size)
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, more))


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, q, W) bool to (B, 1, q, W): 0 where a query may look, the lowest number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


class SlotCache(Cache):
    """Keys and values of all layers of one model in one buffer (2, layers, rows, heads, capacity, head size).

    A model that reads each row in several copies has the heads of all copies, one copy's after the other's.
    """

    def __init__(self, layout: Layout, layers: int, copies: int = 1):
        super().__init__(layers=[])
        self.layout = layout
        self.num_layers = layers
        self.copies = copies
        self.store: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write q new columns (rows * copies, heads, q, head size) behind the layout's width; all columns up to them.

        What is returned are views of the buffer.
        """
        queries = key_states.shape[2]
        target, stop = self.layout.target(queries), self.layout.reach(queries)
        if layer_idx == 0:
            self.ensure(key_states.unflatten(0, (-1, self.copies)).flatten(1, 2), stop)
        read = []
        for store, new in zip(self.store[:, layer_idx], (key_states, value_states), strict=True):
            columns = store.unflatten(1, (self.copies, -1)).flatten(0, 1)
            columns[:, :, target] = new
            read.append(columns[:, :, :stop])
        return read[0], read[1]

    def ensure(self, like: Tensor, columns: int) -> None:
        """Room for that many columns; `like` (B, heads, _, head size) gives the shape; unused columns are 0."""
        have = 0 if self.store is None else self.store.shape[4]
        if columns <= have:
            return
        b, heads, _, size = like.shape
        new = like.new_zeros(2, self.num_layers, b, heads, max(columns, have + have // 2, 64), size)
        if have:
            new[:, :, :, :, :have] = self.store
        self.store = new

    def fit(self, columns: int) -> None:
        """Exactly that many columns, see `Layout.fit`."""
        if self.store is not None:
            self.store = resized(self.store, 4, columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layout.width

    def commit(self, choice: Tensor) -> None:
        """Of k candidates in columns width..width + k, keep the chosen one in column `width`."""
        if self.store is None:
            return
        rows = torch.arange(len(choice), device=choice.device)
        first = self.layout.width if self.layout.place is None else self.layout.place
        chosen = self.store[:, :, rows, :, first + choice]  # (B, 2, layers, heads, size)
        self.store[:, :, :, :, self.layout.target(1)] = chosen.permute(1, 2, 0, 3, 4).unsqueeze(4)

    def take_columns(self, columns: Tensor) -> None:
        """Keep columns (B, W) of each row, in that order."""
        if self.store is not None:
            index = columns[None, None, :, None, :, None].expand(*self.store.shape[:4], -1, self.store.shape[5])
            self.store = self.store.gather(4, index)

    def take_rows(self, rows: Tensor, empty: int) -> None:
        """Keep these rows, in that order, and add empty ones behind."""
        if self.store is not None:
            kept = self.store.index_select(2, rows)
            if empty:
                shape = list(kept.shape)
                shape[2] = empty
                kept = torch.cat([kept, kept.new_zeros(shape)], dim=2)
            self.store = kept


def text_config(model: nn.Module):
    """The configuration of a model's decoder, where it is part of a larger one."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def context_length(model: nn.Module) -> int | None:
    """Tokens that a model can attend to, or None where its configuration sets no limit."""
    return getattr(text_config(model), "max_position_embeddings", None)


def attention_window(config) -> int | None:
    """How many tokens a token sees, itself included, in the layer that sees least; None where all see a whole text.

    A text of at most that many tokens is read as if there were no window. Known are `sliding_window` (Mistral, Gemma,
    Qwen, Phi-3, ...), `attention_chunk_size` (Llama 4) and GPT-Neo's local layers.
    """
    layers = set(getattr(config, "layer_types", None) or ())
    found = []
    if getattr(config, "use_sliding_window", True) and (not layers or "sliding_attention" in layers):
        found.append(getattr(config, "sliding_window", None))
    if not layers or "chunked_attention" in layers:
        found.append(getattr(config, "attention_chunk_size", None))
    if "local" in (getattr(config, "attention_layers", None) or ()):
        found.append(config.window_size)
    return min(filter(None, found), default=None)


def attended_length(model: nn.Module) -> int | None:
    """Tokens that a text may have where the project's own masks say who sees whom: they know of no windows, so it is
    the context or the window, whichever is shorter. None for no limit."""
    limits = (context_length(model), attention_window(text_config(model)))
    return min(filter(None, limits), default=None)


def refuse_biases(model: nn.Module) -> None:
    """Raise a DataError for a model that tells the order of tokens by biases on its attention (ALiBi): the project's
    own masks, for rows of texts, trees and candidates, would stand in their place."""
    config = text_config(model)
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt"):
        raise DataError(
            f"{getattr(model, 'name_or_path', '') or type(model).__name__} tells the order of tokens by biases on its "
            "attention (ALiBi), which rows of texts cannot give it; take a model with position embeddings or rotations"
        )


def without_adapter(model: nn.Module) -> nn.Module:
    """A transformers model without its PEFT wrapper; the adapter's layers are inside the base."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pools_mean(model: nn.Module) -> bool:
    """Whether a value model's value is the mean of its head over the response, not the head at the last token."""
    return getattr(model.config, "value_pooling", "last") == "mean"


def backbone_of(model: nn.Module) -> nn.Module:
    """A transformers model without its head."""
    return getattr(model, model.base_model_prefix)


def head_of(model: nn.Module) -> nn.Module:
    """A value model's scalar head."""
    for name in ("score", "classifier"):
        if hasattr(model, name):
            return getattr(model, name)
    raise ValueError(f"a value model needs a scalar head named score; {type(model).__name__} has none")


class CachedModel:
    """A transformers model and its rows' cache; for a value model, with the scalar heads that read its states.

    Args:
        heads: of the value models that share this one's backbone; they are applied to every token it reads. None: a
            language model.
        members: where the backbone is an `AdapterStack`, each head's member: every member reads a copy of each row.
    """

    def __init__(
        self, model: nn.Module, heads: Sequence[nn.Module] | None = None, members: Sequence[int] | None = None
    ):
        model = self.model = without_adapter(model).eval()
        refuse_biases(model)
        self.heads = heads
        self.members = None if members is None else tuple(members)
        self.copies = 1 if members is None else len(members)
        self.num_layers = getattr(text_config(model), "num_hidden_layers", 0)
        self.context = attended_length(model)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.attention_config = model.config
        if heads is not None:
            self.backbone = backbone_of(model)
            # One that value models share reads that of the model which it came with.
            self.attention_config = getattr(self.backbone, "config", model.config)

    def new_cache(self, layout: Layout) -> SlotCache:
        """An empty cache for a layout's rows."""
        return SlotCache(layout, self.num_layers, self.copies)

    def read(self, token_ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Read (B, q) tokens; a language model's logits (B, V) after the last token, or a value model's states.

        Returns:
            the states as (B, copies, q, H): one for all heads, or a member's own for each.
        """
        inputs = dict(position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
        with grouped_attention(self.attention_config):
            if self.heads is None:
                return self.model(input_ids=token_ids, **inputs, logits_to_keep=1).logits[:, -1]
            if self.members is None:
                return self.backbone(input_ids=token_ids, **inputs).last_hidden_state.unsqueeze(1)
            return self.backbone.read(self.members, token_ids, **inputs)

    def score(self, states: Tensor) -> Tensor:
        """Each head's output (heads, B, q) at what `read` gave."""
        of_heads = states.expand(-1, len(self.heads), -1, -1).unbind(1)
        return torch.stack([head(x).squeeze(-1) for head, x in zip(self.heads, of_heads, strict=True)])


@contextlib.contextmanager
def grouped_attention(config):
    """Let a model that uses torch's attention use `_grouped_sdpa` meanwhile."""
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        yield
        return
    config._attn_implementation = "mavis_grouped"
    try:
        yield
    finally:
        config._attn_implementation = attention
