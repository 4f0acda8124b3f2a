"""Pareto fronts, hypervolume with a stated reference point, bootstrap intervals over prompts, and their plots.

More is better in every objective. Everything is a pure function of arrays; plots are drawn without a display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Volume of what the points (N, M) dominate and the reference point (M,) does not reach; exact.

    Points that are not above the reference point in every objective add nothing. Two objectives are a sweep; more are
    sliced along the last one (exponential in M, fine for the tens of points of a front).
    """
    reference = np.asarray(reference_point, dtype=np.float64)
    if len(points) == 0:
        return 0.0
    points = _points(points)
    if reference.shape != points.shape[1:]:
        raise ValueError(
            f"the reference point has shape {reference.shape}, the points have {points.shape[1]} objectives"
        )
    above = points[(points > reference).all(1)] - reference
    return _volume(above)


def _volume(points: np.ndarray) -> float:
    """Volume between the origin and positive points (N, M)."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    order = np.argsort(-points[:, -1], kind="stable")
    points = points[order]
    if points.shape[1] == 2:
        reach = np.maximum.accumulate(points[:, 0])  # widest so far, from the highest point down
        return float((reach * (points[:, 1] - np.append(points[1:, 1], 0.0))).sum())
    heights = points[:, -1] - np.append(points[1:, -1], 0.0)
    return sum(h * _volume(points[: i + 1, :-1]) for i, h in enumerate(heights) if h > 0)


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
    """Mean of paired differences over the prompts that both runs have."""

    mean: float
    error: float
    interval: tuple[float, float]
    prompts: int


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a - b over the prompt indices that both have: its mean, standard error and bootstrap interval."""
    shared = sorted(set(a) & set(b))
    difference = np.array([a[i] - b[i] for i in shared])
    if len(difference) < 2:
        mean = float(difference.mean()) if len(difference) else math.nan
        return Difference(mean, math.nan, (math.nan, math.nan), len(shared))
    error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return Difference(float(difference.mean()), error, mean_interval(difference), len(shared))


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws,) values of `statistic(positions)` over resampled prompts; nan where it does not exist."""
    return np.array([statistic(positions) for positions in resamples(n, draws, seed)])


def hypervolume_interval(
    tables, reference_point, draws: int = DRAWS, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Hypervolume of runs' mean rewards and its interval, all runs resampled on the same prompts.

    Args:
        tables: (runs, prompts, M) rewards, the same prompts in each run.
        reference_point: (M,).
    """
    tables = np.asarray(tables, dtype=np.float64)
    value = hypervolume(tables.mean(1), reference_point)
    if tables.shape[1] < 2:
        return value, (math.nan, math.nan)
    return value, percentiles(
        bootstrap(lambda rows: hypervolume(tables[:, rows].mean(1), reference_point), tables.shape[1], draws, seed)
    )


def reference_point_of(points, margin: float = 0.1) -> np.ndarray:
    """The worst mean of each objective among all points, less a tenth of the range: (N, M) -> (M,)."""
    points = _points(points)
    low, high = points.min(0), points.max(0)
    return low - margin * np.where(high > low, high - low, 1.0)


def interpolate_at(kl: float, curve_kl, curve_reward) -> float:
    """A method's reward at a KL, linear between its runs; nan outside the range of KL that they cover."""
    order = np.argsort(curve_kl)
    x, y = np.asarray(curve_kl, np.float64)[order], np.asarray(curve_reward, np.float64)[order]
    if len(x) == 0 or not x[0] <= kl <= x[-1]:
        return math.nan
    return float(np.interp(kl, x, y))


# ------------------------------------------------------------------------------------------------------------- plots

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


@dataclass(frozen=True)
class PlotPoint:
    """One run in a plot: means, the half-widths of their intervals' sides, and the text beside it."""

    x: float
    y: float
    x_interval: tuple[float, float] = (math.nan, math.nan)
    y_interval: tuple[float, float] = (math.nan, math.nan)
    text: str = ""


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)  # axes (rows, columns)


def _style(axes, x_label: str, y_label: str, size: float = 11) -> None:
    axes.set_xlabel(x_label, fontsize=size)
    axes.set_ylabel(y_label, fontsize=size)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.08)


def _cross(axes, point: PlotPoint, color: str) -> None:
    for low, high, horizontal in ((*point.x_interval, True), (*point.y_interval, False)):
        if math.isfinite(low) and math.isfinite(high):
            ends = ([low, high], [point.y] * 2) if horizontal else ([point.x] * 2, [low, high])
            axes.plot(*ends, color=color, linewidth=0.9, alpha=0.45, solid_capstyle="butt", zorder=2)


