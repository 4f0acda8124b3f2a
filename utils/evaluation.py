"""One evaluation loop for every method: decode, score, pick the best candidate, write rows.

A script says which `Method` a point is (which policy is built, from which checkpoints) and calls `evaluate_method` with
the points of its command line. The rest is the same for all: prompts, run folders, rewards, resume, summaries. What
points share is loaded once. Nothing heavy is imported here at the top, so that a script's `--help` is instant.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from utils.cli import DataError, UsageError, aligned, found, progress, report_dry_run
from utils.judge import distinct_ratio
from utils.kl_budget import Measured, Measurements, Search, search_beta
from utils.places import reference_path, reward_rows, training_command
from utils.runs import (
    Run,
    RunSpec,
    Statistic,
    describe_weights,
    fingerprint,
    format_summary,
    is_complete,
    mean_and_error,
    open_run,
    read_arguments,
    run_parent,
    summarize,
)
from utils.settings import Settings
from utils.sharding import refuse_several, this_process

# (prompts as token ids, keys, on_completion) -> the candidates of each answer; there is one prompt and key per answer,
# and on_completion(number of tokens) is called as completions end.
Generate = Callable[[Sequence[Sequence[int]], Sequence[tuple[int, ...]], Callable[[int], None] | None], list[list[Any]]]
# From prompts and responses to N rewards per name.
Score = Callable[[Sequence[str], Sequence[str]], Mapping[str, np.ndarray]]
T = TypeVar("T")

BATCHES_PER_CHUNK = 4  # rows are written after this many batches' worth of answers


# ------------------------------------------------------------------------------------------------- what is evaluated


class Models:
    """What the points of one command share; each part is loaded when it is first asked for, and once."""

    def __init__(self, settings: Settings):
        self._settings = settings  # of any of the points
        self._loaded: dict[Any, Any] = {}

    def once(self, key, load: Callable[[], T]) -> T:
        """What `load` gives, at the first call with that key; a value model, a table, ..."""
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]

    @cached_property
    def device(self):
        from utils.models import pick_device

        return pick_device(self._settings.device)

    @cached_property
    def _reference(self) -> tuple[Any, Any]:
        from utils.models import load_reference

        return load_reference(self._settings.config, self._settings.spec, self.device)

    @property
    def reference(self):
        return self._reference[0]

    @property
    def tokenizer(self):
        return self._reference[1]

    @property
    def vocab_size(self) -> int:
        from utils.models import vocabulary_size

        return vocabulary_size(self.reference)

    @cached_property
    def score(self) -> Score:
        """Rewards of every objective of the data set."""
        from utils.rewards import RewardSet

        spec = self._settings.spec
        return RewardSet(self._settings.config, spec, spec.objectives, self.device).score

    @cached_property
    def judges(self) -> dict[str, Callable]:
        """Independent judges of the objectives, {judge_<objective>: scorer}, where the workspace has them."""
        from utils.judge import load_judges

        return load_judges(self._settings.config, self._settings.spec.objectives)


@dataclass(frozen=True)
class Method:
    """What differs between evaluation scripts, for one point.

    Attributes:
        name, kind: the run folder's method and its folder of the workspace (mavis_logs, ...).
        build: (settings, models) -> policy, cheap but for what it asks `models` to load once.
        series: settings that the points of one front share, for args.yaml and reports.
        checkpoints: what is loaded beside the reference: {what: (path, the command that makes it)}.
        generator: (settings, policy, eos_token_id) -> Generate; None samples `num_samples` answers a prompt.
        own_model: the policy is no tilted reference, so answers are read once more by the reference for the log-ratio;
            its models are loaded when the point's turn comes.
        num_samples: candidates per answer (best of N).
        shares_candidates: points differ in how candidates are ranked alone, so that each is made once for all points.
        beams_per_candidate: rows that are decoded for each candidate that comes out.
        kl_added: see RunSpec.
        decodes: answers are decoded here, so that the arguments of decoding determine them.
        determining: what else does, see RunSpec.
    """

    name: str
    kind: str
    build: Callable[[Settings, Models], Any]
    series: dict = field(default_factory=dict)
    checkpoints: dict[str, tuple[str, str]] = field(default_factory=dict)
    generator: Callable[[Settings, Any, int], Generate] | None = None
    num_samples: int = 1
    own_model: bool = False
    shares_candidates: bool = False
    beams_per_candidate: float = 1.0
    kl_added: float = 0.0
    decodes: bool = True
    determining: dict = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------- the loop


def sampler(
    policy,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int,
    batch_size: int,
    suppress_first_eos: bool = False,
    reference=None,
) -> Generate:
    """Candidates by sampling: the answer's own key for one sample, the key and the sample's number for more."""
    from utils.decoding import decode

    def generate(prompts, keys, on_completion=None):
        many = [(*key, n) for key in keys for n in range(num_samples)] if num_samples > 1 else list(keys)
        completions = decode(
            policy,
            [prompt for prompt in prompts for _ in range(num_samples)],
            keys=many,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            batch_size=batch_size,
            suppress_first_eos=suppress_first_eos,
            reference=reference,
            on_completion=on_completion,
        )
        return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]

    return generate


class Remembered:
    """A `Generate` that makes each answer's candidates once, by its key: for points that only rank them otherwise."""

    def __init__(self, generate: Generate):
        self._generate = generate
        self._made: dict[tuple[int, ...], tuple[list[Any], float]] = {}

    def __call__(self, prompts, keys, on_completion=None):
        if on_completion is not None:
            for candidate in (c for key in keys if key in self._made for c in self._made[key][0]):
                on_completion(len(candidate.token_ids))
        new = [(prompt, key) for prompt, key in zip(prompts, keys, strict=True) if key not in self._made]
        if new:
            began = time.perf_counter()
            candidates = self._generate([p for p, _ in new], [k for _, k in new], on_completion)
            share = (time.perf_counter() - began) / len(new)
            self._made |= {key: (made, share) for (_, key), made in zip(new, candidates, strict=True)}
        return [self._made[key][0] for key in keys]

    def seconds(self, keys: Sequence[tuple[int, ...]]) -> float:
        """What making these answers' candidates took, when it was done."""
        return sum(self._made[key][1] for key in keys)


