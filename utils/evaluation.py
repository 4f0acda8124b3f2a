"""What every evaluation script does once it knows its points and their methods.

A dry run, answers to the user's own texts, or the points' run folders: each is made, completed or found complete, and
reported. Several processes share them in `shared_evaluation`.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from utils.answers import evaluate, pick
from utils.cli import aligned, progress
from utils.errors import DataError, UsageError
from utils.kl_budget import Measured, Measurements, Search, search_beta
from utils.methods import Method, Models, check_checkpoints, chunk_size, dry_run, load, load_prompts, run_spec
from utils.runs import Run, is_complete, open_run, read_arguments, run_parent
from utils.settings import Settings
from utils.sharding import refuse_several, this_process
from utils.summaries import Statistic, describe_weights, format_summary, mean_and_error, summarize


def evaluate_method(points: Sequence[Settings], method_of: Callable[[Settings], Method]) -> int:
    """What an evaluation script does once it knows its points: a dry run, answers to the user's texts, or their runs.

    Args:
        points: of one command line (see `settings.resolve`).
        method_of: a point's method.
    """
    methods, process = [method_of(settings) for settings in points], this_process()
    if points[0].dry_run:
        dry_run(points, methods)
        return 0
    for flag, given, why in (
        ("--prompt", points[0].texts, "its answers are printed"),
        ("--kl_budget", points[0].kl_budget is not None, "each beta that is tried depends on the one before"),
        ("--rerun", points[0].rerun, "one that starts late could not tell the old run from the new one"),
    ):
        if given:
            refuse_several(flag, why)
    for settings, method in zip(points, methods, strict=True):
        check_checkpoints(settings, method)
    if points[0].texts:
        answer_texts(points, methods)
        return 0
    prompts = load_prompts(points[0])
    workspace = points[0].config.workspace

    @functools.cache
    def models() -> Models:
        """Loaded at the first point that is not complete, with all that the others need: better now than in hours."""
        shared = Models(points[0])
        for settings, method in zip(points, methods, strict=True):
            waits = settings.rerun or not is_complete(workspace, run_spec(settings, method, prompts))
            if waits and not method.loads_late:
                load(replace(settings, beta=0.0) if settings.beta is None else settings, method, shared)
        return shared

    if process.several:
        from utils.shared_evaluation import evaluate_together

        return evaluate_together(points, methods, prompts, models, process)
    ended = []
    for place, settings in enumerate(points, start=1):
        if len(points) > 1:
            print(f"point {place} of {len(points)}: {describe(settings)}")
        search = None
        if settings.kl_budget is not None:
            search = meet_budget(settings, method_of, prompts, models)
            settings = replace(settings, beta=search.found.beta)
        run = evaluate_point(settings, method_of(settings), prompts, models, search)
        ended.append(report_point(run, alone=len(points) == 1))
    if len(points) > 1:
        print(points_table(ended), end="")
    return 0


def report_point(run: Run, *, alone: bool) -> dict[str, str]:
    """Print what a complete run came to, at length where it is the only one; returns its `point_cells`."""
    arguments, figures = read_arguments(run.folder), summarize(run.samples)
    cells = point_cells(arguments, figures)
    if alone:
        print(format_summary(arguments, figures), end="")
    else:
        print(", ".join(f"{k} {v}" for k, v in cells.items() if k not in ("weights", "beta")) + "\n", flush=True)
    return cells


def evaluate_point(
    settings: Settings,
    method: Method,
    prompts: Mapping[int, str],
    models: Callable[[], Models],
    search: Search | None = None,
) -> Run:
    """A point's run: made, completed or found complete. `models` loads, and is called where something is left to do."""
    with open_run(settings.config.workspace, run_spec(settings, method, prompts), rerun=settings.rerun) as run:
        print(f"run folder: {run.folder}")
        if search is not None:
            run.note_kl_search(search.record(), search.table())
        if run.complete:
            print("this run is complete and is not repeated (--rerun does)\n")
            return run
        if run.samples:
            print(f"going on after {len(run.samples)} of {len(prompts) * settings.num_trials} answers")
        try:
            evaluate_run(run, settings, method, prompts, models())
        except (DataError, UsageError):
            run.discard_if_empty()
            raise
    return run


def evaluate_run(run: Run, settings: Settings, method: Method, prompts: Mapping[int, str], models: Models) -> None:
    """Load what is not loaded, evaluate, finish."""
    loaded = load(settings, method, models)
    evaluate(
        run,
        prompts,
        loaded.encode(prompts),
        generate=loaded.generate,
        to_text=loaded.to_text,
        score=loaded.score,
        read=loaded.read,
        weights=settings.weights,
        num_trials=settings.num_trials,
        seed=settings.seed,
        track_kl=settings.track_kl,
        chunk=chunk_size(settings, method),
        num_candidates=method.num_samples,
        extra=models.judges,
        work=loaded.work,
    )
    figures = run.finish()
    if settings.wandb:
        log_to_wandb(run, figures)


