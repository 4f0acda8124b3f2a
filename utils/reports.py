"""What a Pareto report says, computed from points: sections, differences, figures.

Runs, points, series and families are those of `report_points`. A *section* is a set of objectives, usually a pair, with
the points whose weights lie within it and those that take none.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.errors import DataError
from utils.pareto import (
    equal_kl,
    hypervolume_draws,
    mean_interval,
    paired_difference,
    pareto_front,
    percentiles,
    reference_point_of,
)
from utils.plots import THEMES, PlotPoint, looks_of, plot_curves, plot_front
from utils.report_points import ALWAYS_NAMED, WEIGHTED, Point, grouped, series_names, short, spans
from utils.summaries import EXACT_KL, GENERATED, WORK, describe_weights, mean_and_error

# ----------------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class Section:
    """A set of objectives and the points that belong to it: the reference, MAVIS, the others, by series and weights."""

    label: str
    dataset: str
    split: str
    objectives: tuple[str, ...]
    points: list[Point]
    names: dict[tuple, str] = field(repr=False)
    families: dict[tuple, str] = field(repr=False)

    @property
    def title(self) -> str:
        split = f" ({self.split})" if self.split not in ("", "test") else ""
        return f"{self.dataset}{split}: {' and '.join(self.objectives)}"

    def name(self, point: Point) -> str:
        return self.names[point.key]

    def family(self, point: Point) -> str:
        return self.families[point.key]

    @property
    def reference(self) -> Point | None:
        return next((p for p in self.points if p.method == "reference"), None)

    @property
    def compared(self) -> list[Point]:
        """All points but the reference."""
        return [p for p in self.points if p is not self.reference]

    @property
    def series(self) -> dict[str, list[Point]]:
        """All points but the reference, by series."""
        return dict(grouped(self.compared, self.name))

    @property
    def shared(self) -> list[int]:
        """Prompt indices that all points have."""
        return sorted(set.intersection(*(set(p.table.index) for p in self.points)))

    def means(self) -> np.ndarray:
        """(points, objectives) mean rewards."""
        return np.array([[p.mean(o) for o in self.objectives] for p in self.points])

    def matches(self, point: Point, name: str) -> bool:
        """Whether a name on the command line means this point: its series, its family or its method."""
        known = {self.name(point), self.family(point), point.method, point.method.replace("_", " ")}
        return name in known


def sections_of(points: Sequence[Point], objectives: Sequence[str] | None = None) -> list[Section]:
    """Sections: those named by `objectives`, else every pair (or larger set) that some point's weights span.

    Raises:
        DataError: an objective that no run has scored.
    """
    sections = []
    for (label, dataset, split), group in grouped(points, lambda p: p.runs[0].world):
        order = list(group[0].arguments["configuration"]["datasets"][dataset]["objectives"])
        scored = [o for o in order if all(o in p.table for p in group)]
        if objectives:
            missing = [o for o in objectives if o not in scored]
            if missing:
                raise DataError(
                    f"--objectives: not every run of {dataset} has {', '.join(missing)}; all have {', '.join(scored)}"
                )
            sets = [tuple(objectives)]
        else:
            spanned = [tuple(o for o in scored if o in p.weights) for p in group]
            sets = sorted({s for s in spanned if len(s) > 1}, key=lambda s: (len(s), [order.index(o) for o in s]))
            if not sets:  # single objectives or the reference alone: every pair of what is weighted, else of all
                weighted = [o for o in scored if any(o in s for s in spanned)]
                sets = list(itertools.combinations(weighted if len(weighted) > 1 else scored, 2))
        names, families = series_names(group), series_names(group, families=True)
        for chosen in sets:
            inside = [p for p in group if set(p.weights) <= set(chosen)]

            def place(p, chosen=chosen, names=names):
                beta = p.settings.get("beta") or p.settings.get("kl_budget") or 0
                first = (p.method != "reference", not p.method.startswith("mavis"), not p.weights)
                number = (p.method, beta, p.settings.get("num_samples", 1))
                return first, number, names[p.key], [-p.weights.get(o, 0.0) for o in chosen]

            inside.sort(key=place)
            if inside:
                sections.append(Section(label, dataset, split, chosen, inside, names, families))
    return sections


def unequal_settings(section: Section) -> list[str]:
    """What makes the points of a section hard to compare: settings of decoding, prompts, seeds or rewards."""
    notes = []
    settings = [p.settings | {"prompts": spans(p.table.index), "seeds": spans(p.by_seed)} for p in section.points]
    decoded = [s for s in settings if "topk" in s]  # how given answers were is not on record
    for key in ("seeds", "topk", "temperature", "suppress_first_eos", "max_new_tokens", "num_trials", "prompts"):
        of_decoding = key in ("topk", "suppress_first_eos", "max_new_tokens")
        values = {str(s.get(key)) for s in (decoded if of_decoding else settings)}
        if len(values) > 1:
            notes.append(f"the runs differ in {key}: {'; '.join(sorted(values))}")
    rewards = {json.dumps(r.arguments["determining"]["rewards"], sort_keys=True) for p in section.points
               for r in p.runs if "rewards" in (r.arguments.get("determining") or {})}  # fmt: skip
    if len(rewards) > 1:
        notes.append("the runs were scored by different reward models: a reward was trained anew between them")
    for point in section.points:
        if point.budget is not None and not point.by_budget:
            name = f"{section.names[point.key]} at {describe_weights(point.weights)}"
            notes.append(f"{name} met the KL budget of {point.budget:g} nats too, and stands with its beta")
    return notes


# ------------------------------------------------------------------------------------------------------------- numbers


def point_rows(section: Section) -> list[dict]:
    """One row per point: weights, rewards with 95 % bootstrap intervals over prompts, KL, price and fluency.

    `dominated` is by any point of the section, `dominated_in_series` by one of its own series. Figures of answers are
    per prompt and trial.
    """
    means = section.means()
    front = pareto_front(means)
    own = {}
    for name in {section.name(p) for p in section.points}:
        members = [i for i, p in enumerate(section.points) if section.name(p) == name]
        own |= dict(zip(members, pareto_front(means[members]), strict=True))
    rows = []
    for i, point in enumerate(section.points):
        kl, kl_error = point.kl
        row = {
            "series": section.name(point),
            "family": section.family(point),
            "method": point.method,
            "weights": point.weights,
            "beta": point.arguments["series"].get("beta"),
            "prompts": len(point.table),
            "trials": point.arguments["num_trials"],
            "seeds": list(point.by_seed),
            "folders": [str(r.folder) for r in point.runs],
            "rewards": {},
            "kl": kl,
            "kl_error": kl_error,
            "kl_is_upper_bound": point.tracks_kl and point.kl_added != 0,
            **{n: list(mean_and_error(point.table[n])) if n in point.table else None for n in EXACT_KL},
            "kl_seed_sd": point.over_seeds("log_ratio")[1] if point.tracks_kl else math.nan,
            "seconds_per_prompt": point.mean("seconds"),
            "tokens": point.mean("tokens"),
            "generated_tokens": point.mean(GENERATED),
            **{what: point.mean(what) for what in WORK},
            "distinct": point.mean("distinct"),
            "reference_log_prob": point.mean("reference_log_prob"),
            "finished": point.mean("finished"),
            "dominated": not front[i],
            "dominated_in_series": not own[i],
        }
        for score in point.scores:
            mean, error = mean_and_error(point.table[score])
            low, high = mean_interval(point.table[score])
            by_seed, deviation = point.over_seeds(score)
            row["rewards"][score] = {
                "mean": mean, "low": low, "high": high, "error": error, "seed_means": by_seed, "seed_sd": deviation,
            }  # fmt: skip
        rows.append(row)
    return rows


def hypervolumes(section: Section, reference_point: Sequence[float] | None = None) -> dict:
    """Hypervolume of each series over the prompts that all points share, with its interval, and paired differences.

    The reference point is the worst mean of each objective among the points, less a tenth of the range, unless given.
    """
    shared = section.shared
    if not shared:
        return {"reference_point": None, "prompts": 0, "series": [], "differences": []}
    objectives = list(section.objectives)

    def table(point):
        return point.table.loc[shared, objectives].to_numpy(np.float64)  # (prompts, objectives)

    if reference_point is None:
        reference_point = reference_point_of([table(p).mean(0) for p in section.points])
    rows, drawn = [], {}
    for name, points in section.series.items():
        value, drawn[name] = hypervolume_draws([table(p) for p in points], reference_point)
        low, high = percentiles(drawn[name])
        rows.append({"series": name, "points": len(points), "hypervolume": value, "low": low, "high": high})
    differences = []
    for a, b in itertools.combinations(rows, 2):
        low, high = percentiles(drawn[a["series"]] - drawn[b["series"]])
        value = a["hypervolume"] - b["hypervolume"]
        differences.append({"a": a["series"], "b": b["series"], "difference": value, "low": low, "high": high})
    point = [float(x) for x in reference_point]
    return {"reference_point": point, "prompts": len(shared), "series": rows, "differences": differences}


def to_reference(section: Section) -> list[dict]:
    """Paired differences of every point to the reference, over the prompts that both have."""
    if section.reference is None:
        return []
    return [row for p in section.compared for row in compare(section, p, section.reference)]


def between_methods(section: Section, wanted: Sequence[tuple[str, str]] | None = None) -> list[dict]:
    """Paired differences of two methods at the same weights: of all pairs of series, or of those that are named.

    A method that takes no weights is compared with every weights of the other. MAVIS stands first in a pair.
    """
    if wanted:
        found = [(a, b) for x, y in wanted for a in section.points for b in section.points
                 if section.matches(a, x) and section.matches(b, y) and section.name(a) != section.name(b)]  # fmt: skip
    else:
        found = [(a, b) for a, b in itertools.combinations(section.compared, 2) if section.name(a) != section.name(b)]
    same = [(a, b) for a, b in found if (a.weights == b.weights or not (a.weights and b.weights)) and a.runs != b.runs]
    return [row for a, b in same for row in compare(section, a, b)]


def compare(section: Section, a: Point, b: Point) -> list[dict]:
    """a - b of every score that both have, and of the weighted reward, on the prompts that both answered."""
    weights = a.weights or b.weights
    scores = [s for s in dict.fromkeys([*section.objectives, *a.scores]) if s in a.table and s in b.table]
    rows = []
    for score in [*scores, *([WEIGHTED] if weights else [])]:
        d = paired_difference(a.column(score, weights).to_dict(), b.column(score, weights).to_dict())
        rows.append(
            {
                "a": section.name(a), "b": section.name(b), "weights": weights, "score": score,
                "prompts": d.prompts, "difference": d.mean, "error": d.error,
                "low": d.interval[0], "high": d.interval[1], "wins": d.wins, "ties": d.ties, "losses": d.losses,
            }
        )  # fmt: skip
    return rows


def at_equal_kl(section: Section) -> list[dict]:
    """Each point's weighted reward less every other method's at the same weights and the same KL.

    The other method's reward is read on straight lines through the reference and its points; beyond the KL that they
    span nothing is claimed. Rewards usually bend downwards as KL grows, so a line between two points lies below the
    method's true curve and flatters what is compared with it. Both directions are therefore given (each method's
    points against the other's lines): where they agree, the lines are not what decides.
    """
    rows = []
    tracked = [p for p in section.compared if p.tracks_kl]
    start = [section.reference] if section.reference and section.reference.tracks_kl else []
    for point in tracked:
        for family, others in grouped([p for p in tracked if section.family(p) != section.family(point)
                                       and p.runs != point.runs], section.family):  # fmt: skip
            for weights, rivals in _rivals(point, others):
                rows.append(_equal_kl_row(section, point, weights, family, start + rivals))
    return rows


def _rivals(point: Point, others: Sequence[Point]):
    """(weights, points of another method that are measured by them) that a point may be compared with."""
    if point.weights:
        same = [p for p in others if p.weights in (point.weights, {})]
        return [(point.weights, same)] if same else []
    return [(group[0].weights, group) for _, group in grouped(others, lambda p: str(p.weights)) if group[0].weights]


def _equal_kl_row(section: Section, point: Point, weights: dict, family: str, curve: list[Point]) -> dict:
    shared = sorted(set.intersection(*(set(p.table.index) for p in [point, *curve])))
    result, means = None, [math.nan]
    if shared:
        kls = [p.table.loc[shared, "log_ratio"] + p.kl_added for p in [point, *curve]]
        means = [float(kl.mean()) for kl in kls]
        rewards = [p.column(WEIGHTED, weights, shared) for p in [point, *curve]]
        result = equal_kl(kls[0], rewards[0], np.array(kls[1:]), np.array(rewards[1:]))
    # Best of N's KL is an upper bound: truly it lies further left, so that its curve is higher at any KL.
    bounds = {(True, True): "unknown", (True, False): "at least", (False, True): "at most", (False, False): "exact"}
    low, high = result.interval if result else (math.nan, math.nan)
    left, right = result.between if result else (math.nan, math.nan)
    return {
        "a": section.name(point), "weights": weights, "b": family, "prompts": len(shared), "kl": means[0],
        "lowest_kl": min(means[1:], default=math.nan), "highest_kl": max(means[1:], default=math.nan),
        "difference": result.difference if result else math.nan, "low": low, "high": high,
        "left_kl": left, "right_kl": right, "beyond": result.beyond if result else math.nan,
        "bound": bounds[point.kl_added != 0, any(p.kl_added for p in curve)],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figures


def _front_point(point: Point, x: str, y: str) -> PlotPoint:
    a, b = point.table[x], point.table[y]
    text = "/".join(f"{point.weights.get(o, 0):g}" for o in (x, y)) if point.weights else ""
    return PlotPoint(a.mean(), b.mean(), mean_interval(a), mean_interval(b), text)


def _kl_point(point: Point, name: str, weights: Mapping[str, float], look=None) -> PlotPoint:
    kl, error = point.kl
    values = point.column(name, weights)
    series = point.arguments["series"]
    text = next((short(series[k]) for k in ALWAYS_NAMED if k in series), "")
    interval = (kl - 1.96 * error, kl + 1.96 * error)
    return PlotPoint(kl, float(values.mean()), interval, mean_interval(values), text, look)


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its file's name, what it shows, and its PNG in each theme."""

    name: str
    caption: str
    png: dict[str, bytes] = field(repr=False)