def _place_texts(figure, axes, texts: Sequence[tuple[float, float, str, str]]) -> None:
    """Write small texts beside points, each at the offset where it covers the fewest points and other texts."""
    figure.canvas.draw()
    to_pixels, scale = axes.transData.transform, figure.dpi / 72
    points = np.array([to_pixels((x, y)) for x, y, _, _ in texts]).reshape(-1, 2)
    frame, taken = axes.get_window_extent(), []
    for (x, y, text, color), (px, py) in zip(texts, points, strict=True):
        width, height, best = 4.3 * len(text) * scale, 8.0 * scale, None
        for radius in (7, 12, 18):
            for angle in (45, -45, 135, -135, 90, -90, 0, 180):
                dx, dy = (radius * scale * f(math.radians(angle)) for f in (math.cos, math.sin))
                left = px + dx - (0 if dx > 1 else width if dx < -1 else width / 2)
                bottom = py + dy - (0 if dy > 1 else height if dy < -1 else height / 2)
                box = (left, bottom, left + width, bottom + height)
                cost = radius / 100
                cost += sum(5 for q in points if box[0] - 4 < q[0] < box[2] + 4 and box[1] - 4 < q[1] < box[3] + 4)
                cost += sum(8 for b in taken if box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3])
                cost += 20 * (box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1)
                if best is None or cost < best[0]:
                    best = (cost, box)
        taken.append(best[1])
        offset = ((best[1][0] - px) / scale, (best[1][1] - py) / scale)
        axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=7, color=color, va="bottom", ha="left",
                      zorder=5)  # fmt: skip


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # below the axes, so that it never covers data
        columns = min(len(handles), max(2, int(figure.get_figwidth() / 2.4)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def plot_front(
    file: str | Path,
    series: Mapping[str, Sequence[PlotPoint]],
    reference: PlotPoint | None,
    *,
    labels: tuple[str, str],
    title: str,
) -> None:
    """Mean rewards of two objectives: each series in its colour, its own front as a line, intervals as crosses.

    Points that another point of their series dominates are hollow.
    """
    figure, grid = _figure(7.4, 6.4)
    axes, texts = grid[0, 0], []
    for (name, points), color, marker in zip(series.items(), _cycle(COLORS), _cycle(MARKERS), strict=False):
        front = pareto_front([(p.x, p.y) for p in points])
        line = sorted((p.x, p.y) for p, on in zip(points, front, strict=True) if on)
        axes.plot(*zip(*line, strict=True), color=color, linewidth=1.4, alpha=0.8, zorder=3)
        for point, on in zip(points, front, strict=True):
            _cross(axes, point, color)
            axes.plot(
                point.x, point.y, marker, color=color, markersize=7, zorder=4, markerfacecolor=color if on else "white"
            )
            texts.append((point.x, point.y, point.text, color))
        axes.plot([], [], marker=marker, color=color, markersize=7, label=name)
    if reference is not None:
        _cross(axes, reference, "black")
        axes.plot(reference.x, reference.y, "*", color="black", markersize=13, zorder=4)
        axes.plot([], [], "*", color="black", markersize=11, label="reference")
        texts.append((reference.x, reference.y, "", "black"))
    _style(axes, f"{labels[0]} (mean reward)", f"{labels[1]} (mean reward)")
    axes.set_title(title, fontsize=11)
    _legend(figure, axes)
    _place_texts(figure, axes, texts)
    figure.savefig(file)


def plot_curves(
    file: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Mapping[str, Sequence[PlotPoint]], PlotPoint | None]]],
    *,
    x_label: str,
    title: str,
) -> None:
    """A grid of curves, {row: {column: (series, reference)}}; each series is joined from the reference on, by rising x.

    All panels share the x axis and those of a row the y axis, so that they can be compared.
    """
    rows = list(panels)
    columns = list(dict.fromkeys(c for row in panels.values() for c in row))
    size = (max(6.0, 2.3 * len(columns) + 1.0), 2.3 * len(rows) + 1.4)
    figure, grid = _figure(*size, len(rows), len(columns), sharex=True, sharey="row")
    looks: dict[str, tuple[str, str]] = {}
    for row, name in enumerate(rows):
        for column, weights in enumerate(columns):
            axes = grid[row, column]
            series, reference = panels[name].get(weights, ({}, None))
            for label, points in series.items():
                n = len(looks)
                color, marker = looks.setdefault(label, (COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]))
                joined = sorted((p.x, p.y) for p in [*points, *([reference] if reference else [])])
                axes.plot(*zip(*joined, strict=True), color=color, linewidth=1.2, alpha=0.7, zorder=3)
                for point in points:
                    _cross(axes, point, color)
                    axes.plot(point.x, point.y, marker, color=color, markersize=5, zorder=4)
                    place = {"xytext": (4, -9), "textcoords": "offset points"}
                    axes.annotate(point.text, (point.x, point.y), **place, fontsize=6, color=color)
            if reference is not None:
                _cross(axes, reference, "black")
                axes.plot(reference.x, reference.y, "*", color="black", markersize=9, zorder=4)
            _style(axes, x_label if row == len(rows) - 1 else "", name if column == 0 else "", size=9)
            axes.tick_params(labelsize=8)
            if row == 0:
                axes.set_title(weights, fontsize=9)
    for label, (color, marker) in looks.items():
        grid[0, 0].plot([], [], marker=marker, color=color, markersize=5, label=label)
    if any(reference is not None for row in panels.values() for _, reference in row.values()):
        grid[0, 0].plot([], [], "*", color="black", markersize=9, label="reference")
    figure.suptitle(title, fontsize=11)
    _legend(figure, grid[0, 0])
    figure.savefig(file)


def _cycle(values: Sequence[str]):
    while True:
        yield from values
