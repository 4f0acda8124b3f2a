"""What the optimizer steps of every training need: the learning rate's schedule, seeds, gradients over processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """The learning rate's factor at a step: up to 1 after `warmup` steps, then down to 0 at `total`."""
    return min((step + 1) / (warmup + 1), (total - step) / max(1, total - warmup))


def seed_of(*key: int) -> int:
    """A seed for torch, below 2^63, that the numbers of the key give."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def add_up(accelerator, parameters: Sequence[torch.Tensor]) -> None:
    """Sum the processes' gradients; a process without nodes in this step has none and adds zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = accelerator.reduce(torch.cat([p.grad.reshape(-1) for p in parameters]), "sum")
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
