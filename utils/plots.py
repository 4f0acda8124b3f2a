"""The plots of a report: fronts of two objectives, and rewards against KL, in light and dark.

They are drawn without a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from utils.pareto import pareto_front

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "h")  # not as many as colours, which would come round together
COLUMNS = 6  # panels beside each other; more would be too small to read
CROWD = 24  # points in a front beyond which not each has its text, and intervals are fainter


@dataclass(frozen=True)
class Theme:
    """Colours of a figure that are not data's."""

    paper: str
    ink: str
    grid: str
    lift: float  # share of white mixed into the data's colours, so that they stand out from the paper


THEMES = {"light": Theme("#ffffff", "#1f2328", "#e6e6e6", 0.0), "dark": Theme("#16181d", "#e6e8eb", "#33373e", 0.3)}


@dataclass(frozen=True)
class Look:
    """How a series is drawn: its colour, how far it fades towards the paper (0 to 1), and its marker."""

    color: str
    marker: str
    fade: float = 0.0

    def on(self, paper: Theme) -> str:
        """Its colour on a theme's paper."""
        return _mix(_mix(self.color, "#ffffff", paper.lift), paper.paper, self.fade)


@dataclass(frozen=True)
class PlotPoint:
    """One point in a plot: means, their intervals, the text beside it, and its own look where it has one."""

    x: float
    y: float
    x_interval: tuple[float, float] = (math.nan, math.nan)
    y_interval: tuple[float, float] = (math.nan, math.nan)
    text: str = ""
    look: Look | None = None


def looks_of(families: Mapping[str, Sequence[str]]) -> dict[str, Look]:
    """A look for every series, {family: its series}: one colour per family, faded to full, one marker per series."""
    looks = {}
    for n, members in enumerate(families.values()):
        for i, name in enumerate(members):
            fade = 0.5 * (len(members) - 1 - i) / max(1, len(members) - 1)
            looks[name] = Look(COLORS[n % len(COLORS)], MARKERS[len(looks) % len(MARKERS)], fade)
    return looks


def _mix(color: str, other: str, share: float) -> str:
    from matplotlib.colors import to_hex, to_rgb

    return to_hex([(1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other), strict=True)])


@contextmanager
def _canvas(file, theme: str, width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure in a theme's colours and its axes (rows, columns), written to `file` at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    colors = dict.fromkeys(names, look.ink) | {"figure.facecolor": look.paper, "axes.facecolor": look.paper}
    with matplotlib.rc_context(colors | {"grid.color": look.grid, "text.parse_math": False}):  # a $ in a name is one
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False), look
        figure.savefig(file, format="png")


def _style(axes, x_label: str, y_label: str, size: float = 11) -> None:
    axes.set_xlabel(x_label, fontsize=size)
    axes.set_ylabel(y_label, fontsize=size)
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.08)


def _draw(
    axes, point: PlotPoint, color: str, marker: str, size: float, *, filled: bool = True, faint: bool = False
) -> None:
    """A point on its cross of intervals."""
    for low, high, horizontal in ((*point.x_interval, True), (*point.y_interval, False)):
        if math.isfinite(low) and math.isfinite(high):
            ends = ([low, high], [point.y] * 2) if horizontal else ([point.x] * 2, [low, high])
            alpha = 0.2 if faint else 0.5
            axes.plot(*ends, color=color, linewidth=0.9, alpha=alpha, solid_capstyle="butt", zorder=2)
    face = color if filled else axes.get_facecolor()
    axes.plot(point.x, point.y, marker, color=color, markersize=size, zorder=4, markerfacecolor=face)


def _settle(figure) -> None:
    """Lay the figure out once and for all, so that places on the screen are known and stay."""
    figure.canvas.draw()
    figure.set_layout_engine("none")


