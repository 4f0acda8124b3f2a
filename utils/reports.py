"""What a Pareto report says, read from run folders alone: sections, tables, figures, Markdown.

A *run* is one folder. Runs that differ in their weights alone are one *series*: one front, one colour. A *section* is a
set of objectives, usually a pair, with the runs whose weights lie within it and those that take none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from utils.cli import DataError
from utils.pareto import (
    PlotPoint,
    bootstrap,
    hypervolume_interval,
    interpolate_at,
    mean_interval,
    paired_difference,
    pareto_front,
    percentiles,
    plot_curves,
    plot_front,
    reference_point_of,
)
from utils.runs import (
    ARGUMENTS,
    MEASURES,
    REWARDS,
    SAMPLES,
    SUMMARY,
    describe_weights,
    mean_and_error,
    read_arguments,
    read_samples,
)

SAMPLES_SHOWN = 3
ALWAYS_NAMED = ("beta", "kl_budget", "num_samples")  # settings that a series' name says even where all runs share them


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class RunRecord:
    """A complete run folder."""

    folder: Path
    arguments: dict
    table: pd.DataFrame  # rewards.csv, indexed by the prompt's index
    by_budget: bool = True  # a run whose beta met a KL budget is a point of the budget's front, not of its beta's

    @property
    def method(self) -> str:
        return self.arguments["method"]

    @property
    def weights(self) -> dict[str, float]:
        return self.arguments["weights"]

    @property
    def label(self) -> str:
        return self.arguments["configuration"].get("label", "")

    @property
    def dataset(self) -> str:
        return self.arguments["dataset"]

    @property
    def kl_added(self) -> float:
        return self.arguments["kl_added"]

    @property
    def tracks_kl(self) -> bool:
        return "log_ratio" in self.table

    @property
    def scores(self) -> list[str]:
        """Columns that are rewards or an independent judge's scores."""
        return [c for c in self.table.columns if c not in MEASURES]

    @cached_property
    def samples(self) -> list[dict]:
        return read_samples(self.folder)

    @property
    def kl(self) -> tuple[float, float]:
        """KL estimate (paper, eq. 6) and its standard error over prompts; an upper bound where kl_added is not 0."""
        if not self.tracks_kl:
            return math.nan, math.nan
        mean, error = mean_and_error(self.table["log_ratio"])
        return mean + self.kl_added, error

    @property
    def budget(self) -> float | None:
        """The KL budget that the run's beta was found for, in nats."""
        return self.arguments.get("kl_search", {}).get("budget")

    def mean(self, column: str) -> float:
        return float(self.table[column].mean()) if column in self.table else math.nan

    @property
    def settings(self) -> dict:
        """What tells this run's series from others: everything that determines the result but the weights."""
        indices, series = self.arguments["indices"], self.arguments["series"]
        if self.budget is not None and self.by_budget:  # each point of such a front has a beta of its own
            series = {"kl_budget": self.budget} | {k: series[k] for k in series if k != "beta"}
        return {
            **series,
            **{k: v for k, v in self.arguments["arguments"].items() if k != "track_KL"},
            "num_trials": self.arguments["num_trials"],
            "prompts": f"{min(indices)}-{max(indices)}",
        }