def meet_budget(
    settings: Settings,
    method_of: Callable[[Settings], Method],
    prompts: Mapping[int, str],
    models: Callable[[], Models],
) -> Search:
    """Find the beta of a point whose KL meets its budget, on one answer per prompt.

    The measurements are kept beside the run folders, in kl_<method>_<weights>-<identity>.csv, whatever the budget.

    Raises:
        DataError: no beta meets it, or another process is measuring.
    """
    unknown = replace(settings, beta=None, num_trials=1)
    spec = run_spec(unknown, method_of(unknown), prompts)
    weights = "-".join(f"{w:g}" for w in settings.weights.values())
    name = "_".join(part for part in ("kl", spec.method, weights) if part)
    with Measurements(run_parent(settings.config.workspace, spec) / f"{name}-{spec.identity}.csv") as kept:
        print(f"the beta of {settings.kl_budget:g} nats is looked for; what is measured: {kept.file}")

        def measure(beta: float) -> Measured:
            if beta not in kept.known:
                point = replace(settings, beta=beta)
                kept.add(measure_kl(point, method_of(point), prompts, models()))
            measured = kept.known[beta]
            print(f"beta {beta:g}: KL {measured.kl:.4f} nats, s.e. {measured.error:.4f}", flush=True)
            return measured

        search = search_beta(measure, settings.kl_budget)
    how = "within its standard error of" if search.met else "the nearest to"
    print(f"beta {search.found.beta:g} has a KL {how} {settings.kl_budget:g} nats")
    return search


def measure_kl(settings: Settings, method: Method, prompts: Mapping[int, str], models: Models) -> Measured:
    """The KL of a point's beta: the mean log-ratio (paper, eq. 6) of its run's first answer to each prompt."""
    loaded = load(settings, method, models)
    encoded, bar = loaded.encode(prompts), progress(total=len(prompts), desc=f"beta {settings.beta:g}", unit="answer")
    keys = [(settings.seed, i, 0) for i in prompts]
    answers = [only for [only] in loaded.generate([encoded[i] for i in prompts], keys, lambda tokens: bar.update())]
    bar.close()
    if loaded.read is not None:  # as in the run
        loaded.read([encoded[i] for i in prompts], answers)
    return Measured(settings.beta, *mean_and_error([answer.log_ratio for answer in answers]))


def describe(settings: Settings) -> str:
    """A point, for the reader."""
    strength = [] if settings.beta is None else [f"beta {settings.beta:g}"]
    return ", ".join([describe_weights(settings.weights) or "no weights", *strength])


def point_cells(arguments: Mapping, figures: Mapping[str, Statistic]) -> dict[str, str]:
    """A run's weights and beta, its mean rewards and its KL with their standard errors over prompts; "-" for none."""

    def cell(figure: Statistic | None, added: float = 0.0) -> str:
        if figure is None or math.isnan(figure.mean):
            return "-"
        error = "" if math.isnan(figure.error) else f" ({figure.error:.4f})"
        return f"{'<= ' if added else ''}{figure.mean + added:.4f}{error}"

    beta = arguments["series"].get("beta")
    rewards = arguments["configuration"]["datasets"][arguments["dataset"]]["objectives"]
    return {
        "weights": describe_weights(arguments["weights"]) or "none",
        "beta": "-" if beta is None else f"{beta:g}",
        **{name: cell(figures[name]) for name in rewards},
        "KL": cell(figures.get("log_ratio"), arguments["kl_added"]),
    }


def points_table(points: Sequence[Mapping[str, str]]) -> str:
    """One line per point, from its `point_cells`; a column that nothing fills is left out."""
    columns = [name for name in points[0] if any(point[name] != "-" for point in points)]
    lines = aligned([columns, *([point[name] for name in columns] for point in points)])
    return "\n".join(["means (and their standard errors over prompts)", *lines]) + "\n"


def log_to_wandb(run: Run, figures) -> None:
    """The rewards table and the summary, under the run folder's name."""
    from utils.summaries import per_prompt
    from utils.tracking import Tracker

    arguments, rows = read_arguments(run.folder), per_prompt(run.samples)
    with Tracker(True, arguments["method"], run.folder.name, arguments) as tracker:
        tracker.table("rewards", list(rows[0]), [list(row.values()) for row in rows])
        tracker.summary({name: figure.mean for name, figure in figures.items()})


def answer_texts(points: Sequence[Settings], methods: Sequence[Method]) -> None:
    """Answer the user's own texts at each point on standard output, each answer with its rewards and log-ratio."""
    from utils.text_formats import format_of

    first = points[0]
    texts = [sys.stdin.read() if text == "-" else text for text in first.texts]
    try:
        prompts = dict(enumerate(format_of(first.spec).wrap_user(text) for text in texts))
    except ValueError as error:
        raise UsageError(f"--prompt: {error}") from None
    models = Models(first)
    part = [(i, t) for i in prompts for t in range(first.num_trials)]
    keys = [(first.seed, i, t) for i, t in part]
    rows = []  # of each point, in the order of `part`
    for settings, method in zip(points, methods, strict=True):
        loaded = load(settings, method, models)
        encoded = loaded.encode(prompts)
        candidates = loaded.generate([encoded[i] for i, _ in part], keys, None)
        how = {"weights": settings.weights, "track_kl": settings.track_kl, "seconds": 0.0, "extra": {}, "work": {}}
        how |= {"to_text": loaded.to_text, "score": loaded.score, "read": loaded.read}
        rows.append(pick(part, candidates, prompts, encoded, **how))
    several = len(points) > 1  # then what they share comes first, and each answer says its point
    shared = [f"{k} {v}" for k, v in methods[0].series.items() if not several or k != "beta"]
    own = [] if several else [describe_weights(first.weights) or "no weights"]
    print(f"{methods[0].name}: " + ", ".join(own + shared))
    for n, (i, _) in enumerate(part):
        print(f"\n> {texts[i].strip()}")
        for settings, of_point in zip(points, rows, strict=True):
            row = of_point[n]
            print(f"\n{describe(settings)}:\n{row['response']}" if several else row["response"])
            figures = [f"{name} {value:.3f}" for name, value in row["rewards"].items()]
            if "log_ratio" in row:
                figures.append(f"log-ratio {row['log_ratio']:.2f}")
            end = "ended by itself" if row["finished"] else "cut off"
            print(f"[{', '.join(figures)}; {row['tokens']} tokens, {end}]")