def figures_of(section: Section, stem: str) -> list[Figure]:
    """A front for each pair of the section's objectives, and rewards against KL; names begin with `stem`."""
    looks = looks_of(
        {f: list(dict.fromkeys(map(section.name, ps))) for f, ps in grouped(section.compared, section.family)}
    )
    title = "\n".join(textwrap.fill(t, 70) for t in (section.title, section.label) if t)
    figures = []
    for x, y in itertools.combinations(section.objectives, 2):
        series = {name: [_front_point(p, x, y) for p in points] for name, points in section.series.items()}
        reference = section.reference and _front_point(section.reference, x, y)
        pair = "_front" if len(section.objectives) == 2 else f"_{x}_{y}_front"
        figures.append(
            Figure(
                f"{stem}{pair}.png",
                f"Mean rewards of {x} and {y} with 95 % intervals over prompts. Numbers are the weights of {x} and "
                f"{y}; lines are each series' own front, and a hollow point is dominated by another of its series.",
                _in_themes(plot_front, series, reference, labels=(x, y), title=title, looks=looks),
            )
        )
    panels = _kl_panels(section, looks)
    if panels:
        curves = {f: looks[section.name(ps[-1])] for f, ps in grouped(section.compared, section.family)}
        curves |= {f + BOUND: look for f, look in curves.items()}
        figures.append(
            Figure(
                f"{stem}_kl.png",
                "Rewards against the KL that they cost, with 95 % intervals; a column for each weights, lines from the "
                "reference through a method's points. Numbers are beta, or the N of best of N.",
                _in_themes(plot_curves, panels, x_label="KL (nats per answer)", title=title, looks=curves),
            )
        )
    return figures


