"""How well predictions fit targets: explained variance and correlation, over all nodes and within a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from utils.tree_examples import Example
from utils.trees import Tree

DRAWS = 1000  # of groups with replacement


def _centred(x, groups) -> np.ndarray:
    """(N,) minus the mean of its group; without groups, minus the mean."""
    x = np.asarray(x, np.float64)
    if groups is None:
        return x - x.mean()
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    return x - (np.bincount(group, weights=x) / np.bincount(group))[group]


def explained_variance(targets, predictions, groups=None) -> float:
    """The share of the targets' variance that the predictions explain: 1 is perfect, 0 is what a constant reaches.

    Args:
        targets, predictions: (N,)
        groups: (N,) labels; target and prediction are then centred within each group, so that only what is explained
            *within* a group counts. None: one group.

    Returns:
        1 - var(target - prediction) / var(target); nan where the targets do not vary.
    """
    targets, predictions = np.asarray(targets, np.float64), np.asarray(predictions, np.float64)
    if targets.size == 0:
        return math.nan
    total = np.square(_centred(targets, groups)).sum()
    rest = np.square(_centred(targets - predictions, groups)).sum()
    return float(1.0 - rest / total) if total > 1e-12 * max(1.0, np.square(targets).sum()) else math.nan


def correlation(targets, predictions, groups=None) -> float:
    """Pearson correlation of targets and predictions (N,), centred within each group; nan where one is constant."""
    if np.size(targets) == 0:
        return math.nan
    t, p = _centred(targets, groups), _centred(predictions, groups)
    scale = math.sqrt(np.square(t).sum() * np.square(p).sum())
    return float((t * p).sum() / scale) if scale > 1e-12 else math.nan


def _sums_of_groups(targets, predictions, groups) -> np.ndarray:
    """(G, 4) of each group's centred t and p: the sums of t^2, p^2, t p and (t - p)^2."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    t, p = _centred(targets, groups), _centred(predictions, groups)
    return np.stack([np.bincount(group, weights=x) for x in (t * t, p * p, t * p, np.square(t - p))], axis=1)


def _resampled(sums: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws, ...) totals of the sums (G, ...) of groups that are drawn with replacement."""
    counts = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    return np.tensordot(counts, sums, axes=1)


def _within(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explained variance and correlation within groups, (...,) each, of totals (..., 4); nan where one is constant."""
    tt, pp, tp, rest = np.moveaxis(totals, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - rest / tt, tp / np.sqrt(tt * pp)


def _known(drawn: np.ndarray) -> np.ndarray:
    """The draws that have a measure: in the others targets or predictions do not vary."""
    return drawn[np.isfinite(drawn)]


def errors_within(targets, predictions, groups) -> tuple[float, float]:
    """Standard errors of explained variance and correlation within groups, by drawing groups with replacement.

    nan for fewer than two groups.
    """
    sums = _sums_of_groups(targets, predictions, groups)
    if len(sums) < 2:
        return math.nan, math.nan
    explained, related = map(_known, _within(_resampled(sums)))
    return tuple(float(drawn.std()) if len(drawn) else math.nan for drawn in (explained, related))


def correlation_gain(targets, predictions, others, groups) -> dict[str, float]:
    """How much higher the correlation within groups is than that of other predictions of the same targets, (N,) each.

    Returns:
        difference, and its 95 % interval low to high by drawing groups with replacement: the two are paired, so that
        what makes a group hard for both does not count.
    """
    sums = np.stack([_sums_of_groups(targets, p, groups) for p in (predictions, others)], axis=1)  # (G, 2, 4)
    _, (one, other) = _within(sums.sum(0))
    drawn = _within(_resampled(sums))[1]  # (draws, 2)
    known = _known(drawn[:, 0] - drawn[:, 1])
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return {"difference": float(one - other), "low": float(low), "high": float(high)}


def target_noise(tree: Tree, targets, nodes) -> np.ndarray:
    """(n,) sampling variance of inner nodes' targets, each the mean of c children's: var(children) / c.

    nan for fewer than two children, and where the target is not the children's mean (a soft value's is not).
    """
    targets, noise = np.asarray(targets, np.float64), np.full(len(nodes), math.nan)
    for i, node in enumerate(nodes):
        below = targets[tree.children(node)]
        if len(below) > 1 and math.isclose(below.mean(), targets[node], rel_tol=1e-6, abs_tol=1e-9):
            noise[i] = below.var(ddof=1) / len(below)
    return noise


def explainable_variance(targets, noise, groups) -> float:
    """The explained variance within groups that a model would reach that knew every target but for its noise.

    Args:
        targets, groups: (N,), see `explained_variance`.
        noise: (N,) variance of each target's error (`target_noise`). The errors are taken as independent, as they are
            among the nodes of one depth; nan if any is unknown.
    """
    _, group, size = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    total = np.square(_centred(targets, groups)).sum()
    return float(1.0 - (noise * (1 - 1 / size[group])).sum() / total) if total > 1e-12 else math.nan


def fit_report(targets, predictions, groups, noise=None) -> dict[str, float]:
    """The measures of metrics.json on some nodes, (N,) each; those within a prompt with their errors over prompts."""
    targets, predictions = np.asarray(targets, np.float64), np.asarray(predictions, np.float64)
    report = {
        "nodes": int(targets.size),
        "mse": float(np.square(targets - predictions).mean()) if targets.size else math.nan,
        "explained_variance": explained_variance(targets, predictions),
        "explained_variance_within_prompt": explained_variance(targets, predictions, groups),
        "correlation": correlation(targets, predictions),
        "correlation_within_prompt": correlation(targets, predictions, groups),
    }
    for name, error in zip(
        ("explained_variance", "correlation"), errors_within(targets, predictions, groups), strict=True
    ):
        report[f"{name}_within_prompt_error"] = error
    if noise is not None:
        report["explainable_variance_within_prompt"] = explainable_variance(targets, noise, groups)
    return report


def validation_report(examples: Sequence[Example], predictions: np.ndarray) -> dict:
    """`fit_report` over all validation nodes and per depth, with predictions (M,) in the examples' order."""
    targets = np.concatenate([x.targets[x.nodes] for x in examples])
    groups = np.concatenate([np.full(len(x.nodes), i) for i, x in enumerate(examples)])
    depths = np.concatenate([x.tree.depth[x.nodes] for x in examples])
    noise = np.concatenate([target_noise(x.tree, x.targets, x.nodes) for x in examples])
    report = fit_report(targets, predictions, groups)
    report["target_mean"], report["target_variance"] = float(targets.mean()), float(targets.var())
    report["by_depth"] = {
        int(d): fit_report(*(a[depths == d] for a in (targets, predictions, groups, noise))) for d in np.unique(depths)
    }
    return report
