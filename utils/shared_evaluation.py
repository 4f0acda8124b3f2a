"""An evaluation that several processes share: parts of the answers of all points, taken as they come.

The first process opens the run folders, takes parts like the others and, when all parts of a point are there, writes
its samples.jsonl, rewards.csv and summary. The others only add files to the folders' `parts/`, and leave when nothing
is left to take. A part is what one process alone would decode together, so the rows are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.answers import answer_part
from utils.cli import progress
from utils.errors import DataError, UsageError
from utils.evaluation import describe, log_to_wandb, points_table, report_point
from utils.files import write_atomically
from utils.methods import Method, Models, chunk_size, load, run_spec
from utils.runs import CLAIMS, SUMMARY, Run, as_lines, join_run, open_run, part_path, rows_done
from utils.settings import Settings
from utils.sharding import Process, chunks, claims_of, share

Unit = tuple[str, list[tuple[int, int]]]  # a part's name and its answers: (prompt index, trial)


@dataclass(frozen=True)
class Place:
    """A point with its run folder and the answers that were there when this process began."""

    number: int
    settings: Settings
    method: Method
    folder: Path
    known: frozenset[tuple[int, int]]

    def has(self, unit: Unit) -> bool:
        """Whether the rows of a part are on disk: a file there is whole, whoever wrote it, and goes when the run is
        complete."""
        name, answers = unit
        if self.known.issuperset(answers) or part_path(self.folder, name).exists():
            return True
        return (self.folder / SUMMARY).exists()


def evaluate_together(
    points: Sequence[Settings],
    methods: Sequence[Method],
    prompts: Mapping[int, str],
    models: Callable[[], Models],
    process: Process,
) -> int:
    """This process's part of the runs of all points; the first process also finishes and reports them.

    Raises:
        DataError, UsageError: as in an evaluation by one process; the first one leaves no empty run folder.
    """
    workspace = points[0].config.workspace
    specs = [run_spec(settings, method, prompts) for settings, method in zip(points, methods, strict=True)]
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(open_run(workspace, s, shared=True)) for s in specs] if process.first else []
        for run in runs:
            print(f"run folder: {run.folder}", flush=True)
        folders = [run.folder for run in runs] or [join_run(workspace, spec) for spec in specs]
        places = [
            Place(n, settings, method, folder, frozenset(rows_done(folder)))
            for n, (settings, method, folder) in enumerate(zip(points, methods, folders, strict=True))
        ]
        bar = stack.enter_context(contextlib.closing(progress(desc="answers", unit="answer")))
        groups, cells = groups_of(places), {}

        def finish(group: Sequence[Place]) -> None:
            for place in group:
                if len(places) > 1:
                    print(f"point {place.number + 1} of {len(places)}: {describe(place.settings)}")
                finish_run(runs[place.number], place)
                cells[place.number] = report_point(runs[place.number], alone=len(places) == 1)

        try:
            for n, group in enumerate(groups):
                take_parts(group, prompts, models, process, bar)
                for begun in groups[: n + 1] if process.first else ():
                    if begun[0].number not in cells and are_whole(begun, prompts):
                        finish(begun)
            for group in groups if process.first else ():
                if group[0].number not in cells:
                    take_parts(group, prompts, models, process, bar, wait=True)
                    finish(group)
        except (DataError, UsageError):
            for run in runs:
                run.discard_if_empty()
            raise
    if process.first and len(places) > 1:
        print(points_table([cells[n] for n in range(len(places))]), end="")
    return 0


def groups_of(places: Sequence[Place]) -> list[list[Place]]:
    """Points whose parts one process takes together, since it makes their candidates once; else each point alone."""
    if places[0].method.shares_candidates:
        return [list(places)]
    return [[place] for place in places]


def units_of(group: Sequence[Place], prompts: Mapping[int, str]) -> dict[str, Unit]:
    """The parts of a group's answers, in their order."""
    settings, method = group[0].settings, group[0].method
    answers = [(i, t) for i in prompts for t in range(settings.num_trials)]
    return {name: (name, part) for name, part in chunks(answers, chunk_size(settings, method)).items()}


def are_whole(group: Sequence[Place], prompts: Mapping[int, str]) -> bool:
    return all(place.has(unit) for unit in units_of(group, prompts).values() for place in group)


def take_parts(
    group: Sequence[Place],
    prompts: Mapping[int, str],
    models: Callable[[], Models],
    process: Process,
    bar,
    *,
    wait: bool = False,
) -> None:
    """Answer and write the parts of a group's points that no other process has; with `wait` until all are there."""

    def done(unit: Unit) -> bool:
        return all(place.has(unit) for place in group)

    @functools.cache
    def loaded(number: int):
        """A point's policy and what it reads of the prompts; gone with this group."""
        place = group[number]
        policy = load(place.settings, place.method, models())
        return policy, policy.encode(prompts)

    if are_whole(group, prompts):
        return
    with claims_of(process, group[0].folder / CLAIMS) as claims:
        for name, part in share(units_of(group, prompts), done=done, claims=claims, wait=wait):
            for number, place in enumerate(group):
                if place.has((name, part)):
                    continue
                policy, tokens = loaded(number)
                rows = answer_part(
                    [answer for answer in part if answer not in place.known],
                    prompts,
                    tokens,
                    generate=policy.generate,
                    to_text=policy.to_text,
                    score=policy.score,
                    read=policy.read,
                    weights=place.settings.weights,
                    seed=place.settings.seed,
                    track_kl=place.settings.track_kl,
                    extra=models().judges,
                    work=policy.work,
                    bar=bar,
                )
                write_atomically(part_path(place.folder, name), as_lines(rows))


def finish_run(run: Run, place: Place) -> None:
    """Write a point's run, whose parts are all there."""
    if run.complete:
        print("this run is complete and is not repeated (--rerun does)")
        return
    run.gather()
    figures = run.finish()
    if place.settings.wandb:
        log_to_wandb(run, figures)
