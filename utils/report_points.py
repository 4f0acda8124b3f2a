"""The points of a report, read from run folders alone.

A *run* is one folder. Runs of one method at one setting that differ in their seed, or that are ranges of prompts of one
evaluation, are one *point*. Points that differ in their weights alone are one *series*: one front, one look. Series
that differ in beta or in the number of samples alone are one *family*: one curve against KL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import DataError
from utils.rivals import MIXED_FROM_SINGLE, SINGLE_POLICY
from utils.runs import ARGUMENTS, REWARDS, SAMPLES, SUMMARY, read_arguments, read_samples
from utils.summaries import GENERATED, MEASURES, mean_and_error, per_prompt

ALWAYS_NAMED = ("beta", "kl_budget", "num_samples")  # settings that a series' name says even where all share them
WEIGHTED = "weighted reward"


@dataclass(frozen=True)
class RunRecord:
    """A complete run folder."""

    folder: Path
    arguments: dict
    samples: list[dict] = field(repr=False)
    table: pd.DataFrame = field(repr=False)  # rewards.csv, indexed by the prompt's index

    @property
    def seed(self) -> int:
        return self.arguments["arguments"].get("seed", 0)

    @property
    def label(self) -> str:
        return self.arguments["configuration"].get("label") or ""

    @property
    def world(self) -> tuple[str, str, str]:
        """What runs must share to be compared: the configuration's label, the data set and its split."""
        return self.label, self.arguments["dataset"], self.arguments["arguments"].get("data_split", "")

    @property
    def setting(self) -> str:
        """What the runs of one point share: everything on record but the seed and the prompts."""
        a = self.arguments
        arguments = {k: v for k, v in a["arguments"].items() if k != "seed"}
        shared = [self.world, a["kind"], a["method"], a["weights"], a["series"], arguments, a["num_trials"]]
        return json.dumps(shared, sort_keys=True)

    @property
    def made_from(self) -> str:
        """Fingerprints of the models and rewards behind the run; "null" where the folder does not record them.

        Prompts and given answers are not among them: seeds and ranges of prompts have answers of their own.
        """
        found = self.arguments.get("determining")
        return json.dumps(found and {k: v for k, v in found.items() if k not in ("prompts", "answers")}, sort_keys=True)


@dataclass(frozen=True)
class Point:
    """One method at one setting: runs that differ in their seed, or are parts of one evaluation."""

    runs: tuple[RunRecord, ...]
    by_seed: dict[int, pd.DataFrame] = field(repr=False)  # of each seed, one row per prompt
    by_budget: bool = True  # a point whose beta met a KL budget stands in the budget's front, not in its beta's
    in_front_of: str = ""  # the method in whose front it stands, where that is not the one that its runs name

    @property
    def budget(self) -> float | None:
        """The KL budget that the point's beta was found for, in nats."""
        return self.arguments.get("kl_search", {}).get("budget")

    @property
    def arguments(self) -> dict:
        return self.runs[-1].arguments

    @property
    def method(self) -> str:
        return self.in_front_of or self.arguments["method"]

    @property
    def weights(self) -> dict[str, float]:
        return self.arguments["weights"]

    @property
    def kl_added(self) -> float:
        return self.arguments["kl_added"]

    @property
    def key(self) -> tuple[str, ...]:
        """Names the point among others."""
        return self.method, *(str(r.folder) for r in self.runs)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per prompt: the mean over the seeds that answered it."""
        if len(self.by_seed) == 1:
            return next(iter(self.by_seed.values()))
        return pd.concat(self.by_seed.values(), join="inner").groupby(level=0).mean()

    @property
    def tracks_kl(self) -> bool:
        return "log_ratio" in self.table

    @property
    def scores(self) -> list[str]:
        """Columns that are rewards or an independent judge's scores."""
        return [c for c in self.table.columns if c not in MEASURES]

    @property
    def samples(self) -> dict[int, list[dict]]:
        """{prompt: its answers}, unedited, by seed and trial; a `seed` is added to each."""
        found: dict[int, dict] = {}
        for run in self.runs:  # of an answer that two runs have, the later one counts
            for s in run.samples:
                found.setdefault(s["index"], {})[run.seed, s["trial"]] = s | {"seed": run.seed}
        return {index: [answers[k] for k in sorted(answers)] for index, answers in found.items()}

    @property
    def kl(self) -> tuple[float, float]:
        """KL estimate (paper, eq. 6) and its standard error over prompts; an upper bound where kl_added is not 0."""
        if not self.tracks_kl:
            return math.nan, math.nan
        mean, error = mean_and_error(self.table["log_ratio"])
        return mean + self.kl_added, error

    def mean(self, column: str) -> float:
        return float(self.table[column].mean()) if column in self.table else math.nan

    def column(self, name: str, weights: Mapping[str, float], prompts=slice(None)) -> pd.Series:
        """A score of each prompt, or with WEIGHTED the rewards' sum under these weights."""
        table = self.table.loc[prompts]
        return sum(w * table[o] for o, w in weights.items()) if name == WEIGHTED else table[name]

    def over_seeds(self, column: str) -> tuple[list[float], float]:
        """(mean of each seed over the prompts that all seeds have, their standard deviation)."""
        tables = [t for t in self.by_seed.values() if column in t]
        shared = sorted(set.intersection(*(set(t.index) for t in tables)))
        means = [float(t.loc[shared, column].mean()) for t in tables]
        return means, float(np.std(means, ddof=1)) if len(means) > 1 and shared else math.nan

    @property
    def settings(self) -> dict:
        """What tells this point's series from others: everything that determines the result but the weights."""
        arguments, series = self.arguments["arguments"], dict(self.arguments["series"])
        if "num_samples" in series and not self.method.endswith("best_of_n"):
            series["draws"] = series.pop("num_samples")  # of each beam; in the arguments it is candidates per answer
        if self.budget is not None and self.by_budget:  # each point of such a front has a beta of its own
            series = {"kl_budget": self.budget} | {k: v for k, v in series.items() if k != "beta"}
        arguments = {k: v for k, v in arguments.items() if k != "seed"}
        return {**series, **arguments, "num_trials": self.arguments["num_trials"]}


