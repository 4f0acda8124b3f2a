"""The method's mathematics: pure functions of tensors of shape (B, k).

B is the number of rows (sequences), k the number of candidates: the reference's top-k next tokens. Probabilities of
the reference come from the softmax over the whole vocabulary and are not renormalised over the candidates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from utils.specs import NORMALIZATIONS

EPS = 1e-6  # of the published min-max normalisation
CLIP = 6.0  # v1 without normalisation: beta * value is at most this


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that is computed with where models have `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """Logits or scores in the precision that is computed with."""
    return x.to(wide_dtype(x.dtype))


def top_k_probs(
    logits: Tensor, k: int, temperature: float = 1.0, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference's k likeliest next tokens, likeliest first.

    Args:
        logits: (B, V).
        k: candidates kept; at most V are there.
        temperature: divides the logits.
        forbidden: (F,) ids of tokens that are no candidates. The others keep their p_ref: it stays the softmax over
            all V tokens, these included.

    Returns:
        p_ref (B, k) from the softmax over all V tokens, and token_ids (B, k). The softmax is computed in float32, or
        in float64 for float64 logits.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
    wide = widened(logits)
    wide = wide / temperature if temperature != 1.0 else wide
    allowed = wide
    if forbidden is not None:
        if min(k, wide.shape[-1]) > wide.shape[-1] - len(forbidden):
            raise ValueError(f"{k} candidates of {wide.shape[-1]} tokens, {len(forbidden)} of them forbidden")
        allowed = wide.index_fill(-1, forbidden, -math.inf)
    top, token_ids = allowed.topk(min(k, wide.shape[-1]), dim=-1)  # (B, k)
    return (top - wide.logsumexp(dim=-1, keepdim=True)).exp(), token_ids


def combine(values: Tensor, weights: Tensor) -> Tensor:
    """v_i = sum_m w_m V_m: (M, B, k) and (M,) to (B, k)."""
    return torch.einsum("mbk,m->bk", values, weights)


def normalize_values(values: Tensor, mode: str = "minmax") -> Tensor:
    """Combined values (B, k) to the u that beta multiplies, row by row.

    `minmax` (v1): (v - min) / (max - min + 1e-6). `zscore`: (v - mean) / (std + 1e-6) with the population's standard
    deviation. `none`: unchanged.
    """
    if mode == "minmax":
        low, high = values.aminmax(dim=-1, keepdim=True)
        return (values - low) / (high - low + EPS)
    if mode == "zscore":
        centred = values - values.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True).sqrt() + EPS)
    if mode == "none":
        return values
    raise ValueError(f"unknown normalization {mode!r}; valid: {', '.join(NORMALIZATIONS)}")


def clip_values(values: Tensor, beta: float, clip: float | None = CLIP) -> Tensor:
    """v1 without normalisation: values are at most clip / beta, so that no candidate's odds grow by over e^clip."""
    return values if clip is None or beta == 0 else values.clamp(max=clip / beta)


def tilt(p_ref: Tensor, values: Tensor, beta: float) -> Tensor:
    """p_tilt proportional to p_ref * exp(beta * value), renormalised over the k candidates: (B, k), (B, k) -> (B, k).

    Computed from logarithms of values below the row's largest, so that nothing overflows and a large value that all
    candidates share costs no digit of theirs.
    """
    if not math.isfinite(beta):
        raise ValueError(f"beta must be finite, got {beta}")
    return (p_ref.log() + beta * (values - values.amax(dim=-1, keepdim=True))).softmax(dim=-1)


def log_ratio(p_tilt: Tensor, p_ref: Tensor, choice: Tensor) -> Tensor:
    """log(p_tilt(a) / p_ref(a)) of the chosen candidate, with p_ref the full softmax (paper, eq. 6): (B,)."""
    pick = choice.unsqueeze(-1)
    return (p_tilt.gather(-1, pick).log() - p_ref.gather(-1, pick).log()).squeeze(-1)


def step_kl(p_tilt: Tensor, p_ref: Tensor) -> Tensor:
    """The exact KL divergence of one step, sum_a p_tilt(a) log(p_tilt(a) / p_ref(a)), full-softmax convention: (B,)."""
    return (torch.special.xlogy(p_tilt, p_tilt) - torch.special.xlogy(p_tilt, p_ref)).sum(dim=-1)  # 0 log 0 is 0


# --------------------------------------------------------------------------------------- counter-based random numbers


def fold_key(key: Iterable[int]) -> int:
    """A tuple of whole numbers to 64 well-mixed bits, as a signed integer; the same on every machine."""
    text = ",".join(str(int(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(folded_keys: Tensor, steps: Tensor) -> Tensor:
    """One uniform in [0, 1) per row, a hash of (key, step): (B,) int64, (B,) int64 -> (B,) float64.

    The mixing is splitmix64's finaliser (Steele, Lea, Flood 2014); 53 bits are kept.
    """
    x = folded_keys + (steps + 1) * -7046029254386353131  # the golden-ratio increment, as a signed number
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * (1.0 / (1 << 53))


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs (B, k) that need not be normalised, uniform (B,) in [0, 1) -> choice (B,)."""
    cumulative = probs.double().cumsum(dim=-1)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return (cumulative <= threshold).sum(dim=-1).clamp(max=probs.shape[-1] - 1)
