"""Prompts with their answers as one rectangle of tokens, and what a language model says of the answers' tokens.

What trains on answers shares it: policies (`ppo`) and autoregressive reward models (`arm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils import tilting


@dataclass
class AnswerBatch:
    """Prompts and answers of several lengths in one rectangle: a row's prompt ends where all answers begin.

    tokens, attention, positions (B, P + R); mask (B, R).
    """

    tokens: Tensor
    attention: Tensor
    positions: Tensor
    mask: Tensor


def lay_out_answers(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device) -> AnswerBatch:
    """Prompts padded on the left, answers on the right."""
    before, after = max(map(len, prompts)), max(map(len, responses))
    tokens = torch.zeros(len(prompts), before + after, dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = slice(before - len(prompt), before + len(response))
        tokens[i, row], attention[i, row] = torch.as_tensor([*prompt, *response]), 1
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    mask = attention[:, before:].to(torch.float32)
    return AnswerBatch(*(x.to(device) for x in (tokens, attention, positions, mask)))


def answer_logits(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """(B, R, V) logits of the answers' tokens, each from the state before it, in at least float32."""
    length = batch.mask.shape[1]
    logits = model(
        input_ids=batch.tokens, attention_mask=batch.attention, position_ids=batch.positions,
        logits_to_keep=length + 1, use_cache=False,
    ).logits  # fmt: skip
    return tilting.widened(logits[:, -length - 1 : -1])


def answer_log_probs(logits: Tensor, batch: AnswerBatch) -> Tensor:
    """(B, R) log-probabilities of the answers' tokens under their logits; 0 behind an answer's end."""
    answers = batch.tokens[:, -batch.mask.shape[1] :, None]
    return logits.log_softmax(-1).gather(2, answers).squeeze(2) * batch.mask


def gathered(mine: list, count: int, world: int) -> list:
    """What every process made of its `rank::world` part of `count` things, in their order."""
    if world == 1:
        return mine
    from accelerate.utils import gather_object

    parts = gather_object([mine])  # one list per process
    return [parts[i % world][i // world] for i in range(count)]
