"""The head that a training starts from: one that predicts the targets' mean, or a ridge regression on the states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from utils.cli import progress
from utils.node_values import head_weight, node_states
from utils.tree_examples import Example
from utils.tree_layouts import TOKENS_PER_PASS, collate, lay_out, make_units, passes

# Penalties that `start_at_ridge` chooses from; the largest leave a head that is there nearly as it is.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
BETWEEN = 0.1  # what a prompt's mean counts there


@torch.no_grad()
def start_at_mean(
    model, examples: Sequence[Example], *, packing: str = "tree", device=None, max_trees: int = 8
) -> None:
    """Let a new model's head predict about the targets' mean from the start, judging by the first trees' nodes.

    The head has no bias, so a reward that lies far from 0 would otherwise be approached step by step, while the loss
    says nothing about the differences that matter. For a mean of 0 the head stays 0.
    """
    training, few = model.training, examples[:max_trees]
    model.eval()
    states = [
        node_states(model, collate([lay_out(few[i], nodes)], device))
        for i, nodes in make_units(few, packing, max(len(x.nodes) for x in few))
    ]
    model.train(training)
    direction = torch.cat(states).mean(0)  # (H,)
    mean = float(np.concatenate([x.targets[x.nodes] for x in examples]).mean())
    head_weight(model).copy_((mean * direction / direction.square().sum())[None])


@torch.no_grad()
def start_at_ridge(
    model,
    examples: Sequence[Example],
    *,
    bf16: bool = False,
    device=None,
    folds: int = 5,
    max_tokens: int = TOKENS_PER_PASS,
    accelerator=None,
) -> float:
    """Let the head be the ridge regression of the targets on the states, drawn towards where it is (a new one is at 0).

    Only differences within a prompt steer, and most of the variance lies between prompts, of which there are few: the
    error of a tree's mean counts `BETWEEN` as much as that of its nodes' differences from it. The penalty is the one of
    `RIDGES` that predicts these differences best, over folds of whole trees.

    Args:
        accelerator: an `accelerate.Accelerator` where several processes share the passes; their moments are summed in
            float64, so that all get what one process would, to rounding, and the same bits.

    Returns:
        the penalty, as a share of the states' mean square.
    """
    training, weight = model.training, head_weight(model)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    size = weight.shape[1]
    model.eval()
    gram = torch.zeros(2, folds, size, size, dtype=torch.float64, device=device)  # of the states; [1] within a prompt
    cross = torch.zeros(2, folds, size, dtype=torch.float64, device=device)  # with the targets
    layouts = [lay_out(x, x.nodes) for x in examples]
    bar = progress(total=len(layouts), desc="ridge", unit="tree")
    for group in passes(layouts, max_tokens)[rank::world]:
        batch = collate([layouts[i] for i in group], device)
        with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=bf16):
            states = node_states(model, batch).double()
        for row, i in enumerate(group):
            mine = batch.rows == row
            x = states[mine]
            add_moments(gram, cross, i % folds, x, batch.targets[mine].double() - x @ weight[0].double())
        bar.update(len(group))
    bar.close()
    model.train(training)
    if world > 1:
        gram, cross = accelerator.reduce(gram, "sum"), accelerator.reduce(cross, "sum")
    ridge, step = choose_ridge(gram, cross)
    if world > 1:  # the first one's, for all: other hardware may round the solution otherwise
        step = accelerator.reduce(step if rank == 0 else torch.zeros_like(step), "sum")
    weight += step[None].to(weight.dtype)
    return ridge


def choose_ridge(gram: torch.Tensor, cross: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The penalty of `RIDGES` that predicts the differences within a prompt best over folds, and its solution (H,).

    Args:
        gram: (2, folds, H, H) float64, X'X of each fold: [0] what is minimised, [1] within prompts alone.
        cross: (2, folds, H), X'y likewise.
    """
    size, unit = gram.shape[-1], gram[0].sum(0).diagonal().mean()
    used = [f for f in range(gram.shape[1]) if gram[0, f].any()]

    def solve(kept: list[int], ridge: float) -> torch.Tensor:
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram[0, kept].sum(0) + ridge * unit * eye, cross[0, kept].sum(0))

    error = gram.new_zeros(len(RIDGES))  # less the targets' own square
    for n, ridge in enumerate(RIDGES):
        for f in used if len(used) > 1 else ():
            w = solve([g for g in used if g != f], ridge)
            error[n] += w @ gram[1, f] @ w - 2 * w @ cross[1, f]
    best = RIDGES[int(error.argmin())] if len(used) > 1 else RIDGES[-1]
    return best, solve(used, best)


def add_moments(gram: torch.Tensor, cross: torch.Tensor, fold: int, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add one prompt's states (n, H) and targets (n,) to the moments that `choose_ridge` reads."""
    mean, level, count = x.mean(0), y.mean(), len(y)
    x, y = x - mean, y - level
    gram[1, fold] += x.T @ x
    cross[1, fold] += y @ x
    gram[0, fold] += x.T @ x + BETWEEN * count * torch.outer(mean, mean)
    cross[0, fold] += y @ x + BETWEEN * count * level * mean
