"""Rows of texts under one or several models: what every policy shares.

A policy holds a number of rows (slots), each at its own place of its own text, and a new text can take the place of a
finished one at any step (`cached_models` has the caches). All models of a policy have read the same tokens, so they
share one layout.

A step is: `distribution()` (value models score the k candidates in one masked pass), the caller's choice, `advance()`
(the chosen candidate's keys and values are kept, the reference reads the chosen token once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils import tilting
from utils.cached_models import CachedModel, Layout, SlotCache, additive
from utils.costs import forward_flops
from utils.graphs import Place, StepGraphs

GRAPH_COLUMNS = 64  # recorded steps read a multiple of that many cache columns: few shapes, and few columns for nothing


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
    extras: dict[str, Tensor]  # what else a policy keeps of a row, see `Policy.extras`


class Policy:
    """Rows of texts under one or several language models whose logits are added with weights."""

    follows_reference = True  # p_ref is the reference's own probability
    objectives: tuple[str, ...] = ()  # whose values tilt, for messages
    graphs: StepGraphs | None = None  # of its steps; None: each step's operations are launched one by one

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
            "value_tokens": float(sum(r.copies for r in self.value_readers) * self.value_tokens),
        }
        try:
            flops = sum(forward_flops(r.model.config, 1, head_tokens=1) for r in self.languages)
            flops += sum(r.copies * forward_flops(r.model.config, self.value_tokens) for r in self.value_readers)
        except (ValueError, AttributeError):
            return tokens
        return tokens | {"gflop": flops / 1e9}

    # ------------------------------------------------------------------------------------------------------- rows

    def open(self, rows: int) -> None:
        """Start with that many empty rows."""
        self.layout = Layout(rows, self.device)
        self.caches = [r.new_cache(self.layout) for r in self.readers]
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
            cache = reader.new_cache(Layout(n, self.device))
            outputs.append(reader.read(tokens, positions, additive(allowed, reader.dtype), cache))
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
            width, length = self.layout.width, self.layout.lengths[row]  # the host knows how many, so nothing waits
            columns = self.layout.valid[row, :width].int().argsort(stable=True)[width - length :]
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
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        self._rearrange(index, rows, total - len(rows))

    @torch.inference_mode()
    def fork(self, rows: Tensor, like: Sequence[int]) -> None:
        """Row i goes on from row rows[i], a number that the device knows; like[i] is a row of the same length."""
        self._rearrange(rows, like, 0)

    def _rearrange(self, index: Tensor, like: Sequence[int], empty: int) -> None:
        layout = self.layout
        layout.valid = nn.functional.pad(layout.valid[index], (0, 0, 0, empty))
        layout.length = nn.functional.pad(layout.length[index], (0, empty))
        layout.lengths = [layout.lengths[r] for r in like] + [0] * empty
        for cache in self.caches:
            cache.take_rows(index, empty)
        if self.p_ref is not None:
            k = self.p_ref.shape[-1]
            self.p_ref = torch.cat([self.p_ref[index], self.p_ref.new_full((empty, k), 1.0 / k)])
            self.token_ids = torch.cat([self.token_ids[index], self.token_ids.new_zeros(empty, k)])
        for name, tensor in self.extras.items():
            self.extras[name] = torch.cat([tensor[index], tensor.new_zeros(empty, *tensor.shape[1:])])

    @torch.inference_mode()
    def _make_room(self) -> None:
        """Shapes for a recorded step (`graphs`): as many columns as it needs, rounded up so that few shapes occur."""
        queries = self.value_tokens if self.value_readers else 1
        columns = -(-(self.layout.width + queries) // GRAPH_COLUMNS) * GRAPH_COLUMNS
        self.layout.fit(columns)
        for cache in self.caches:
            cache.fit(columns)

    def _places(self) -> dict[str, Place]:
        """Where the tensors are kept that a step reads and changes."""
        found = {name: (vars(self), name) for name in ("p_ref", "token_ids")}
        found |= {name: (vars(self.layout), name) for name in ("valid", "length", "place")}
        found |= {f"cache {i}": (vars(c), "store") for i, c in enumerate(self.caches) if c.store is not None}
        return found | {f"extra {name}": (self.extras, name) for name in self.extras}

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
            states: of each value reader, (B, copies, q, H); the texts end in the last column.
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

    def advance(self, choice: Tensor) -> None:
        """Every row takes the candidate of index choice (B,); the language models read it."""
        self._take_candidates(choice)
        self._count_step()

    def recorded_step(self, choose: Callable[[], Tensor], places: Mapping[str, Place]) -> None:
        """`choose`, which gives the choice (B,), and `advance` with it, as one of `graphs`.

        `places` are where the tensors are kept that `choose` reads and changes, the policy's own left out.
        """
        self._make_room()
        self.graphs.run(self._places() | places, lambda: self._take_candidates(choose()))
        self._count_step()

    def _count_step(self) -> None:
        """The host's part of `advance`."""
        self.layout.count()
        self._compact()

    @torch.inference_mode()
    def _take_candidates(self, choice: Tensor) -> None:
        """The device's part of `advance`."""
        tokens = self.token_ids.gather(1, choice.unsqueeze(1))  # (B, 1)
        self._choose(choice, tokens)
        logits = self._read(self.languages, self.caches[: len(self.languages)], tokens)
        self.p_ref, self.token_ids = self._candidates(logits)
        self.layout.mark()

    def _read(self, readers: Sequence[CachedModel], caches: Sequence[SlotCache], tokens: Tensor) -> list[Tensor]:
        """What each model reads (`CachedModel.read`) of q tokens (B, q) that could be the next one, behind the layout.

        Models of one precision share a mask.
        """
        q = tokens.shape[1]
        positions = self.layout.length.unsqueeze(1).expand(-1, q)  # all candidates stand at the next position
        masks = {dtype: self.layout.step_mask(q, dtype) for dtype in {reader.dtype for reader in readers}}
        return [
            reader.read(tokens, positions, masks[reader.dtype], cache)
            for reader, cache in zip(readers, caches, strict=True)
        ]