def evaluate(
    run: Run,
    prompts: Mapping[int, str],
    tokens: Mapping[int, Sequence[int]],
    *,
    num_trials: int,
    chunk: int = 128,
    num_candidates: int = 1,
    **how: Any,
) -> None:
    """Answer every prompt `num_trials` times and write each answer's row; rows that the run has are left as they are.

    The key of an answer is (seed, prompt index, trial), so methods with one seed share their random numbers, and a
    resumed run gives what an uninterrupted one gives.

    Args:
        run: an open, incomplete run; it is not finished here.
        prompts: {index: the data set's prompt}; tokens: {index: what the reference reads of it}.
        chunk: answers between two writes.
        num_candidates: completions per answer, for the progress bar.
        how: the arguments of `answer_part`.
    """
    done = run.done
    todo = [(i, t) for i in prompts for t in range(num_trials) if (i, t) not in done]
    bar = progress(total=len(todo) * num_candidates, desc="answers", unit="answer")
    for start in range(0, len(todo), chunk):
        run.append(answer_part(todo[start : start + chunk], prompts, tokens, bar=bar, **how))
    bar.close()


def answer_part(
    part: Sequence[tuple[int, int]],
    prompts: Mapping[int, str],
    tokens: Mapping[int, Sequence[int]],
    *,
    generate: Generate,
    to_text: Callable[[Sequence[int]], str],
    score: Score,
    weights: Mapping[str, float],
    seed: int,
    track_kl: bool = True,
    extra: Mapping[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] | None = None,
    work: Mapping[str, float] | None = None,
    bar=None,
) -> list[dict]:
    """Lines of samples.jsonl for answers (prompt index, trial) that are decoded together.

    `seconds` is what their decoding took in the process that did it, an equal share each.

    Args:
        prompts: {index: the data set's prompt}; tokens: {index: what the reference reads of it}.
        generate: candidates of each answer; the best by weighted reward is the answer.
        to_text: token ids to the response's text.
        score: rewards of all objectives.
        weights: what ranks candidates; may be empty where there is one candidate.
        extra: further scorers of (prompts, responses), logged and never used to choose.
        work: what each generated token takes (`_Policy.work`), counted for each answer.
    """

    def tick(tokens: int) -> None:
        if bar is not None:
            bar.update()
            bar.tokens(tokens)

    began = time.perf_counter()
    keys = [(seed, i, t) for i, t in part]
    candidates = generate([tokens[i] for i, _ in part], keys, tick)
    # Decoding alone, shared by the answers that were decoded together.
    seconds = generate.seconds(keys) if hasattr(generate, "seconds") else time.perf_counter() - began
    seconds /= len(part)
    how = {"track_kl": track_kl, "extra": extra or {}, "work": work or {}}
    return pick(part, candidates, prompts, to_text=to_text, score=score, weights=weights, seconds=seconds, **how)


