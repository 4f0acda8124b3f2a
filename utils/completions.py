"""What decoding gives, and what its two ways, sampling and beam search, share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.errors import DataError

# Of log-probabilities and log-ratios that are kept: in float64 what lies behind them depends on the batch's shape, so
# that without it one process's files would differ from those of several.
LOG_RATIO_DECIMALS = 9


@dataclass
class Completion:
    """What was generated after one prompt.

    Attributes:
        token_ids: the new tokens, the end-of-sequence token included where there is one.
        log_ratio: sum over the steps of log(p_policy(a) / p_reference(a)), p_reference from the full softmax; nan for
            a policy that is not a tilted reference, unless `decode` was given the reference.
        finished: whether it ended with the end-of-sequence token.
        log_prob: sum of log p_policy(a).
        reference_log_prob: sum of log p_reference(a).
        step_log_ratios: the terms of log_ratio, one a step; empty after a beam search.
        kl_exact: sum over the steps of KL(p_policy || p_reference), p_reference from the full softmax: what log_ratio
            estimates by the tokens that were taken, with less noise. nan where log_ratio is, and after a beam search.
        kl_top_k: the same to the reference renormalised over its top k, so that the cut costs nothing.
        value: in beam search, the unnormalised combined value of its last token, by which it was ranked.
        steps: with trace=True one dict a step: token_ids (k,), p_ref (k,), values (k,) or None, p_tilt (k,), chosen.
        text: of an answer that came as a text; None where it is what the tokens say.
        decoded: in beam search, its equal share of the tokens that all beams of its prompt decoded; None: its own.
    """

    token_ids: list[int]
    log_ratio: float
    finished: bool
    log_prob: float = float("nan")
    reference_log_prob: float = float("nan")
    step_log_ratios: list[float] = field(default_factory=list)
    steps: list[dict] | None = None
    kl_exact: float = float("nan")
    kl_top_k: float = float("nan")
    value: float = float("nan")
    text: str | None = None
    decoded: float | None = None


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None) -> None:
    """Raise a ValueError that names the first prompt that is empty or leaves no room for the answer."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is over the context "
                f"of {context} tokens; shorten the prompt or lower max_new_tokens"
            )


def eos_tensor(eos_token_id: int | Sequence[int] | None, device: torch.device) -> Tensor:
    ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    return torch.tensor(ids, dtype=torch.int64, device=device)


def steps_between_looks(device: torch.device) -> int:
    """How many steps go by until the host looks which rows have ended: elsewhere than on a CPU, a look waits."""
    return 1 if device.type == "cpu" else 16


def not_finite(prompt: int | None, complaint: str, tokens: int) -> DataError:
    """The error that stops decoding, with what `Policy.complaint` says of a row."""
    where = "" if prompt is None else f"prompt {prompt}: "
    return DataError(f"{where}{complaint} within its first {tokens} tokens; nothing more is decoded")


def prompt_of(key: tuple[int, ...], place: int) -> int:
    """The prompt's index, for messages: the key's where it names one, else the place in the list."""
    return key[1] if len(key) > 1 else place