def _place_texts(figure, axes, texts: Sequence[tuple[float, float, str, str]], size: float = 7) -> None:
    """Write small texts beside points of a settled figure, each where it covers the fewest points and other texts."""
    to_pixels, scale = axes.transData.transform, figure.dpi / 72
    points = np.array([to_pixels((x, y)) for x, y, _, _ in texts]).reshape(-1, 2)
    frame, taken = axes.get_window_extent(), []
    for (x, y, text, color), (px, py) in zip(texts, points, strict=True):
        if not text:
            continue
        width, height, best = 0.62 * size * len(text) * scale, 1.15 * size * scale, None
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
        place = {"xytext": offset, "textcoords": "offset points", "va": "bottom", "ha": "left"}
        axes.annotate(text, (x, y), **place, fontsize=size, color=color, zorder=5)


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # below the axes, so that it never covers data
        room = figure.get_figwidth() * 72 / (5.4 * max(map(len, labels)) + 48)  # points of the longest entry at size 9
        columns = min(len(handles), max(1, int(room)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def plot_front(
    file,
    series: Mapping[str, Sequence[PlotPoint]],
    reference: PlotPoint | None,
    *,
    labels: tuple[str, str],
    title: str,
    looks: Mapping[str, Look],
    theme: str = "light",
) -> None:
    """Mean rewards of two objectives: each series in its look, its own front as a line, intervals as crosses.

    Points that another point of their series dominates are hollow and off the line. In a crowd of points only the ends
    of each series and what no point dominates have their text.

    Args:
        file: a path or a stream; what is written is PNG.
    """
    with _canvas(file, theme, 7.4, 6.4) as (figure, grid, paper):
        axes, texts = grid[0, 0], []
        everything = [p for points in series.values() for p in points]
        crowd = len(everything) > CROWD
        front = pareto_front([(p.x, p.y) for p in everything]) if crowd else []
        best = {id(p) for p, on in zip(everything, front, strict=crowd) if on}
        for name, points in series.items():
            color, marker = looks[name].on(paper), looks[name].marker
            front = pareto_front([(p.x, p.y) for p in points])
            line = sorted((p.x, p.y) for p, on in zip(points, front, strict=True) if on)
            axes.plot(*zip(*line, strict=True), color=color, linewidth=1.4, alpha=0.8, zorder=3)
            for point, on in zip(points, front, strict=True):
                _draw(axes, point, color, marker, 7, filled=bool(on), faint=crowd)
                told = not crowd or id(point) in best or point is points[0] or point is points[-1]
                texts.append((point.x, point.y, point.text if told else "", color))
            axes.plot([], [], marker=marker, color=color, markersize=7, label=name)
        if reference is not None:
            _draw(axes, reference, paper.ink, "*", 13)
            axes.plot([], [], "*", color=paper.ink, markersize=11, label="reference")
            texts.append((reference.x, reference.y, "", paper.ink))
        _style(axes, f"{labels[0]} (mean reward)", f"{labels[1]} (mean reward)")
        axes.set_title(title, fontsize=11)
        _legend(figure, axes)
        _settle(figure)
        _place_texts(figure, axes, texts)


def plot_curves(
    file,
    panels: Mapping[str, Mapping[str, tuple[Mapping[str, Sequence[PlotPoint]], PlotPoint | None]]],
    *,
    x_label: str,
    title: str,
    looks: Mapping[str, Look],
    theme: str = "light",
) -> None:
    """A grid of curves, {row: {column: (series, reference)}}; each series is joined from the reference on, by rising x.

    All panels share the x axis and those of a row the y axis, so that they can be compared. Columns beyond COLUMNS
    go on below.
    """
    columns = list(dict.fromkeys(c for row in panels.values() for c in row))
    blocks = [columns[i : i + COLUMNS] for i in range(0, len(columns), COLUMNS)]
    across, down = len(blocks[0]), len(blocks) * len(panels)
    with _canvas(file, theme, max(6.0, 2.3 * across + 1.0), 2.3 * down + 1.4, down, across) as (figure, grid, paper):
        texts, shown = [], {}
        for row, (block, name) in enumerate((block, name) for block in blocks for name in panels):
            for column in range(across):
                axes = grid[row, column]
                if column >= len(block):
                    axes.set_axis_off()
                    continue
                for share, first in ((axes.sharex, grid[0, 0]), (axes.sharey, grid[row % len(panels), 0])):
                    if axes is not first:
                        share(first)
                series, reference = panels[name].get(block[column], ({}, None))
                beside = [(reference.x, reference.y, "", paper.ink)] if reference else []
                for label, points in series.items():
                    color = looks[label].on(paper)
                    shown.setdefault(label, (color, looks[label].marker))
                    joined = sorted((p.x, p.y) for p in [*points, *([reference] if reference else [])])
                    axes.plot(*zip(*joined, strict=True), color=color, linewidth=1.2, alpha=0.7, zorder=3)
                    for point in points:
                        look = point.look or looks[label]
                        _draw(axes, point, look.on(paper), look.marker, 5)
                        beside.append((point.x, point.y, point.text, color))
                if reference is not None:
                    _draw(axes, reference, paper.ink, "*", 9)
                texts.append((axes, beside))
                last = row == down - 1 or row // len(panels) == len(blocks) - 2 and column >= len(blocks[-1])
                last = last and row % len(panels) == len(panels) - 1
                _style(axes, x_label if last else "", name if column == 0 else "", size=9)
                axes.tick_params(labelsize=8, labelbottom=last, labelleft=column == 0)
                if row % len(panels) == 0:
                    axes.set_title(block[column], fontsize=9)
        for label, (color, marker) in shown.items():
            grid[0, 0].plot([], [], marker=marker, color=color, markersize=5, label=label)
        if any(reference is not None for row in panels.values() for _, reference in row.values()):
            grid[0, 0].plot([], [], "*", color=paper.ink, markersize=9, label="reference")
        figure.suptitle(title, fontsize=11)
        _legend(figure, grid[0, 0])
        _settle(figure)
        for axes, beside in texts:
            _place_texts(figure, axes, beside, size=6.5)