def pick(
    part: Sequence[tuple[int, int]],
    candidates: Sequence[Sequence[Any]],
    prompts: Mapping[int, str],
    *,
    to_text: Callable[[Sequence[int]], str],
    score: Score,
    weights: Mapping[str, float],
    seconds: float,
    track_kl: bool,
    extra: Mapping[str, Callable],
    work: Mapping[str, float],
) -> list[dict]:
    """Lines of samples.jsonl: of the candidates of each (index, trial), the best by weighted reward.

    `seconds` is each answer's; the other arguments are those of `answer_part`.
    """
    from utils.decoding import LOG_RATIO_DECIMALS

    owner = [n for n, group in enumerate(candidates) for _ in group]
    flat = [completion for group in candidates for completion in group]
    texts = [to_text(c.token_ids) if c.text is None else c.text for c in flat]
    asked = [prompts[part[n][0]] for n in owner]
    rewards = {name: np.asarray(values, np.float64) for name, values in score(asked, texts).items()}
    total = sum((w * rewards[name] for name, w in weights.items()), np.zeros(len(flat)))
    best, first = [], 0
    for group in candidates:
        best.append(first + int(total[first : first + len(group)].argmax()))
        first += len(group)
    others = {name: scorer([asked[b] for b in best], [texts[b] for b in best]) for name, scorer in extra.items()}
    rows = []
    for n, ((index, trial), b) in enumerate(zip(part, best, strict=True)):
        answer = flat[b]
        row = {
            "index": index, "trial": trial, "prompt": prompts[index], "response": texts[b],
            "rewards": {name: float(values[b]) for name, values in rewards.items()},
        }  # fmt: skip
        if others:
            row["extra"] = {name: float(values[n]) for name, values in others.items()}
        # Both are nan for a policy that is no tilted reference and was not read once more by the reference.
        if track_kl and not math.isnan(answer.log_ratio):
            row["log_ratio"] = round(float(answer.log_ratio), LOG_RATIO_DECIMALS)
        if not math.isnan(answer.reference_log_prob):
            row["reference_log_prob"] = round(float(answer.reference_log_prob), LOG_RATIO_DECIMALS)
        generated = sum(len(c.token_ids) for c in candidates[n])
        row |= {
            "tokens": len(answer.token_ids),
            "generated_tokens": generated,
            **{what: float(f"{generated * per_token:.6g}") for what, per_token in work.items()},
            "distinct": distinct_ratio(answer.token_ids),
            "finished": bool(answer.finished),
            "num_candidates": len(candidates[n]),
            "seconds": seconds,
        }
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ from the shell


def load_prompts(settings: Settings) -> dict[int, str]:
    """{index: prompt} of the split; a number of prompts that only the configuration names may reach past its end.

    Raises:
        DataError: no such file, or a range that the file does not have.
    """
    from utils.data import prompts_csv, read_prompts

    file = prompts_csv(settings.config, settings.spec, settings.split)
    prompts = read_prompts(file, settings.config)
    start, end = settings.start_index, settings.start_index + settings.num_prompts
    if start >= len(prompts) or (settings.num_prompts_given and end > len(prompts)):
        raise DataError(
            f"{file} has {len(prompts)} prompts (index 0 to {len(prompts) - 1}); --start_index {start} with "
            f"{settings.num_prompts} prompts asks for index {start} to {end - 1}"
        )
    return dict(enumerate(prompts[start:end], start=start))


def run_spec(settings: Settings, method: Method, prompts: Mapping[int, str]) -> RunSpec:
    """The run's identity and arguments: everything that determines its result."""
    config, spec = settings.config, settings.spec
    value_base = [config.value_model.num_layers]
    if config.value_model.path != config.base_model.path:
        value_base.append(fingerprint(config.locate(config.value_model.path)))
    rewards = {}
    for name in spec.objectives:
        o = config.objective(name)
        source = o.function or fingerprint(config.locate(o.path))
        rewards[name] = [o.kind, source, o.label, o.sign, o.text, o.max_length]
    arguments = {
        "data_split": settings.split,
        "seed": settings.seed,
        "topk": settings.top_k,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "num_samples": method.num_samples,
        "track_KL": settings.track_kl,
        **({"suppress_first_eos": True} if settings.suppress_first_eos else {}),  # off: as before there was a switch
    }
    if not method.decodes:
        arguments = {name: arguments[name] for name in ("data_split", "seed", "temperature", "track_KL")}
    return RunSpec(
        kind=method.kind,
        dataset=spec.name,
        method=method.name,
        objectives=tuple(settings.weights) or spec.objectives,
        weights=settings.weights,
        series=method.series,
        indices=tuple(prompts),
        num_trials=settings.num_trials,
        arguments=arguments,
        setting={
            "config": str(config.path),
            "workspace": str(config.workspace),
            "device": settings.device,
            "batch_size": settings.batch_size,
            "wandb": settings.wandb,
            "checkpoints": {what: str(path) for what, (path, _) in checkpoints(settings, method).items()},
        },
        determining={
            "prompts": hashlib.sha256("\0".join(prompts.values()).encode()).hexdigest(),
            "checkpoints": {what: fingerprint(path) for what, (path, _) in checkpoints(settings, method).items()},
            "value_model": value_base,
            "shown": [spec.prompt_format, spec.reference_template],
            "dtype": [config.cpu_dtype, config.gpu_dtype],
            "rewards": rewards,
            **method.determining,
        },
        configuration=config.as_dict(),
        kl_added=method.kl_added,
    )


