"""The head that a training starts from: one that predicts the targets' mean, or a ridge regression on the states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.cli import progress
from utils.node_values import head_weight, node_states
from utils.tree_examples import Example
from utils.tree_layouts import TOKENS_PER_PASS, collate, lay_out, make_units, passes

# Penalties that `choose_ridge` chooses from; the largest leave a head that is there nearly as it is.
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


@dataclass(frozen=True)
class Ridge:
    """A ridge regression's penalty, as a share of the states' mean square, and how far it moves the head."""

    penalty: float
    step: torch.Tensor  # (H,) float64


@torch.no_grad()
def start_at_ridge(model, ridge: Ridge) -> None:
    """Move the head from where the regression found it to its solution."""
    weight = head_weight(model)
    weight += ridge.step[None].to(weight.dtype)


@torch.no_grad()
def fit_ridges(
    model,
    objectives: Sequence[Sequence[Example]],
    *,
    dense: bool = False,
    bf16: bool = False,
    device=None,
    folds: int = 5,
    max_tokens: int = TOKENS_PER_PASS,
    accelerator=None,
) -> list[Ridge]:
    """Ridge regressions of objectives' targets on the states, which are read once for all of them.

    The head is drawn towards where it is (a new one is at 0). Only differences within a prompt steer, and most of the
    variance lies between prompts, of which there are few: the error of a tree's mean counts `BETWEEN` as much as that
    of its nodes' differences from it. The penalty is the one of `RIDGES` that predicts these differences best, over
    folds of whole trees.

    Args:
        objectives: the examples of each objective: the same nodes of the same trees, with targets of its own. What is
            found for one does not depend, to the last bit, on which others there are.
        dense: regress on the states at every token of a node's segment, each with an equal part of the node's weight.
        accelerator: an `accelerate.Accelerator` where several processes share the passes; their moments are summed in
            float64, so that all get what one process would, to rounding, and the same bits.

    Returns:
        one regression for each objective.
    """
    examples = objectives[0]
    for others in objectives[1:]:
        for one, other in zip(examples, others, strict=True):
            same = one.tree.prompt_index == other.tree.prompt_index and np.array_equal(one.nodes, other.nodes)
            assert same, (one.tree.prompt_index, other.tree.prompt_index, one.nodes, other.nodes)
    training, weight = model.training, head_weight(model)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    size = weight.shape[1]
    model.eval()
    gram = torch.zeros(2, folds, size, size, dtype=torch.float64, device=device)
    cross = torch.zeros(len(objectives), 2, folds, size, dtype=torch.float64, device=device)
    layouts = [lay_out(x, x.nodes, dense) for x in examples]
    bar = progress(total=len(layouts), desc="ridge", unit="tree")
    for group in passes(layouts, max_tokens)[rank::world]:
        batch = collate([layouts[i] for i in group], device)
        with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=bf16):
            states = node_states(model, batch).double()
        for row, i in enumerate(group):
            own = batch.rows == row
            x = states[own]  # (n, H)
            targets = np.stack([one[i].targets[layouts[i].nodes] for one in objectives]).astype(np.float32)  # (K, n)
            y = torch.from_numpy(targets).to(x.device).double() - x @ weight[0].double()
            add_moments(gram, cross, i % folds, x, y, batch.weights[own].double())
        bar.update(len(group))
    bar.close()
    model.train(training)
    if world > 1:
        gram, cross = accelerator.reduce(gram, "sum"), accelerator.reduce(cross, "sum")
    penalties, steps = zip(*(choose_ridge(gram, one) for one in cross), strict=True)
    steps = torch.stack(steps)  # (K, H)
    if world > 1:  # the first one's, for all: other hardware may round the solution otherwise
        steps = accelerator.reduce(steps if rank == 0 else torch.zeros_like(steps), "sum")
    return [Ridge(penalty, step) for penalty, step in zip(penalties, steps, strict=True)]


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


def add_moments(
    gram: torch.Tensor, cross: torch.Tensor, fold: int, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor
) -> None:
    """Add one prompt's states and targets to the moments that `choose_ridge` reads.

    Args:
        gram: (2, folds, H, H) float64, the states' own moments; [1] within a prompt.
        cross: (K, 2, folds, H), those of states and targets, for each of K objectives.
        x: (n, H) states; weights: (n,) what each counts.
        y: (K, n) targets. Each objective's products are taken on their own: its bits then do not depend on K.
    """
    count = weights.sum()
    mean = weights @ x / count
    x = x - mean
    weighted = weights[:, None] * x
    within = x.T @ weighted
    gram[1, fold] += within
    gram[0, fold] += within + BETWEEN * count * torch.outer(mean, mean)
    for moments, targets in zip(cross, y, strict=True):
        level = (weights * targets).sum() / count  # a new tensor: how a row of `y` is aligned would change its bits
        within = (targets - level) @ weighted
        moments[1, fold] += within
        moments[0, fold] += within + BETWEEN * count * level * mean
