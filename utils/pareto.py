"""Pareto fronts, hypervolume with a stated reference point, bootstrap intervals over prompts.

More is better in every objective. Everything is a pure function of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 2000, 0.95


# ------------------------------------------------------------------------------------------- fronts and hypervolume


def _points(points) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"points must be (N, objectives), got shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("points must be finite")
    return points


def pareto_front(points) -> np.ndarray:
    """Which points no other point dominates: (N, M) -> (N,) bool.

    A point dominates another where it is at least as good in every objective and better in one. Equal points do not
    dominate each other, so all copies of a point on the front are on it.
    """
    points = _points(points)
    at_least = (points[:, None] >= points[None]).all(-1)  # (N, N): row is at least as good as column
    better = (points[:, None] > points[None]).any(-1)
    return ~(at_least & better).any(0)


def hypervolume(points, reference_point) -> float:
    """Volume of what the points (N, M) dominate and the reference point (M,) does not reach; exact (moocore's).

    Points that are not above the reference point in every objective add nothing.

    Raises:
        ValueError: points that are not finite, or a reference point with another number of objectives.
    """
    import moocore

    reference = np.asarray(reference_point, dtype=np.float64)
    if len(points) == 0:
        return 0.0
    points = _points(points)
    if reference.shape != points.shape[1:]:
        raise ValueError(
            f"the reference point has shape {reference.shape}, the points have {points.shape[1]} objectives"
        )
    above = points[(points > reference).all(1)]
    return float(moocore.hypervolume(above, ref=reference, maximise=True)) if len(above) else 0.0


# -------------------------------------------------------------------------------------------------------- bootstrap


def resamples(n: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws, n) positions of n prompts drawn with replacement."""
    return np.random.default_rng(seed).integers(0, n, (draws, n))


def percentiles(values, level: float = LEVEL) -> tuple[float, float]:
    """The central interval of bootstrap values that holds `level` of them."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0 or not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean of one value per prompt; nan for fewer than two prompts."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    return percentiles(values[resamples(len(values), draws, seed)].mean(1), level)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over the prompts that both have, and on how many of them the first is better."""

    mean: float
    error: float
    interval: tuple[float, float]
    prompts: int
    wins: int
    ties: int
    losses: int


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a - b over the prompt indices that both have: its mean, standard error, bootstrap interval and counts."""
    shared = sorted(set(a) & set(b))
    difference = np.array([a[i] - b[i] for i in shared])
    counts = (int((difference > 0).sum()), int((difference == 0).sum()), int((difference < 0).sum()))
    if len(difference) < 2:
        mean = float(difference.mean()) if len(difference) else math.nan
        return Difference(mean, math.nan, (math.nan, math.nan), len(shared), *counts)
    error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return Difference(float(difference.mean()), error, mean_interval(difference), len(shared), *counts)


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws,) values of `statistic(positions)` over resampled prompts; nan where it does not exist."""
    return np.array([statistic(positions) for positions in resamples(n, draws, seed)])


def hypervolume_draws(tables, reference_point, draws: int = DRAWS, seed: int = 0) -> tuple[float, np.ndarray]:
    """Hypervolume of runs' mean rewards, and its values (draws,) with all runs resampled on the same prompts.

    Two calls with one seed resample the same prompts, so the differences of their values are paired.

    Args:
        tables: (runs, prompts, M) rewards, the same prompts in each run.
        reference_point: (M,); it stays where it is in every resample.
    """
    tables = np.asarray(tables, dtype=np.float64)
    value = hypervolume(tables.mean(1), reference_point)
    if tables.shape[1] < 2:
        return value, np.full(draws, math.nan)
    return value, bootstrap(
        lambda rows: hypervolume(tables[:, rows].mean(1), reference_point), tables.shape[1], draws, seed
    )


def reference_point_of(points, margin: float = 0.1) -> np.ndarray:
    """The worst mean of each objective among all points, less a tenth of the range: (N, M) -> (M,)."""
    points = _points(points)
    low, high = points.min(0), points.max(0)
    return low - margin * np.where(high > low, high - low, 1.0)


def line_at(kl, curve_kl, curve_reward) -> tuple[np.ndarray, np.ndarray]:
    """A method's reward at a KL, on the straight lines between its measured points.

    Args:
        kl: (D,); curve_kl, curve_reward: (P, D), the P measured points in any order, in each of D resamples.

    Returns:
        reward (D,), and whether the KL lies within what the points span (D,) bool. Outside, the outermost line is
        extended: a resample needs some value there; a claim about the data must not rest on it. nan for P < 2.
    """
    x, y = np.asarray(curve_kl, np.float64), np.asarray(curve_reward, np.float64)
    kl = np.asarray(kl, np.float64)
    if len(x) < 2:
        return np.full(kl.shape, math.nan), np.zeros(kl.shape, bool)
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    left = np.clip((x <= kl).sum(0) - 1, 0, len(x) - 2)[None]  # (1, D) the point to the left
    x0, x1 = (np.take_along_axis(x, left + i, 0)[0] for i in (0, 1))
    y0, y1 = (np.take_along_axis(y, left + i, 0)[0] for i in (0, 1))
    width = x1 - x0
    share = np.divide(kl - x0, width, out=np.full(kl.shape, 0.5), where=width > 0)  # the last two at one KL: their mean
    return y0 + share * (y1 - y0), (x[0] <= kl) & (kl <= x[-1])


@dataclass(frozen=True)
class EqualKL:
    """A run's reward less another method's at the same KL.

    Attributes:
        difference: nan where the other method's points do not reach the run's KL.
        interval: 95 %, over the prompts alone: it does not know how the reward bends between measured points.
        between: the KL of the other method's measured points to the left and right.
        beyond: share of the resamples in which the run's KL lies outside the other's points.
    """

    difference: float
    interval: tuple[float, float]
    between: tuple[float, float]
    beyond: float


def equal_kl(kl, reward, curve_kl, curve_reward, draws: int = DRAWS, seed: int = 0) -> EqualKL:
    """Compare a run (prompts,) with a curve (points, prompts) of another method on the same prompts at equal KL.

    All of them are resampled on the same prompts, so that what a prompt contributes to every run cancels.
    """
    x, y = np.vstack([kl, curve_kl]), np.vstack([reward, curve_reward])  # (1 + points, prompts)

    def differences(x, y):
        value, inside = line_at(x[0], x[1:], y[1:])
        return y[0] - value, inside

    mean = x.mean(1)
    value, inside = differences(mean[:, None], y.mean(1)[:, None])
    nowhere = (math.nan, math.nan)
    if not inside[0]:
        return EqualKL(math.nan, nowhere, nowhere, math.nan)
    between = (float(mean[1:][mean[1:] <= mean[0]].max()), float(mean[1:][mean[1:] >= mean[0]].min()))
    if x.shape[1] < 2:
        return EqualKL(float(value[0]), nowhere, between, math.nan)
    rows = resamples(x.shape[1], draws, seed)
    drawn, inside = differences(x[:, rows].mean(2), y[:, rows].mean(2))
    return EqualKL(float(value[0]), percentiles(drawn), between, float(1 - inside.mean()))