def load_runs(paths: Sequence[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """Complete runs below these folders, and what was left out and why.

    Of several runs of one identity the newest complete one is kept.

    Raises:
        DataError: a path does not exist, a file is damaged, or no run is complete.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such run folder")
        if (path / ARGUMENTS).is_file():
            folders[path] = None
        else:
            found = (f.parent for f in sorted(path.rglob(ARGUMENTS)))
            folders.update(
                dict.fromkeys(f for f in found if (f / SAMPLES).is_file())
            )  # value models have args.yaml too
    newest: dict[str, RunRecord] = {}
    left_out = []
    for folder in folders:
        arguments = read_arguments(folder)
        if not (folder / SUMMARY).is_file():
            left_out.append(f"{folder}: incomplete; its command goes on with it: {arguments['process']['command']}")
            continue
        table = pd.read_csv(folder / REWARDS, index_col="index")
        if list(table.index) != sorted(arguments["indices"]):
            raise DataError(f"{folder / REWARDS} has other prompts than {ARGUMENTS} says; it was changed after the run")
        record = RunRecord(folder, arguments, table)
        other = newest.get(arguments["identity"])
        if other is not None:
            old, record = sorted((other, record), key=lambda r: r.arguments["started"])
            left_out.append(f"{old.folder}: the same run was made again later")
        newest[arguments["identity"]] = record
    if not newest:
        raise DataError(f"no complete run in {', '.join(map(str, paths))}" + "".join(f"; {text}" for text in left_out))
    return _with_their_fronts(sorted(newest.values(), key=lambda r: r.arguments["started"])), left_out


def _with_their_fronts(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs whose beta met a KL budget, as points of a front of that beta where other runs make one.

    A search may end at a beta that was run by hand, so that one folder is a point of two fronts: its beta's keeps it.
    """

    def front(run: RunRecord) -> str:
        return repr((run.label, run.dataset, run.method, sorted(replace(run, by_budget=False).settings.items())))

    by_hand = {front(run) for run in runs if run.budget is None}
    return [replace(run, by_budget=run.budget is not None and front(run) not in by_hand) for run in runs]


# ------------------------------------------------------------------------------------------------------------- series


def series_names(runs: Sequence[RunRecord], *, families: bool = False) -> dict[Path, str]:
    """{folder: name of its series}: the method, its beta or number of samples, and what else tells series apart.

    With `families`, runs that differ in beta or in the number of samples alone have one name: one curve against KL.
    """
    names = {}
    for method, group in _grouped(runs, lambda r: r.method):
        keys = list(dict.fromkeys(k for r in group for k in r.settings))
        varied = [k for k in keys if len({str(r.settings.get(k)) for r in group}) > 1]
        for r in group:
            n = r.settings.get("num_samples", 1)
            name = f"{method.removesuffix('_best_of_n').removesuffix('best_of_n')}".replace("_", " ").strip()
            if method.endswith("best_of_n"):
                name += (", " if name else "") + f"best of {'N' if families else n}"
            named = [k for k in keys if k != "num_samples" and k in r.settings and (k in varied or k in ALWAYS_NAMED)]
            named = [k for k in named if not (families and k in ALWAYS_NAMED)]
            names[r.folder] = ", ".join([name, *(f"{k} {_short(r.settings[k])}" for k in named)])
    return names


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grouped(items, key):
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


# ----------------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class Section:
    """A set of objectives and the runs that belong to it, in the order of series and weights."""

    label: str
    dataset: str
    objectives: tuple[str, ...]
    runs: list[RunRecord]
    names: dict[Path, str] = field(repr=False)
    families: dict[Path, str] = field(repr=False)

    @property
    def title(self) -> str:
        return f"{self.dataset}: {' and '.join(self.objectives)}"

    @property
    def series(self) -> dict[str, list[RunRecord]]:
        """Runs with weights, by series."""
        return dict(_grouped([r for r in self.runs if r.weights], lambda r: self.names[r.folder]))

    @property
    def reference(self) -> RunRecord | None:
        return next((r for r in self.runs if r.method == "reference"), None)

    @property
    def shared(self) -> list[int]:
        """Prompt indices that all runs have."""
        return sorted(set.intersection(*(set(r.table.index) for r in self.runs)))

    def means(self) -> np.ndarray:
        """(runs, objectives) mean rewards."""
        return np.array([[r.mean(o) for o in self.objectives] for r in self.runs])


def sections_of(runs: Sequence[RunRecord], objectives: Sequence[str] | None = None) -> list[Section]:
    """Sections of the runs: those named by `objectives`, else every pair (or larger set) that some run's weights span.

    Raises:
        DataError: an objective that no run has scored.
    """
    sections = []
    for (label, dataset), group in _grouped(runs, lambda r: (r.label, r.dataset)):
        order = list(group[0].arguments["configuration"]["datasets"][dataset]["objectives"])
        scored = [o for o in order if all(o in r.table for r in group)]
        if objectives:
            missing = [o for o in objectives if o not in scored]
            if missing:
                raise DataError(
                    f"--objectives: not every run of {dataset} has {', '.join(missing)}; all have {', '.join(scored)}"
                )
            sets = [tuple(objectives)]
        else:
            spanned = [tuple(o for o in scored if o in r.weights) for r in group]
            sets = sorted({s for s in spanned if len(s) > 1}, key=lambda s: (len(s), [order.index(o) for o in s]))
            if not sets:  # single objectives or the reference alone: every pair of what is weighted, else of all
                weighted = [o for o in scored if any(o in s for s in spanned)]
                sets = list(itertools.combinations(weighted if len(weighted) > 1 else scored, 2))
        names, families = series_names(group), series_names(group, families=True)
        for chosen in sets:
            inside = [r for r in group if set(r.weights) <= set(chosen)]
            inside.sort(key=lambda r: (bool(r.weights), names[r.folder], [r.weights.get(o, 0.0) for o in chosen]))
            if inside:
                sections.append(Section(label, dataset, chosen, inside, names, families))
    return sections


def unequal_settings(section: Section) -> list[str]:
    """What makes the runs of a section hard to compare: settings of decoding and prompts that differ."""
    notes = []
    for key in (
        "data_split", "seed", "topk", "temperature", "suppress_first_eos", "max_new_tokens", "num_trials", "prompts"
    ):  # fmt: skip
        values = {str(r.settings.get(key)) for r in section.runs}
        if len(values) > 1:
            notes.append(f"the runs differ in {key}: {', '.join(sorted(values))}")
    for run in section.runs:
        if run.budget is not None and not run.by_budget:
            name = f"{section.names[run.folder]} at {describe_weights(run.weights)}"
            notes.append(f"{name} met the KL budget of {run.budget:g} nats too, and stands with its beta")
    return notes


# ------------------------------------------------------------------------------------------------------------- figures


def run_rows(section: Section) -> list[dict]:
    """One row per run: weights, rewards with 95 % bootstrap intervals over prompts, KL, price and fluency."""
    front = pareto_front(section.means())
    rows = []
    for run, on_front in zip(section.runs, front, strict=True):
        kl, kl_error = run.kl
        row = {
            "series": section.names[run.folder],
            "method": run.method,
            "weights": run.weights,
            "beta": run.arguments["series"].get("beta"),
            "prompts": len(run.table),
            "folder": str(run.folder),
            "rewards": {},
            "kl": kl,
            "kl_error": kl_error,
            "kl_is_upper_bound": run.tracks_kl and run.kl_added != 0,
            "seconds_per_prompt": run.mean("seconds"),
            "tokens": run.mean("tokens"),
            "distinct": run.mean("distinct"),
            "reference_log_prob": run.mean("reference_log_prob"),
            "finished": run.mean("finished"),
            "dominated": not on_front,
        }
        for score in run.scores:
            low, high = mean_interval(run.table[score])
            row["rewards"][score] = {"mean": run.mean(score), "low": low, "high": high}
        rows.append(row)
    return rows


def hypervolumes(section: Section, reference_point: Sequence[float] | None = None) -> dict:
    """Hypervolume of each series over the prompts that all runs share, with its interval.

    The reference point is the worst mean of each objective among the runs, less a tenth of the range, unless given.
    """
    shared = section.shared
    if not shared:
        return {"reference_point": None, "prompts": 0, "series": []}
    objectives = list(section.objectives)

    def table(run):
        return run.table.loc[shared, objectives].to_numpy(np.float64)  # (prompts, objectives)

    if reference_point is None:
        reference_point = reference_point_of([table(r).mean(0) for r in section.runs])
    rows = []
    for name, runs in section.series.items():
        value, (low, high) = hypervolume_interval([table(r) for r in runs], reference_point)
        rows.append({"series": name, "points": len(runs), "hypervolume": value, "low": low, "high": high})
    return {"reference_point": [float(x) for x in reference_point], "prompts": len(shared), "series": rows}


def differences(section: Section) -> list[dict]:
    """Paired differences of every run to the reference, over the prompts that both have."""
    reference = section.reference
    rows = []
    for run in section.runs:
        if reference is None or run is reference:
            continue
        for score in run.scores:
            if score in reference.table:
                d = paired_difference(run.table[score].to_dict(), reference.table[score].to_dict())
                rows.append(
                    {
                        "series": section.names[run.folder], "weights": run.weights, "score": score,
                        "prompts": d.prompts, "difference": d.mean, "error": d.error,
                        "low": d.interval[0], "high": d.interval[1],
                    }
                )  # fmt: skip
    return rows


def at_equal_kl(section: Section) -> list[dict]:
    """Each MAVIS run less every other method's weighted reward at the same weights and the same KL.

    The other method's reward is read on the line through the reference and its runs by rising KL; beyond the KL that
    its runs reach, nothing is claimed. The interval resamples the prompts that all of these runs share.
    """
    rows = []
    steered = [r for r in section.runs if r.method.startswith("mavis") and r.tracks_kl]
    others = [r for r in section.runs if r.weights and r.tracks_kl]
    for run in steered:
        same = [r for r in others if r.method != run.method and r.weights == run.weights]
        for family, rivals in _grouped(same, lambda r: section.families[r.folder]):
            curve = ([section.reference] if section.reference and section.reference.tracks_kl else []) + rivals
            rows.append(_equal_kl_row(section, run, family, curve))
    return rows


def _equal_kl_row(section: Section, run: RunRecord, family: str, curve: list[RunRecord]) -> dict:
    shared = sorted(set.intersection(*(set(r.table.index) for r in [run, *curve])))
    added = np.array([r.kl_added for r in [run, *curve]])
    kls = np.array([r.table.loc[shared, "log_ratio"] for r in [run, *curve]])  # (runs, prompts)
    reward = np.array([sum(w * r.table.loc[shared, o] for o, w in run.weights.items()) for r in [run, *curve]])

    def difference(rows) -> float:
        kl, mean = kls[:, rows].mean(1) + added, reward[:, rows].mean(1)
        return mean[0] - interpolate_at(kl[0], kl[1:], mean[1:])

    value = difference(slice(None)) if shared else math.nan
    low, high = math.nan, math.nan
    if math.isfinite(value) and len(shared) > 1:
        draws = bootstrap(difference, len(shared))
        inside = draws[np.isfinite(draws)]  # a resample may fall beyond the curve's end
        if len(inside) > 0.9 * len(draws):
            low, high = percentiles(inside)
    return {
        "series": section.names[run.folder], "weights": run.weights, "against": family, "prompts": len(shared),
        "kl": run.kl[0], "highest_kl": max(r.kl[0] for r in curve), "lowest_kl": min(r.kl[0] for r in curve),
        "difference": value, "low": low, "high": high, "is_bound": any(r.kl_added for r in curve),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- plots


WEIGHTED = "weighted reward"


def _column(run: RunRecord, name: str, weights: Mapping[str, float]) -> np.ndarray:
    """(prompts,) of a reward, or of the rewards' weighted sum."""
    if name == WEIGHTED:
        return sum(w * run.table[o] for o, w in weights.items()).to_numpy()
    return run.table[name].to_numpy()


def _front_point(section: Section, run: RunRecord) -> PlotPoint:
    x, y = (run.table[o] for o in section.objectives)
    text = "/".join(f"{run.weights.get(o, 0):g}" for o in section.objectives) if run.weights else ""
    return PlotPoint(x.mean(), y.mean(), mean_interval(x), mean_interval(y), text)


def _kl_point(run: RunRecord, name: str, weights: Mapping[str, float]) -> PlotPoint:
    kl, error = run.kl
    values = _column(run, name, weights)
    series = run.arguments["series"]
    text = next((_short(series[k]) for k in ALWAYS_NAMED if k in series), "")
    return PlotPoint(kl, float(values.mean()), (kl - 1.96 * error, kl + 1.96 * error), mean_interval(values), text)


def plot_section(section: Section, output_dir: Path, stem: str) -> list[str]:
    """The figures of a section, as file names in `output_dir`: the front of a pair, and rewards against KL."""
    files = []
    title = "\n".join(t for t in (section.title, section.label) if t)
    if len(section.objectives) == 2:
        series = {name: [_front_point(section, r) for r in runs] for name, runs in section.series.items()}
        reference = section.reference and _front_point(section, section.reference)
        plot_front(output_dir / f"{stem}_front.png", series, reference, labels=section.objectives, title=title)
        files.append(f"{stem}_front.png")
    tracked = [r for r in section.runs if r.weights and r.tracks_kl]
    reference = section.reference if section.reference and section.reference.tracks_kl else None
    if tracked:
        panels = {}
        for name in (*section.objectives, WEIGHTED):
            panels[name] = {}
            for weights, runs in _grouped(tracked, lambda r: describe_weights(r.weights)):
                given = runs[0].weights
                series = {
                    family + (" (KL: upper bound)" if any(r.kl_added for r in rs) else ""): [
                        _kl_point(r, name, given) for r in rs
                    ]
                    for family, rs in _grouped(runs, lambda r: section.families[r.folder])
                }
                panels[name][weights] = (series, reference and _kl_point(reference, name, given))
        title += "\nnumbers: beta, or N"
        plot_curves(output_dir / f"{stem}_kl.png", panels, x_label="KL (nats per answer)", title=title)
        files.append(f"{stem}_kl.png")
    return files


# -------------------------------------------------------------------------------------------------------------- tables


def number(value, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval(entry: Mapping, value: str = "mean") -> str:
    text = number(entry[value])
    return text if not math.isfinite(entry["low"]) else f"{text} [{number(entry['low'])}, {number(entry['high'])}]"


def kl_text(row: Mapping) -> str:
    if not math.isfinite(row["kl"]):
        return "-"
    return ("<= " if row["kl_is_upper_bound"] else "") + f"{row['kl']:.2f} +- {number(row['kl_error'], 2)}"


Table = tuple[list[str], list[list[str]]]


def main_table(section: Section, rows: Sequence[Mapping]) -> Table:
    """Every run of the section; all rewards and judges' scores that some run has, the section's objectives first."""
    scores = list(dict.fromkeys([*section.objectives, *(s for r in rows for s in r["rewards"])]))
    header = ["method", "weights", "prompts", *scores, "KL", "s/prompt", "tokens", "distinct", "log p_ref", "dominated"]
    body = []
    for r in rows:
        body.append(
            [
                r["series"],
                describe_weights(r["weights"]) or "-",
                str(r["prompts"]),
                *(interval(r["rewards"][s]) if s in r["rewards"] else "-" for s in scores),
                kl_text(r),
                number(r["seconds_per_prompt"]),
                number(r["tokens"], 1),
                number(r["distinct"]),
                number(r["reference_log_prob"], 2),
                "yes" if r["dominated"] else "",
            ]
        )
    return header, body


def hypervolume_table(result: Mapping) -> Table:
    return ["method", "points", "hypervolume [95 %]"], [
        [r["series"], str(r["points"]), interval(r, "hypervolume")] for r in result["series"]
    ]


def difference_table(rows: Sequence[Mapping]) -> Table:
    return ["method", "weights", "reward", "difference [95 %]", "s.e.", "prompts"], [
        [
            r["series"],
            describe_weights(r["weights"]) or "-",
            r["score"],
            interval(r, "difference"),
            number(r["error"]),
            str(r["prompts"]),
        ]
        for r in rows
    ]


def equal_kl_table(rows: Sequence[Mapping]) -> Table:
    body = []
    for r in rows:
        text = interval(r, "difference")
        if not math.isfinite(r["difference"]):
            text = f"not reached: its KL spans {r['lowest_kl']:.2f} to {r['highest_kl']:.2f}"
        against = r["against"] + (" (KL: upper bound)" if r["is_bound"] else "")
        body.append([r["series"], describe_weights(r["weights"]), f"{r['kl']:.2f}", against, text, str(r["prompts"])])
    return ["method", "weights", "KL", "less", "weighted reward at equal KL [95 %]", "prompts"], body


def markdown_table(table: Table) -> str:
    header, body = table
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def text_table(table: Table) -> str:
    header, body = table
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [header, *body])
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ Markdown


def fenced(text: str) -> str:
    """Text as it is: a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(list(run)) for char, run in itertools.groupby(text) if char == "`"), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def samples_markdown(section: Section) -> str:
    """The first prompts that all runs share, each series' first answer to them, unedited: the most balanced weights."""
    chosen = [r for r in section.runs if not r.weights]
    for runs in section.series.values():
        chosen.append(min(runs, key=lambda r: max(r.weights.values())))
    parts = []
    for index in section.shared[:SAMPLES_SHOWN]:
        for n, run in enumerate(chosen):
            sample = next(s for s in run.samples if s["index"] == index and s["trial"] == 0)
            if n == 0:
                parts.append(f"**Prompt {index}**\n\n{fenced(sample['prompt'])}")
            scores = ", ".join(f"{k} {v:.2f}" for k, v in sample["rewards"].items())
            weights = f" ({describe_weights(run.weights)})" if run.weights else ""
            parts.append(f"{section.names[run.folder]}{weights}: {scores}\n\n{fenced(sample['response'])}")
    return "\n".join(parts)


@dataclass(frozen=True)
class SectionReport:
    """A section and everything that is computed of it."""

    section: Section
    rows: list[dict]
    hypervolume: dict
    differences: list[dict]
    equal_kl: list[dict]
    figures: list[str]
    notes: list[str]

    def as_dict(self) -> dict:
        section = self.section
        return {
            "configuration": section.label, "dataset": section.dataset, "objectives": list(section.objectives),
            "runs": self.rows, "hypervolume": self.hypervolume, "differences_to_reference": self.differences,
            "at_equal_kl": self.equal_kl, "figures": self.figures, "notes": self.notes,
        }  # fmt: skip

    def hypervolume_text(self) -> str:
        point = self.hypervolume["reference_point"]
        if point is None:
            return "No prompt is shared by all runs, so there is no hypervolume."
        point = ", ".join(f"{o} {x:.4f}" for o, x in zip(self.section.objectives, point, strict=True))
        prompts = self.hypervolume["prompts"]
        return f"Hypervolume above the reference point ({point}), over the {prompts} prompts that all runs share."

    def markdown(self) -> str:
        parts = [f"## {self.section.title}\n"]
        parts += [f"Note: {note}.\n" for note in self.notes]
        parts += [f"![{name}]({name})\n" for name in self.figures]
        parts.append(
            "Mean rewards with 95 % bootstrap intervals over prompts. KL is the mean log-ratio of an answer to the "
            "reference's full softmax, with its standard error; seconds are decoding alone, per answer, in batches; "
            "log p_ref is the reference's log-probability per token. The intervals are each run's alone; runs on "
            "the same prompts are compared by the paired differences below.\n"
        )
        parts.append(markdown_table(main_table(self.section, self.rows)))
        if self.hypervolume["series"]:
            parts += [self.hypervolume_text() + "\n", markdown_table(hypervolume_table(self.hypervolume))]
        if self.equal_kl:
            parts.append("Weighted reward of each MAVIS run less another method's at the same weights and KL.\n")
            parts.append(markdown_table(equal_kl_table(self.equal_kl)))
        if self.differences:
            parts.append("Paired differences to the reference on the same prompts.\n")
            parts.append(markdown_table(difference_table(self.differences)))
        parts.append(f"### Samples\n\n{samples_markdown(self.section)}")
        return "\n".join(parts)


def report_section(section: Section, output_dir: Path, stem: str, reference_point=None) -> SectionReport:
    """Compute a section and draw its figures."""
    return SectionReport(
        section,
        run_rows(section),
        hypervolumes(section, reference_point),
        differences(section),
        at_equal_kl(section),
        plot_section(section, output_dir, stem),
        unequal_settings(section),
    )


def plain(value):
    """Plain data without nan, for JSON."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