def read_run(folder: Path, arguments: dict) -> RunRecord:
    """A complete run folder.

    Raises:
        DataError: rewards.csv has other prompts than args.yaml says.
    """
    try:
        table = pd.read_csv(folder / REWARDS, index_col="index")
    except (ValueError, KeyError, TypeError, IndexError) as error:  # whatever the parser makes of a damaged file
        raise DataError(f"{folder / REWARDS} is no readable CSV: {' '.join(str(error).split())}") from None
    if list(table.index) != sorted(arguments["indices"]):
        raise DataError(f"{folder / REWARDS} has other prompts than {ARGUMENTS} says; it was changed after the run")
    samples = read_samples(folder)
    means = pd.DataFrame(per_prompt(samples)).set_index("index") if samples else table.iloc[:0]
    if samples and GENERATED not in table:  # written by an earlier version
        table = table.join(means[GENERATED])
        table = table[sorted(table.columns, key=[*means.columns, *table.columns].index)]
    same = list(table.columns) == list(means.columns) and len(table) == len(means)
    same = same and all(d.kind in "fiub" for d in table.dtypes)
    if not same or not np.allclose(table.astype(float), means.astype(float), rtol=1e-9, atol=1e-12, equal_nan=True):
        raise DataError(
            f"{folder / REWARDS} does not hold the means of {SAMPLES}: one of them was changed or is damaged"
        )
    return RunRecord(folder, arguments, samples, table)


