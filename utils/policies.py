"""What can give a next-token distribution, for a batch of rows that are at different places of different texts.

The only place with key-value caches and attention masks. A policy holds a number of rows (slots). Each row's keys and
values lie in columns of one buffer per model; a mask says which columns are the row's own, and positions are given
explicitly, so that columns may lie in any order and a new text can take the place of a finished one at any step. All
models of a policy have read the same tokens, so they share one layout.

A step is: `distribution()` (value models score the k candidates in one masked pass), the caller's choice, `advance()`
(the chosen candidate's keys and values are kept, the reference reads the chosen token once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils import tilting
from utils.costs import forward_flops


@dataclass(frozen=True)
class Step:
    """One next-token distribution for each row; all tensors are (B, k), `values` is None where there are none."""

    token_ids: Tensor
    p_ref: Tensor
    p_tilt: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class Snapshot:
    """A row's state: what every model's cache holds of it, and its candidates for the next token."""

    length: int
    kv: list[Tensor | None]  # per model (2, layers, heads, length, head size)
    p_ref: Tensor  # (k,)
    token_ids: Tensor  # (k,)
    extras: dict[str, Tensor]  # what else a policy keeps of a row, see `_Policy.extras`


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
    """

    def __init__(self, rows: int, device: torch.device, capacity: int = 64):
        self.valid = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.width = 0  # columns in use

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def ensure(self, columns: int) -> None:
        """Room for that many columns."""
        have = self.valid.shape[1]
        if columns > have:
            more = max(columns, have + have // 2) - have
            self.valid = nn.functional.pad(self.valid, (0, more))

    def append(self) -> None:
        """Every row has read one more token, in column `width`."""
        self.ensure(self.width + 1)
        self.valid[:, self.width] = True
        self.length += 1
        self.lengths = [n + 1 for n in self.lengths]
        self.width += 1

    def step_mask(self, queries: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (B, 1, q, width + q) of q tokens at one position: each sees the row's past and itself."""
        past = self.valid[:, None, : self.width].expand(-1, queries, -1)
        own = torch.eye(queries, dtype=torch.bool, device=self.valid.device).expand(self.rows, -1, -1)
        return _additive(torch.cat([past, own], dim=-1), dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, q, W) bool to (B, 1, q, W): 0 where a query may look, the lowest number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


class SlotCache(Cache):
    """Keys and values of all layers of one model in one buffer (2, layers, rows, heads, capacity, head size)."""

    def __init__(self, layout: Layout, layers: int):
        super().__init__(layers=[])
        self.layout = layout
        self.num_layers = layers
        self.store: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write q new columns behind the layout's width; returns all columns up to them."""
        start, stop = self.layout.width, self.layout.width + key_states.shape[2]
        if layer_idx == 0:
            self.ensure(key_states, stop)
        keys, values = self.store[0, layer_idx], self.store[1, layer_idx]
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        return keys[:, :, :stop], values[:, :, :stop]

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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layout.width

    def commit(self, choice: Tensor) -> None:
        """Of k candidates in columns width..width + k, keep the chosen one in column `width`."""
        if self.store is None:
            return
        rows = torch.arange(len(choice), device=choice.device)
        chosen = self.store[:, :, rows, :, self.layout.width + choice]  # (B, 2, layers, heads, size)
        self.store[:, :, :, :, self.layout.width] = chosen.permute(1, 2, 0, 3, 4)

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


def without_adapter(model: nn.Module) -> nn.Module:
    """A transformers model without its PEFT wrapper; the adapter's layers are inside the base."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pools_mean(model: nn.Module) -> bool:
    """Whether a value model's value is the mean of its head over the response, not the head at the last token."""
    return getattr(model.config, "value_pooling", "last") == "mean"


def _head(model: nn.Module) -> nn.Module:
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
    """

    def __init__(self, model: nn.Module, heads: Sequence[nn.Module] | None = None):
        model = self.model = without_adapter(model).eval()
        self.heads = heads
        text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.num_layers = getattr(text, "num_hidden_layers", 0)
        self.context = getattr(text, "max_position_embeddings", None)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        if heads is not None:
            self.backbone = getattr(model, model.base_model_prefix)

    def read(self, token_ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Read (B, q) tokens; returns a value model's states (B, q, H), or logits (B, V) after the last token."""
        config = self.model.config
        attention = config._attn_implementation if hasattr(config, "_attn_implementation") else None
        if attention == "sdpa":
            config._attn_implementation = "mavis_grouped"
        try:
            inputs = dict(
                input_ids=token_ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            if self.heads is not None:
                return self.backbone(**inputs).last_hidden_state
            return self.model(**inputs, logits_to_keep=1).logits[:, -1]
        finally:
            if attention == "sdpa":
                config._attn_implementation = attention

    def score(self, hidden: Tensor) -> Tensor:
        """Each head's output (heads, B, q) at states (B, q, H)."""
        return torch.stack([head(hidden).squeeze(-1) for head in self.heads])


class AdapterOf(nn.Module):
    """One of the LoRA adapters on a shared base, as a language model of its own.

    The base's layers are switched to the adapter for the length of a call and off again, so that any number of policies
    cost one base's memory, and the base itself stays the reference. It is for decoding: gradients are none of its
    business.
    """

    def __init__(self, peft_model: nn.Module, adapter: str):
        super().__init__()
        from peft.tuners.tuners_utils import BaseTunerLayer

        if adapter not in peft_model.peft_config:
            raise ValueError(f"no adapter {adapter!r}; the model has {', '.join(peft_model.peft_config)}")
        self.base, self.adapter = peft_model.get_base_model(), adapter
        self.config = self.base.config
        self.layers = [m for m in self.base.modules() if isinstance(m, BaseTunerLayer)]
        self.switch(on=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def switch(self, on: bool) -> None:
        for layer in self.layers:  # PEFT's own switch would also walk every adapter's parameters, in each step
            layer._disable_adapters = not on
            layer._active_adapter = [self.adapter]

    def forward(self, *args, **inputs):
        self.switch(on=True)
        try:
            return self.base(*args, **inputs)
        finally:
            self.switch(on=False)


# ----------------------------------------------------------------------------------------------------------- policies


class _Policy:
    """Rows of texts under one or several language models whose logits are added with weights."""

    follows_reference = True  # p_ref is the reference's own probability
    objectives: tuple[str, ...] = ()  # whose values tilt, for messages

    def __init__(self, models: Sequence[nn.Module], mixture: Sequence[float], *, top_k: int, temperature: float):
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        self.top_k, self.temperature = top_k, temperature
        self.languages = [CachedModel(m) for m in models]
        self.mixture = list(mixture)
        self.value_readers: list[CachedModel] = []

    @property
    def device(self) -> torch.device:
        return self.languages[0].device

    @property
    def context(self) -> int | None:
        """Tokens that every model can attend to."""
        limits = [r.context for r in self.readers if r.context]
        return min(limits) if limits else None

    @property
    def readers(self) -> list[CachedModel]:
        return self.languages + self.value_readers

    @property
    def value_tokens(self) -> int:
        """Tokens that a value model reads for each new token of a text."""
        return self.top_k

    def work(self) -> dict[str, float]:
        """What one new token of a text takes: tokens that all language models and all value models read, and GFLOP.

        The attention to what was read before is left out, and so are an adapter's products. No GFLOP for an
        architecture that `costs` does not know.
        """
        tokens = {
            "language_tokens": float(len(self.languages)),
            "value_tokens": float(len(self.value_readers) * self.value_tokens),
        }
        try:
            flops = sum(forward_flops(r.model.config, 1, head_tokens=1) for r in self.languages)
            flops += sum(forward_flops(r.model.config, self.value_tokens) for r in self.value_readers)
        except (ValueError, AttributeError):
            return tokens
        return tokens | {"gflop": flops / 1e9}

    # ------------------------------------------------------------------------------------------------------- rows

    def open(self, rows: int) -> None:
        """Start with that many empty rows."""
        self.layout = Layout(rows, self.device)
        self.caches = [SlotCache(self.layout, r.num_layers) for r in self.readers]
        self.p_ref = self.token_ids = self.unsound = None
        # What a policy keeps of each row besides, {name: (B, ...)}: it is forked, loaded, saved and taken with the row.
        self.extras: dict[str, Tensor] = {}

    @property
    def rows(self) -> int:
        return self.layout.rows

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        response_starts: Sequence[int] | None = None,
        forbidden: Tensor | None = None,
    ) -> list[Snapshot]:
        """Read prompts (lists of token ids) in one batch; their states, to be loaded into rows as often as wanted.

        `response_starts` says where in each the response begins; without it, they are prompts to their ends.
        `forbidden` are ids of tokens that are no candidates for the next token (the ones after it may be them).
        """
        n, longest = len(prompts), max(map(len, prompts))
        tokens = torch.zeros(n, longest, dtype=torch.int64)
        valid = torch.zeros(n, longest, dtype=torch.bool)
        for i, prompt in enumerate(prompts):  # left-padded, so that every prompt ends in the last column
            tokens[i, longest - len(prompt) :] = torch.as_tensor(prompt)
            valid[i, longest - len(prompt) :] = True
        tokens, valid = tokens.to(self.device), valid.to(self.device)
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        own = torch.eye(longest, dtype=torch.bool, device=self.device)  # padding sees itself, lest its softmax be nan
        allowed = (causal & valid[:, None, :]) | own

        outputs, kv = [], []
        for reader in self.readers:
            cache = SlotCache(Layout(n, self.device), reader.num_layers)
            outputs.append(reader.read(tokens, positions, _additive(allowed, reader.dtype), cache))
            kv.append(cache.store)
        p_ref, token_ids = self._candidates(outputs[: len(self.languages)], forbidden)
        starts = [len(p) for p in prompts] if response_starts is None else response_starts
        begun = valid & (positions >= torch.as_tensor(starts, device=self.device)[:, None])
        extras = self._extras_of(prompts, outputs[len(self.languages) :], begun)
        return [
            Snapshot(
                len(prompt),
                [None if s is None else s[:, :, i, :, longest - len(prompt) : longest] for s in kv],
                p_ref[i],
                token_ids[i],
                {name: tensor[i] for name, tensor in extras.items()},
            )
            for i, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def load(self, rows: Sequence[int], snapshots: Sequence[Snapshot]) -> None:
        """Put states into rows, in place of what was there."""
        layout = self.layout
        layout.width = max(layout.width, *(s.length for s in snapshots))
        layout.ensure(layout.width)
        stop = layout.width
        if self.p_ref is None:
            k = len(snapshots[0].p_ref)
            self.p_ref = snapshots[0].p_ref.new_full((self.rows, k), 1.0 / k)
            self.token_ids = snapshots[0].token_ids.new_zeros(self.rows, k)
            self.extras = {name: x.new_zeros(self.rows, *x.shape) for name, x in snapshots[0].extras.items()}
        for row, snapshot in zip(rows, snapshots, strict=True):
            start = stop - snapshot.length
            layout.valid[row] = False
            layout.valid[row, start:stop] = True
            layout.lengths[row] = snapshot.length
            for cache, kv in zip(self.caches, snapshot.kv, strict=True):
                if kv is not None:
                    cache.ensure(kv[0, 0].unsqueeze(0).expand(self.rows, -1, -1, -1), stop)
                    cache.store[:, :, row, :, start:stop] = kv
        index = torch.as_tensor(rows, device=self.device)
        layout.length[index] = torch.as_tensor([s.length for s in snapshots], device=self.device)
        self.p_ref[index] = torch.stack([s.p_ref for s in snapshots])
        self.token_ids[index] = torch.stack([s.token_ids for s in snapshots])
        for name in snapshots[0].extras:
            self.extras[name][index] = torch.stack([s.extras[name] for s in snapshots])

    @torch.inference_mode()
    def save(self, rows: Sequence[int]) -> list[Snapshot]:
        """The states of rows, to be loaded again: how a text is forked."""
        snapshots = []
        for row in rows:
            columns = self.layout.valid[row, : self.layout.width].nonzero().squeeze(-1)
            kv = [None if c.store is None else c.store[:, :, row].index_select(3, columns) for c in self.caches]
            extras = {name: tensor[row].clone() for name, tensor in self.extras.items()}
            p_ref, token_ids = self.p_ref[row].clone(), self.token_ids[row].clone()
            snapshots.append(Snapshot(self.layout.lengths[row], kv, p_ref, token_ids, extras))
        return snapshots

    def release(self, rows: Sequence[int]) -> None:
        """Rows that nobody needs any more; they are empty until the next load."""
        index = torch.as_tensor(rows, device=self.device)
        self.layout.valid[index] = False
        self.layout.length[index] = 0
        for row in rows:
            self.layout.lengths[row] = 0

    @torch.inference_mode()
    def take(self, rows: Sequence[int], total: int) -> None:
        """Keep these rows, in that order (repeats fork), with empty ones behind up to `total`."""
        layout, empty = self.layout, total - len(rows)
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        layout.valid = nn.functional.pad(layout.valid[index], (0, 0, 0, empty))
        layout.length = nn.functional.pad(layout.length[index], (0, empty))
        layout.lengths = [layout.lengths[r] for r in rows] + [0] * empty
        for cache in self.caches:
            cache.take_rows(index, empty)
        if self.p_ref is not None:
            k = self.p_ref.shape[-1]
            self.p_ref = torch.cat([self.p_ref[index], self.p_ref.new_full((empty, k), 1.0 / k)])
            self.token_ids = torch.cat([self.token_ids[index], self.token_ids.new_zeros(empty, k)])
        for name, tensor in self.extras.items():
            self.extras[name] = torch.cat([tensor[index], tensor.new_zeros(empty, *tensor.shape[1:])])

    def _compact(self) -> None:
        """Drop columns that no row needs, once they are a good part of the buffer."""
        layout, longest = self.layout, max(self.layout.lengths)
        if layout.width <= longest + max(16, longest // 4):
            return
        columns = layout.valid[:, : layout.width].int().argsort(dim=-1, stable=True)[:, layout.width - longest :]
        layout.valid = layout.valid.gather(1, columns)
        for cache in self.caches:
            cache.take_columns(columns)
        layout.width = longest

    # ------------------------------------------------------------------------------------------------------- steps

    def _candidates(self, logits: Sequence[Tensor], forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(p_ref, token_ids) of the weighted sum of the models' logits, (B, k) each."""
        total = (
            logits[0]
            if self.mixture == [1.0]
            else sum(w * tilting.widened(x) for w, x in zip(self.mixture, logits, strict=True))
        )
        return tilting.top_k_probs(total, self.top_k, self.temperature, forbidden)

    def _values(self) -> Tensor | None:
        """The u (B, k) that tilts the candidates, or None."""
        return None

    def _extras_of(
        self, prompts: Sequence[Sequence[int]], states: Sequence[Tensor], begun: Tensor
    ) -> dict[str, Tensor]:
        """The extras of rows that have read these texts, {name: (B, ...)}.

        Args:
            states: of each value reader, (B, q, H); the texts end in the last column.
            begun: (B, q), which tokens are the response's.
        """
        return {}

    def _choose(self, choice: Tensor, tokens: Tensor) -> None:
        """What follows for the values from the candidates of index choice (B,), the tokens (B, 1), being taken."""

    @torch.inference_mode()
    def distribution(self) -> Step:
        """The next-token distribution of every row; call it once a step.

        `unsound` (B, 1 + M) then says of each row whether its distribution, and whether the values of each objective
        hold a nan or an infinity. It stays on the device: who looks there anyway looks at it too.
        """
        self.unsound_values = None
        values = self._values()
        p_tilt = (
            self.p_ref / self.p_ref.sum(-1, keepdim=True)
            if values is None
            else tilting.tilt(self.p_ref, values, self.beta)
        )
        broken = ~p_tilt.isfinite().all(-1, keepdim=True)  # (B, 1)
        self.unsound = broken if self.unsound_values is None else torch.cat([broken, self.unsound_values], dim=1)
        return Step(self.token_ids, self.p_ref, p_tilt, values)

    def complaint(self, unsound: Sequence[bool]) -> str:
        """What a row of `unsound` that is not all false says, in words."""
        named = [name for name, bad in zip(self.objectives, unsound[1:], strict=True) if bad]
        if named:
            return f"the values of {', '.join(named)} are not finite (nan or infinite)"
        tilted = ", tilted by beta," if self.objectives else ""
        return f"the reference's probabilities{tilted} are not finite (nan)"

    @torch.inference_mode()
    def advance(self, choice: Tensor) -> None:
        """Every row takes the candidate of index choice (B,); the language models read it."""
        tokens = self.token_ids.gather(1, choice.unsqueeze(1))  # (B, 1)
        layout = self.layout
        self._choose(choice, tokens)
        positions = layout.length.unsqueeze(1)
        logits, masks = [], {}
        for reader, cache in zip(self.languages, self.caches, strict=False):
            mask = masks.setdefault(reader.dtype, layout.step_mask(1, reader.dtype))
            logits.append(reader.read(tokens, positions, mask, cache))
        self.p_ref, self.token_ids = self._candidates(logits)
        layout.append()
        self._compact()


class ReferencePolicy(_Policy):
    """The reference model, cut to its top k tokens and renormalised."""

    def __init__(self, model: nn.Module, *, top_k: int = 15, temperature: float = 1.0):
        super().__init__([model], [1.0], top_k=top_k, temperature=temperature)


class MixturePolicy(_Policy):
    """Multi-objective decoding (MOD, Shi et al. 2024): the weighted sum of several policies' logits.

    Temperature, top-k cut and softmax come after the sum. Each policy has a cache of its own.

    Args:
        models: {objective: causal language model}, or a sequence of them; `AdapterOf` views share one base.
        weights: {objective: weight} of the same objectives, or a sequence in the same order; a weight of 0 drops its
            model.

    Raises:
        ValueError: models of different vocabularies.
    """

    follows_reference = False

    def __init__(self, models, weights, *, top_k: int = 15, temperature: float = 1.0):
        _, models, weights = _aligned(models, weights, "model")
        sizes = [m.get_input_embeddings().num_embeddings for m in models]
        if len(set(sizes)) > 1:
            raise ValueError(f"a mixture's models must share one vocabulary; theirs have {sizes} tokens")
        super().__init__(models, weights, top_k=top_k, temperature=temperature)


class RewardGuidedPolicy(MixturePolicy):
    """The reference guided by autoregressive reward models (GenARM, Xu et al. 2024, eq. 7 and 12).

    log p(a | s) = log p_ref(a | s) + sum_m w_m / arm_beta * log p_m(a | s) + constant, where p_m is a language model
    whose log-probabilities add up to reward m. A constant per step leaves the softmax as it is, so this is a mixture of
    logits in which the reference has weight 1.

    Args:
        reference: a causal language model; reward_models, weights: as in `MixturePolicy`.
        arm_beta: strength of the KL penalty, above 0: small values follow the reward models.
    """

    def __init__(
        self, reference, reward_models, weights, *, arm_beta: float, top_k: int = 15, temperature: float = 1.0
    ):
        if not (math.isfinite(arm_beta) and arm_beta > 0):
            raise ValueError(f"arm_beta must be a finite number above 0, got {arm_beta}")
        _, models, weights = _aligned(reward_models, weights, "reward model")
        super().__init__(
            [reference, *models],
            [1.0, *(w / arm_beta for w in weights)],
            top_k=top_k,
            temperature=temperature,
        )


class _TiltedPolicy(_Policy):
    """A reference whose candidates are tilted by the combined, normalised values of several objectives."""

    def __init__(self, reference, weights, *, beta, top_k, temperature, normalization, clip):
        if isinstance(reference, _Policy):
            reference = reference.languages[0].model
        super().__init__([reference], [1.0], top_k=top_k, temperature=temperature)
        if not math.isfinite(beta) or beta < 0:
            raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
        if normalization not in tilting.NORMALIZATIONS:
            raise ValueError(f"unknown normalization {normalization!r}; valid: {', '.join(tilting.NORMALIZATIONS)}")
        self.beta, self.normalization, self.clip = float(beta), normalization, clip
        self.weights = torch.tensor(weights, dtype=torch.float64, device=self.device)

    def _objective_values(self) -> Tensor:
        """V_m of every candidate, (M, B, k)."""
        raise NotImplementedError

    def _values(self) -> Tensor:
        values = self._objective_values()
        self.unsound_values = ~values.isfinite().all(-1).T  # (B, M)
        combined = tilting.combine(values, self.weights.to(values.dtype))
        if self.normalization == "none":
            combined = tilting.clip_values(combined, self.beta, self.clip)
        self.combined = combined  # unnormalised: what beam search ranks by
        return tilting.normalize_values(combined, self.normalization)


class MavisPolicy(_TiltedPolicy):
    """MAVIS: the reference tilted by value models (paper, eq. 5).

    Args:
        reference: a causal language model of transformers.
        value_models: {objective: model with a scalar head}, or a sequence of such models.
        weights: {objective: weight} of the same objectives, or a sequence in the same order; a weight of 0 drops its
            model.
        beta: strength of the tilt.
        normalization: "minmax" (v1), "zscore" or "none".
        clip: with "none", beta * value is at most this (v1: 6); None does not clip (v3).

    A value model whose configuration says `value_pooling: mean` values a text by the mean of its head over the
    response's tokens: extras["response"] (B, M + 1) keeps each row's sums over the response so far, and its length, and
    extras["scores"] (B, M, k), within a step, the heads' outputs at the candidates.
    """

    def __init__(
        self,
        reference,
        value_models,
        weights,
        *,
        beta: float,
        top_k: int = 15,
        temperature: float = 1.0,
        normalization: str = "minmax",
        clip: float | None = tilting.CLIP,
    ):
        self.objectives, models, weights = _aligned(value_models, weights, "value model")
        super().__init__(
            reference, weights, beta=beta, top_k=top_k, temperature=temperature, normalization=normalization, clip=clip
        )
        models = [without_adapter(m).eval() for m in models]
        # Value models that share a backbone are read in one pass: {backbone: indices of its models}.
        shared: dict[int, list[int]] = {}
        for i, model in enumerate(models):
            shared.setdefault(id(getattr(model, model.base_model_prefix)), []).append(i)
        self.value_readers = [CachedModel(models[g[0]], [_head(models[i]) for i in g]) for g in shared.values()]
        self._order = [i for group in shared.values() for i in group]  # the objectives, as the readers have them
        pools = [pools_mean(m) for m in models]
        self._pools = torch.tensor(pools, device=self.device)[:, None] if any(pools) else None

    @property
    def value_caches(self) -> list[SlotCache]:
        return self.caches[len(self.languages) :]

    def _extras_of(self, prompts, states, begun):
        if self._pools is None:
            return {}
        scores = self._scores(states)  # (B, M, q)
        sums = (scores * begun[:, None]).sum(-1)
        return {"response": torch.cat([sums, begun.sum(-1, keepdim=True).to(sums.dtype)], dim=1)}

    def _scores(self, states: Sequence[Tensor]) -> Tensor:
        """The heads' outputs at each reader's states (B, q, H), as (B, M, q) in the objectives' order."""
        return self._in_order([reader.score(x) for reader, x in zip(self.value_readers, states, strict=True)])

    def _in_order(self, scores: Sequence[Tensor]) -> Tensor:
        """Each reader's (heads, B, q) as one (B, M, q) in the objectives' order, in float32 at least."""
        rows = {m: row for m, row in zip(self._order, (row for part in scores for row in part), strict=True)}
        stacked = torch.stack([rows[m] for m in range(len(rows))], dim=1)
        return stacked if stacked.dtype == torch.float64 else stacked.float()

    def _read_values(self, tokens: Tensor) -> list[Tensor]:
        """Each reader's states (B, q, H) of q tokens (B, q) that could all be the next one, behind the layout."""
        q = tokens.shape[1]
        positions = self.layout.length.unsqueeze(1).expand(-1, q)  # all candidates stand at the next position
        masks: dict[torch.dtype, Tensor] = {}
        states = []
        for reader, cache in zip(self.value_readers, self.value_caches, strict=True):
            if reader.dtype not in masks:
                masks[reader.dtype] = self.layout.step_mask(q, reader.dtype)
            states.append(reader.read(tokens, positions, masks[reader.dtype], cache))
        return states

    def _candidate_scores(self) -> Tensor:
        """The heads' outputs (B, M, k), were each candidate the next token."""
        return self._scores(self._read_values(self.token_ids))

    def _objective_values(self) -> Tensor:
        scores = self._candidate_scores()
        if self._pools is not None:
            self.extras["scores"] = scores  # until `_choose`
            sums, count = self.extras["response"][:, :-1, None], self.extras["response"][:, -1:, None]
            scores = torch.where(self._pools, (sums + scores) / (count + 1), scores)
        return scores.transpose(0, 1)  # (M, B, k)

    def _choose(self, choice: Tensor, tokens: Tensor) -> None:
        if self._pools is not None:
            scores = self.extras.pop("scores")
            self._add_to_response(scores.gather(2, choice[:, None, None].expand(-1, scores.shape[1], 1)))
        for cache in self.value_caches:
            cache.commit(choice)

    def _add_to_response(self, scores: Tensor) -> None:
        """Take the outputs (B, M, 1) at a new token of the response into its sums."""
        self.extras["response"] += nn.functional.pad(scores[..., 0], (0, 1), value=1.0)


def last_states(states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Extras {"state <reader>": (B, H)}: what each value reader's states (B, q, H) end in."""
    return {f"state {i}": x[:, -1] for i, x in enumerate(states)}


class CandidatePolicy(MavisPolicy):
    """MAVIS with candidate heads: from the state before them, values of all k candidates at once.

    A candidate head (`candidates.CandidateHead`) predicts what the value model's own head would say at each candidate,
    so that the value model reads one token a step and not k. Of the tokens that were taken, the value model's own
    outputs count.

    Args:
        candidate_heads: {objective: CandidateHead}, or a sequence of them, like `value_models`.
        (the others as in `MavisPolicy`)
    """

    def __init__(self, reference, value_models, candidate_heads, weights, **options):
        super().__init__(reference, value_models, weights, **options)
        _, heads, _ = _aligned(candidate_heads, weights, "candidate head")
        groups = iter(self._order)
        self.candidate_heads = [[heads[next(groups)] for _ in reader.heads] for reader in self.value_readers]

    @property
    def value_tokens(self) -> int:
        return 1

    def _extras_of(self, prompts, states, begun):
        return super()._extras_of(prompts, states, begun) | last_states(states)

    def _candidate_scores(self) -> Tensor:
        return self._in_order(
            [
                torch.stack([head(self.extras[f"state {i}"], self.token_ids) for head in heads])
                for i, heads in enumerate(self.candidate_heads)
            ]
        )

    def _choose(self, choice: Tensor, tokens: Tensor) -> None:
        states = self._read_values(tokens)
        if self._pools is not None:
            self._add_to_response(self._scores(states))
        self.extras |= last_states(states)


class TokenTablePolicy(_TiltedPolicy):
    """The control that needs no value model: the same tilt with values that depend on the candidate alone.

    `tables` is {objective: (V,)} (or a sequence of tables), the value of each token whatever came before it.
    """

    def __init__(
        self,
        reference,
        tables,
        weights,
        *,
        beta: float,
        top_k: int = 15,
        temperature: float = 1.0,
        normalization: str = "minmax",
        clip: float | None = tilting.CLIP,
    ):
        self.objectives, tables, weights = _aligned(tables, weights, "token table")
        super().__init__(
            reference, weights, beta=beta, top_k=top_k, temperature=temperature, normalization=normalization, clip=clip
        )
        dtype = torch.float64 if self.languages[0].dtype == torch.float64 else torch.float32
        self.tables = torch.stack([torch.as_tensor(t, dtype=dtype, device=self.device) for t in tables])  # (M, V)

    def _objective_values(self) -> Tensor:
        return self.tables[:, self.token_ids]  # (M, B, k)


class PromptTablePolicy(_TiltedPolicy):
    """The control for a reward that depends on the prompt: each prompt has its own table of token values.

    `table_of` gives the table (V,) of a prompt's token ids, e.g. the idf of the prompt's own words.
    """

    objectives = ("the prompt's table",)

    def __init__(
        self,
        reference,
        table_of: Callable[[Sequence[int]], Tensor],
        *,
        beta: float,
        top_k: int = 15,
        temperature: float = 1.0,
        normalization: str = "minmax",
        clip: float | None = tilting.CLIP,
    ):
        super().__init__(
            reference, [1.0], beta=beta, top_k=top_k, temperature=temperature, normalization=normalization, clip=clip
        )
        self.table_of = table_of

    def _extras_of(self, prompts, states, begun):
        dtype = torch.float64 if self.languages[0].dtype == torch.float64 else torch.float32
        tables = [torch.as_tensor(self.table_of(p), dtype=dtype, device=self.device) for p in prompts]
        return {"table": torch.stack(tables)}

    def _objective_values(self) -> Tensor:
        return self.extras["table"].gather(1, self.token_ids).unsqueeze(0)  # (1, B, k)


def _aligned(things, weights, what: str) -> tuple[tuple[str, ...], list, list[float]]:
    """Names, things and weights of the objectives whose weight is not 0, in one order."""
    if isinstance(weights, Mapping):
        missing = [name for name, w in weights.items() if w != 0 and name not in things]
        if missing:
            raise ValueError(
                f"no {what} for {', '.join(missing)}, which has a weight; "
                f"given: {', '.join(map(str, things)) or 'none'}"
            )
        pairs = [(name, things[name] if w else None, w) for name, w in weights.items()]
    else:
        things = list(things.values()) if isinstance(things, Mapping) else list(things)
        if len(things) != len(weights):
            raise ValueError(f"{len(things)} of {what}, {len(weights)} weights")
        pairs = list(zip(map(str, range(len(things))), things, weights, strict=True))
    if any(not math.isfinite(w) for _, _, w in pairs):
        raise ValueError(f"weights must be finite numbers, got {[w for _, _, w in pairs]}")
    kept = [p for p in pairs if p[2] != 0]
    if not kept:
        raise ValueError(f"every weight is 0: at least one {what} must have a weight")
    return tuple(str(n) for n, _, _ in kept), [thing for _, thing, _ in kept], [float(w) for _, _, w in kept]