def checkpoints(settings: Settings, method: Method) -> dict[str, tuple[str, str]]:
    """{what: (path, the command that makes it)} of everything that decodes."""
    return {"reference": reference_path(settings.config, settings.spec)} | method.checkpoints


def check_checkpoints(settings: Settings, method: Method) -> None:
    """Look for everything that a command of the project makes before a run folder is made.

    Raises:
        DataError: which is missing, where it was looked for, and the command that makes it.
    """
    config = settings.config
    for what, (path, made_by) in method.checkpoints.items():
        if not Path(path).exists():
            raise DataError(f"{what}: nothing at {path}; make it with: {made_by}")
    needed = {f"reference of {settings.spec.name}": reference_path(config, settings.spec)}
    for spec in map(config.objective, settings.spec.objectives):
        if spec.kind != "callable":
            needed[f"reward model of {spec.name}"] = (config.locate(spec.path), training_command(config, spec))
    for what, (path, made_by) in needed.items():  # what no command makes may be on the Hub
        if made_by and not Path(path).exists():
            raise DataError(f"{what}: nothing at {config.default_path(path)}; make it with: {made_by}")


def dry_run(points: Sequence[Settings], methods: Sequence[Method]) -> None:
    """Print what the runs would load, and from where."""
    from utils.data import prompts_csv

    config, spec, split = points[0].config, points[0].spec, points[0].split
    file = prompts_csv(config, spec, split)
    rows = [("prompts", str(file), found(str(file), f"python dataset_preprocess.py {spec.name} --split {split}"))]
    for settings, method in zip(points, methods, strict=True):
        loaded = checkpoints(settings, method).items()
        rows += [(what, str(path), found(str(path), by)) for what, (path, by) in loaded]
    rows = list(dict.fromkeys(rows)) + reward_rows(config, spec.objectives)
    rows.append(("run folder", f"{config.workspace / methods[0].kind / spec.name}", "made by this run"))
    report_dry_run(rows)


@dataclass(frozen=True)
class Loaded:
    """What answers and scores prompts at one point, on its device."""

    encode: Callable[[Mapping[int, str]], dict[int, list[int]]]
    generate: Generate
    to_text: Callable[[Sequence[int]], str]
    score: Score
    work: dict[str, float]  # of a token that comes out, see `_Policy.work`


def load(settings: Settings, method: Method, models: Models) -> Loaded:
    """A point's policy on the shared models, and the rewards of every objective of the data set.

    Raises:
        DataError: something is missing, damaged or does not fit.
        UsageError: more candidates than there are tokens to choose from.
    """
    from utils.data import encode_prompts

    policy, tokenizer = method.build(settings, models), models.tokenizer
    room = (policy.context or 1 << 30) - settings.max_new_tokens
    if room < 1:
        raise DataError(
            f"--max_new_tokens {settings.max_new_tokens} leaves no room for a prompt: the models attend to "
            f"{policy.context} tokens"
        )
    if settings.suppress_first_eos and settings.top_k >= models.vocab_size:
        raise UsageError(
            f"--suppress_first_eos leaves fewer than --topk {settings.top_k} of the {models.vocab_size} tokens"
        )

    def encode(prompts: Mapping[int, str]) -> dict[int, list[int]]:
        return dict(zip(prompts, encode_prompts(settings.spec, tokenizer, list(prompts.values()), room), strict=True))

    if method.generator is not None:
        generate = method.generator(settings, policy, tokenizer.eos_token_id)
    else:
        generate = sampler(
            policy,
            num_samples=method.num_samples,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            batch_size=settings.batch_size,
            suppress_first_eos=settings.suppress_first_eos,
            reference=models.reference if method.own_model and settings.track_kl else None,
        )
    if method.shares_candidates:
        generate = models.once("candidates", lambda own=generate: Remembered(own))
    work = {what: method.beams_per_candidate * each for what, each in policy.work().items()}

    def to_text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    return Loaded(encode, generate, to_text, models.score, work)


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
            if waits and not method.own_model:
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


def chunk_size(settings: Settings, method: Method) -> int:
    """Answers that are decoded and written together, and that one of several processes takes at a time."""
    return max(1, BATCHES_PER_CHUNK * settings.batch_size // method.num_samples)


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
    candidates = loaded.generate([encoded[i] for i in prompts], keys, lambda tokens: bar.update())
    bar.close()
    return Measured(settings.beta, *mean_and_error([answer.log_ratio for [answer] in candidates]))


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
    from utils.runs import per_prompt
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
        rows.append(pick(part, candidates, prompts, to_text=loaded.to_text, score=loaded.score, **how))
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