def load_points(paths: Sequence[str | Path]) -> tuple[list[Point], list[str]]:
    """The points of the complete runs below these folders, and what was left out and why.

    Raises:
        DataError: a path does not exist, a file is damaged, no run is complete, or two runs that would be compared
            answered different prompts under one index.
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
    runs, left_out = [], []
    for folder in folders:
        arguments = read_arguments(folder)
        if (folder / SUMMARY).is_file():
            runs.append(read_run(folder, arguments))
        else:
            left_out.append(f"{folder}: incomplete; its command goes on with it: {arguments['process']['command']}")
    if not runs:
        raise DataError(f"no complete run in {', '.join(map(str, paths))}" + "".join(f"; {text}" for text in left_out))
    runs.sort(key=lambda r: r.arguments["started"])
    _check_prompts(runs)
    points = []
    for _, group in grouped(runs, lambda r: r.setting):
        newest = group[-1]
        for run in group:
            if run.made_from != newest.made_from:
                left_out.append(f"{run.folder}: its models, rewards or precision are not those of {newest.folder}")
        points.append(_point([r for r in group if r.made_from == newest.made_from], left_out))
    return _with_single_policies(_with_their_fronts(points)), left_out


def _with_single_policies(points: Sequence[Point]) -> list[Point]:
    """Points of single policies as ends of the fronts that are mixed from them; by themselves where there is none."""

    def settings(point: Point) -> str:
        return repr((point.runs[-1].world, sorted(point.settings.items())))

    found, fronts = [], dict(grouped(points, lambda p: (p.method, settings(p))))
    for point in points:
        joined = {}
        if point.method.startswith(SINGLE_POLICY):
            names = [method + point.method.removeprefix(SINGLE_POLICY) for method in MIXED_FROM_SINGLE]
            joined = {name: fronts[name, settings(point)] for name in names if (name, settings(point)) in fronts}
        # A front of an earlier version has ends of its own.
        lacking = [name for name, front in joined.items() if all(p.weights != point.weights for p in front)]
        found += [replace(point, in_front_of=name) for name in lacking] if joined else [point]
    return found


def _with_their_fronts(points: Sequence[Point]) -> list[Point]:
    """Points whose beta met a KL budget, in the front of that beta where other points make one.

    A search may end at a beta that was run by hand, so that one point would be of two fronts: its beta's keeps it.
    """

    def front(point: Point) -> str:
        by_beta = replace(point, by_budget=False)
        return repr((point.runs[-1].world, point.method, sorted(by_beta.settings.items())))

    by_hand = {front(point) for point in points if point.budget is None}
    return [replace(p, by_budget=p.budget is not None and front(p) not in by_hand) for p in points]


def _point(runs: Sequence[RunRecord], left_out: list[str]) -> Point:
    """One point of runs in the order of their start; of a prompt that two of a seed have, the later answers count."""
    by_seed, kept = {}, []
    for seed, group in sorted(grouped(runs, lambda r: r.seed)):
        for n, run in enumerate(group):
            again = set(run.table.index) & {i for later in group[n + 1 :] for i in later.table.index}
            if len(again) == len(run.table):
                left_out.append(f"{run.folder}: the same run was made again later")
            else:
                kept.append(run)
                if again:
                    left_out.append(f"{run.folder}: prompts {spans(again)} were answered again by a later run")
        table = pd.concat([r.table for r in group], join="inner")
        by_seed[seed] = table[~table.index.duplicated(keep="last")].sort_index()
    return Point(tuple(sorted(kept, key=lambda r: r.arguments["started"])), by_seed)


def _check_prompts(runs: Sequence[RunRecord]) -> None:
    """Raise a DataError where one index means two prompts: whatever is compared by prompt would be wrong."""
    for _, group in grouped(runs, lambda r: r.world):
        first: dict[int, tuple[str, Path]] = {}
        for run in group:
            for sample in run.samples:
                text, folder = first.setdefault(sample["index"], (sample["prompt"], run.folder))
                if text != sample["prompt"]:
                    raise DataError(
                        f"{run.folder} and {folder} answered different prompts under index {sample['index']}: the "
                        "prompts were made anew between them; report them apart"
                    )


def spans(indices: Iterable[int]) -> str:
    """Whole numbers as ranges: 0-24, 30."""
    found: list[list[int]] = []
    for i in sorted(indices):
        if found and i == found[-1][1] + 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in found)


def grouped(items, key):
    """(key, its items) in the order of first appearance."""
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


# ------------------------------------------------------------------------------------------------------------- series


def series_names(points: Sequence[Point], *, families: bool = False) -> dict[tuple, str]:
    """{key of a point: name of its series}: the method, its beta or number of samples, and what else tells apart.

    With `families`, points that differ in beta or in the number of samples alone have one name.
    """
    names = {}
    for method, group in grouped(points, lambda p: p.method):
        keys = list(dict.fromkeys(k for p in group for k in p.settings))
        varied = [k for k in keys if len({str(p.settings.get(k)) for p in group}) > 1]
        for p in group:
            n = p.settings.get("num_samples", 1)
            name = f"{method.removesuffix('_best_of_n').removesuffix('best_of_n')}".replace("_", " ").strip()
            if method.endswith("best_of_n"):
                name += (", " if name else "") + f"best of {'N' if families else n}"
            named = [k for k in keys if k != "num_samples" and k in p.settings and (k in varied or k in ALWAYS_NAMED)]
            named = [k for k in named if not (families and k in ALWAYS_NAMED)]
            names[p.key] = ", ".join([name, *(f"{k} {short(p.settings[k])}" for k in named)])
    return names


def short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