BOUND = " (KL: upper bound)"


def _kl_panels(section: Section, looks) -> dict:
    """{reward: {weights: (series, reference)}} of the points whose KL was tracked, columns by falling first weight."""
    tracked = [p for p in section.compared if p.tracks_kl]
    free = [p for p in tracked if not p.weights]
    reference = section.reference if section.reference and section.reference.tracks_kl else None
    weighted = [p for p in tracked if p.weights]
    weighted.sort(key=lambda p: [-p.weights.get(o, 0.0) for o in section.objectives])
    panels: dict = {}
    for name in (*section.objectives, WEIGHTED):
        for text, points in grouped(weighted, lambda p: describe_weights(p.weights)):
            weights = points[0].weights
            series = {
                family + (BOUND if any(p.kl_added for p in ps) else ""): [
                    _kl_point(p, name, weights, looks[section.name(p)]) for p in ps
                ]
                for family, ps in grouped([*points, *free], section.family)
            }
            at = reference and _kl_point(reference, name, weights)
            panels.setdefault(name, {})[text] = (series, at)
    return panels


def _in_themes(plot, *args, **options) -> dict[str, bytes]:
    drawn = {}
    for theme in THEMES:
        stream = io.BytesIO()
        plot(stream, *args, **options, theme=theme)
        drawn[theme] = stream.getvalue()
    return drawn


# -------------------------------------------------------------------------------------------------------------- result


@dataclass(frozen=True)
class SectionReport:
    """A section and everything that is computed of it."""

    section: Section
    rows: list[dict]
    hypervolume: dict
    to_reference: list[dict]
    differences: list[dict]
    equal_kl: list[dict]
    figures: list[Figure]
    notes: list[str]

    def as_dict(self) -> dict:
        section = self.section
        return {
            "configuration": section.label, "dataset": section.dataset, "split": section.split,
            "objectives": list(section.objectives), "runs": self.rows, "hypervolume": self.hypervolume,
            "differences_to_reference": self.to_reference, "differences": self.differences,
            "at_equal_kl": self.equal_kl, "figures": [f.name for f in self.figures], "notes": self.notes,
        }  # fmt: skip


def report_section(section: Section, stem: str, reference_point=None, compared=None) -> SectionReport:
    """Compute a section and draw its figures; arguments as of `figures_of`, `hypervolumes`, `between_methods`."""
    return SectionReport(
        section,
        point_rows(section),
        hypervolumes(section, reference_point),
        to_reference(section),
        between_methods(section, compared),
        at_equal_kl(section),
        figures_of(section, stem),
        unequal_settings(section),
    )
