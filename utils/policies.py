"""What can give a next-token distribution, for a batch of rows that are at different places of different texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from utils import tilting
from utils.cached_models import CachedModel, SlotCache, backbone_of, head_of, pools_mean, without_adapter
from utils.policy_base import Policy
from utils.shared_base import AdapterStack


class ReferencePolicy(Policy):
    """The reference model, cut to its top k tokens and renormalised."""

    def __init__(self, model: nn.Module, *, top_k: int = 15, temperature: float = 1.0):
        super().__init__([model], [1.0], top_k=top_k, temperature=temperature)


def model_of(reference: nn.Module | Policy) -> nn.Module:
    """The language model of a reference that is given as itself or as its policy.

    Raises:
        ValueError: another policy, which is more than one of its models.
    """
    if isinstance(reference, Policy) and not isinstance(reference, ReferencePolicy):
        raise ValueError(f"a reference is one language model; a {type(reference).__name__} cannot stand for it")
    return reference.languages[0].model if isinstance(reference, Policy) else reference


class MixturePolicy(Policy):
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


class _TiltedPolicy(Policy):
    """A reference whose candidates are tilted by the combined, normalised values of several objectives.

    Args:
        reference: a causal language model of transformers.
        weights: of the objectives, in their order.
        beta: strength of the tilt.
        normalization: "minmax" (v1), "zscore" or "none".
        clip: with "none", beta * value is at most this (v1: 6); None does not clip (v3).
    """

    def __init__(
        self,
        reference,
        weights: Sequence[float],
        *,
        beta: float,
        top_k: int = 15,
        temperature: float = 1.0,
        normalization: str = "minmax",
        clip: float | None = tilting.CLIP,
    ):
        super().__init__([model_of(reference)], [1.0], top_k=top_k, temperature=temperature)
        if not math.isfinite(beta) or beta < 0:
            raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
        if normalization not in tilting.NORMALIZATIONS:
            raise ValueError(f"unknown normalization {normalization!r}; valid: {', '.join(tilting.NORMALIZATIONS)}")
        self.beta, self.normalization, self.clip = float(beta), normalization, clip
        self.weights = torch.tensor(weights, dtype=torch.float64, device=self.device)

    def _objective_values(self) -> Tensor:
        """V_m of every candidate, (M, B, k)."""
        raise NotImplementedError

    def _as_tables(self, tables: Sequence) -> Tensor:
        """Tables (V,) of values that no model gives, as one tensor (N, V)."""
        dtype = tilting.wide_dtype(self.languages[0].dtype)
        return torch.stack([torch.as_tensor(t, dtype=dtype, device=self.device) for t in tables])

    def _values(self) -> Tensor:
        values = self._objective_values()
        self.unsound_values = ~values.isfinite().all(-1).T  # (B, M)
        combined = self.combined = tilting.combine(values, self.weights.to(values.dtype))  # beam search ranks by it
        if self.normalization == "none":
            combined = tilting.clip_values(combined, self.beta, self.clip)
        return tilting.normalize_values(combined, self.normalization)


class MavisPolicy(_TiltedPolicy):
    """MAVIS: the reference tilted by value models (paper, eq. 5).

    Args:
        value_models: {objective: model with a scalar head}, or a sequence of such models.
        weights: {objective: weight} of the same objectives, or a sequence in the same order; a weight of 0 drops its
            model.
        tilt: beta, top_k, temperature, normalization and clip, as every `_TiltedPolicy` takes them.

    A value model whose configuration says `value_pooling: mean` values a text by the mean of its head over the
    response's tokens: extras["response"] (B, M + 1) keeps each row's sums over the response so far, and its length, and
    extras["scores"] (B, M, k), within a step, the heads' outputs at the candidates.
    """

    def __init__(self, reference, value_models, weights, **tilt):
        self.objectives, models, weights = _aligned(value_models, weights, "value model")
        super().__init__(reference, weights, **tilt)
        models = [without_adapter(m).eval() for m in models]
        # Value models that share a backbone are read in one pass: {backbone: indices of its models}.
        shared: dict[int, list[int]] = {}
        for i, model in enumerate(models):
            shared.setdefault(id(backbone_of(model)), []).append(i)
        self.value_readers = [read_together([models[i] for i in group]) for group in shared.values()]
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
        """The heads' outputs at each reader's states (B, copies, q, H), as (B, M, q) in the objectives' order."""
        return self._in_order([reader.score(x) for reader, x in zip(self.value_readers, states, strict=True)])

    def _in_order(self, scores: Sequence[Tensor]) -> Tensor:
        """Each reader's (heads, B, q) as one (B, M, q) in the objectives' order, in float32 at least."""
        rows = {m: row for m, row in zip(self._order, (row for part in scores for row in part), strict=True)}
        stacked = torch.stack([rows[m] for m in range(len(rows))], dim=1)
        return tilting.widened(stacked)

    def _read_values(self, tokens: Tensor) -> list[Tensor]:
        """Each value reader's states (B, copies, q, H) of q tokens (B, q) that could be the next one."""
        return self._read(self.value_readers, self.value_caches, tokens)

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


def read_together(models: Sequence[nn.Module]) -> CachedModel:
    """Value models that share a backbone, as one reader."""
    members = [model.member for model in models] if isinstance(backbone_of(models[0]), AdapterStack) else None
    return CachedModel(models[0], [head_of(model) for model in models], members)


def last_states(states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Extras {"state <reader>": (B, copies, H)}: what each value reader's states (B, copies, q, H) end in."""
    return {f"state {i}": x[:, :, -1] for i, x in enumerate(states)}


class CandidatePolicy(MavisPolicy):
    """MAVIS with candidate heads: from the state before them, values of all k candidates at once.

    A candidate head (`candidates.CandidateHead`) predicts what the value model's own head would say at each candidate,
    so that the value model reads one token a step and not k. Of the tokens that were taken, the value model's own
    outputs count.

    Args:
        candidate_heads: {objective: CandidateHead}, or a sequence of them, like `value_models`.
        (the others as in `MavisPolicy`)
    """

    def __init__(self, reference, value_models, candidate_heads, weights, **tilt):
        super().__init__(reference, value_models, weights, **tilt)
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
                torch.stack([head(x, self.token_ids) for head, x in zip(heads, self._states_before(i), strict=True)])
                for i, heads in enumerate(self.candidate_heads)
            ]
        )

    def _states_before(self, reader: int) -> tuple[Tensor, ...]:
        """The states (B, H) that each head of a reader has of the text so far."""
        return self.extras[f"state {reader}"].expand(-1, len(self.candidate_heads[reader]), -1).unbind(1)

    def _choose(self, choice: Tensor, tokens: Tensor) -> None:
        self.extras.pop("scores", None)  # the heads' guesses: the value models' own outputs count
        states = self._read_values(tokens)
        if self._pools is not None:
            self._add_to_response(self._scores(states))
        self.extras |= last_states(states)


class TokenTablePolicy(_TiltedPolicy):
    """The control that needs no value model: the same tilt with values that depend on the candidate alone.

    `tables` is {objective: (V,)} (or a sequence of tables), the value of each token whatever came before it.
    """

    def __init__(self, reference, tables, weights, **tilt):
        self.objectives, tables, weights = _aligned(tables, weights, "token table")
        super().__init__(reference, weights, **tilt)
        self.tables = self._as_tables(tables)  # (M, V)

    def _objective_values(self) -> Tensor:
        return self.tables[:, self.token_ids]  # (M, B, k)


class PromptTablePolicy(_TiltedPolicy):
    """The control for a reward that depends on the prompt: each prompt has its own table of token values.

    `table_of` gives the table (V,) of a prompt's token ids, e.g. the idf of the prompt's own words.
    """

    objectives = ("the prompt's table",)

    def __init__(self, reference, table_of: Callable[[Sequence[int]], Tensor], **tilt):
        super().__init__(reference, [1.0], **tilt)
        self.table_of = table_of

    def _extras_of(self, prompts, states, begun):
        return {"table": self._as_tables([self.table_of(p) for p in prompts])}

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
