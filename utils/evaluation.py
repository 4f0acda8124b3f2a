"""One evaluation loop for every method: decode, score, pick the best candidate, write rows.

A script says which `Method` it is (which policy is built, from which checkpoints) and calls `evaluate_method`. The
rest is the same for all: arguments, prompts, run folder, rewards, resume, summary. Nothing heavy is imported here at
the top, so that a script's `--help` is instant.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import DataError, UsageError, add_common, config_from, found, parse_weights, progress, report_dry_run
from utils.config import Config, DatasetSpec, nearest
from utils.judge import distinct_ratio
from utils.places import reference_path, reward_rows, training_command
from utils.runs import Run, RunSpec, describe_weights, fingerprint, format_summary, open_run, read_arguments, summarize

# (prompts as token ids, keys, on_completion) -> the candidates of each answer; there is one prompt and key per answer,
# and on_completion(number of tokens) is called as completions end.
Generate = Callable[[Sequence[Sequence[int]], Sequence[tuple[int, ...]], Callable[[int], None] | None], list[list[Any]]]
# From prompts and responses to N rewards per name.
Score = Callable[[Sequence[str], Sequence[str]], Mapping[str, np.ndarray]]

BATCHES_PER_CHUNK = 4  # rows are written after this many batches' worth of answers


# --------------------------------------------------------------------------------------------------------- arguments


def add_evaluation_arguments(parser: ArgumentParser, *, track_kl: bool = True) -> None:
    """The arguments that all evaluation scripts share; `track_kl` says whether --track_KL is one."""
    task = parser.add_argument_group("what is evaluated")
    task.add_argument("--dataset", required=True, help="data set of the configuration, e.g. anthropic")
    task.add_argument(
        "--obj_weights", help="weights in the data set's order of objectives, e.g. 0.2,,0.8 (they sum to 1)"
    )
    task.add_argument("--data_split", default="test", help="split whose prompts are answered (default: test)")
    task.add_argument("--num_prompts", type=int, help="number of prompts (default: the configuration's)")
    task.add_argument("--start_index", type=int, default=0, help="index of the first prompt (default: 0)")
    task.add_argument("--num_trials", type=int, help="answers per prompt (default: the configuration's)")
    task.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="answer this text of yours (- reads it from standard input) and write no run folder; may be repeated",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--topk", type=int, help="candidates kept per step (default: the configuration's)")
    decoding.add_argument(
        "--temperature", type=float, help="divides the reference's logits (default: the configuration's)"
    )
    decoding.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default: the data set's)")
    decoding.add_argument("--seed", type=int, help="seed of the sampling (default: the configuration's)")
    decoding.add_argument("--batch_size", type=int, help="sequences decoded together (default: the configuration's)")
    record = parser.add_argument_group("record")
    if track_kl:
        record.add_argument(
            "--track_KL",
            action=BooleanOptionalAction,
            default=True,
            help="write each answer's log-ratio to the reference, whose mean estimates the KL (default: on)",
        )
    else:
        parser.set_defaults(track_KL=False)
    record.add_argument("--rerun", action="store_true", help="start anew where the same run is already complete")
    add_common(parser)


@dataclass(frozen=True)
class Settings:
    """A command line's evaluation arguments, resolved against the configuration."""

    config: Config
    spec: DatasetSpec
    weights: dict[str, float]
    split: str
    num_prompts: int
    num_prompts_given: bool
    start_index: int
    num_trials: int
    top_k: int
    temperature: float
    max_new_tokens: int
    seed: int
    batch_size: int
    track_kl: bool
    rerun: bool
    device: str | None
    wandb: bool
    dry_run: bool
    texts: tuple[str, ...] = ()


def resolve(args: Namespace) -> Settings:
    """Settings from the command line, defaults from the configuration.

    Raises:
        UsageError: a value that cannot be meant, before any folder or model is touched.
    """
    config = config_from(args)
    spec = config.dataset(args.dataset)

    def given(value, default):
        return default if value is None else value

    settings = Settings(
        config=config,
        spec=spec,
        weights={} if args.obj_weights is None else parse_weights(args.obj_weights, spec.objectives),
        split=args.data_split,
        num_prompts=given(args.num_prompts, config.evaluation.num_prompts),
        num_prompts_given=args.num_prompts is not None,
        start_index=args.start_index,
        num_trials=given(args.num_trials, 1 if args.prompt else config.evaluation.num_trials),
        top_k=given(args.topk, config.decoding.top_k),
        temperature=given(args.temperature, config.decoding.temperature),
        max_new_tokens=given(args.max_new_tokens, spec.max_new_tokens),
        seed=given(args.seed, config.evaluation.seed),
        batch_size=given(args.batch_size, config.decoding.batch_size),
        track_kl=args.track_KL,
        rerun=args.rerun,
        device=args.device,
        wandb=args.wandb,
        dry_run=args.dry_run,
        texts=tuple(args.prompt or ()),
    )
    if settings.split not in spec.splits:
        raise UsageError(f"--data_split {settings.split!r} of {spec.name}; {nearest(settings.split, spec.splits)}")
    for flag, value, least in (
        ("num_prompts", settings.num_prompts, 1),
        ("start_index", settings.start_index, 0),
        ("num_trials", settings.num_trials, 1),
        ("topk", settings.top_k, 1),
        ("max_new_tokens", settings.max_new_tokens, 1),
        ("batch_size", settings.batch_size, 1),
    ):
        if value < least:
            raise UsageError(f"--{flag} must be at least {least}, got {value}")
    if not (math.isfinite(settings.temperature) and settings.temperature > 0):
        raise UsageError(f"--temperature must be a finite number above 0, got {settings.temperature}")
    return settings


@dataclass(frozen=True)
class Method:
    """What differs between evaluation scripts.

    Attributes:
        name, kind: the run folder's method and its folder of the workspace (mavis_logs, ...).
        build: (settings, reference model, tokenizer, device) -> policy.
        series: settings that the points of one front share, for args.yaml and reports.
        checkpoints: what is loaded beside the reference: {what: (path, the command that makes it)}.
        generator: (settings, policy, eos_token_id) -> Generate; None samples `num_samples` answers a prompt.
        own_model: the policy is no tilted reference, so answers are read once more by the reference for the log-ratio.
        num_samples: candidates per answer (best of N).
        kl_added: see RunSpec.
    """

    name: str
    kind: str
    build: Callable[[Settings, Any, Any, Any], Any]
    series: dict = field(default_factory=dict)
    checkpoints: dict[str, tuple[str, str]] = field(default_factory=dict)
    generator: Callable[[Settings, Any, int], Generate] | None = None
    num_samples: int = 1
    own_model: bool = False
    kl_added: float = 0.0


# ---------------------------------------------------------------------------------------------------------- the loop


def sampler(
    policy, *, num_samples: int, max_new_tokens: int, eos_token_id: int, batch_size: int, reference=None
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
            reference=reference,
            on_completion=on_completion,
        )
        return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]

    return generate


def evaluate(
    run: Run,
    prompts: Mapping[int, str],
    tokens: Mapping[int, Sequence[int]],
    *,
    generate: Generate,
    to_text: Callable[[Sequence[int]], str],
    score: Score,
    weights: Mapping[str, float],
    num_trials: int,
    seed: int,
    track_kl: bool = True,
    chunk: int = 128,
    num_candidates: int = 1,
    extra: Mapping[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] | None = None,
) -> None:
    """Answer every prompt `num_trials` times and write each answer's row; rows that the run has are left as they are.

    The key of an answer is (seed, prompt index, trial), so methods with one seed share their random numbers, and a
    resumed run gives what an uninterrupted one gives.

    Args:
        run: an open, incomplete run; it is not finished here.
        prompts: {index: the data set's prompt}; tokens: {index: what the reference reads of it}.
        generate: candidates of each answer; the best by weighted reward is the answer.
        to_text: token ids to the response's text.
        score: rewards of all objectives.
        weights: what ranks candidates; may be empty where there is one candidate.
        chunk: answers between two writes.
        num_candidates: completions per answer, for the progress bar.
        extra: further scorers of (prompts, responses), logged and never used to choose.
    """
    done = run.done
    todo = [(i, t) for i in prompts for t in range(num_trials) if (i, t) not in done]
    bar = progress(total=len(todo) * num_candidates, desc="answers", unit="answer")

    def tick(tokens: int) -> None:
        bar.update()
        bar.tokens(tokens)

    for start in range(0, len(todo), chunk):
        part = todo[start : start + chunk]
        began = time.perf_counter()
        candidates = generate([tokens[i] for i, _ in part], [(seed, i, t) for i, t in part], tick)
        seconds = time.perf_counter() - began  # decoding alone, shared by the answers that were decoded together
        share = seconds / len(part)
        run.append(pick(part, candidates, prompts, to_text, score, weights, share, track_kl, extra or {}))
    bar.close()


def pick(part, candidates, prompts, to_text, score, weights, seconds, track_kl, extra) -> list[dict]:
    """Lines of samples.jsonl: the best candidate of each (index, trial), by weighted reward."""
    owner = [n for n, group in enumerate(candidates) for _ in group]
    flat = [completion for group in candidates for completion in group]
    texts = [to_text(completion.token_ids) for completion in flat]
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
            row["log_ratio"] = float(answer.log_ratio)
        if not math.isnan(answer.reference_log_prob):
            row["reference_log_prob"] = float(answer.reference_log_prob)
        row |= {
            "tokens": len(answer.token_ids),
            "generated_tokens": sum(len(c.token_ids) for c in candidates[n]),
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
    return RunSpec(
        kind=method.kind,
        dataset=spec.name,
        method=method.name,
        objectives=tuple(settings.weights) or spec.objectives,
        weights=settings.weights,
        series=method.series,
        indices=tuple(prompts),
        num_trials=settings.num_trials,
        arguments={
            "data_split": settings.split,
            "seed": settings.seed,
            "topk": settings.top_k,
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_new_tokens,
            "num_samples": method.num_samples,
            "track_KL": settings.track_kl,
        },
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


def dry_run(settings: Settings, method: Method) -> None:
    """Print what the run would load, and from where."""
    from utils.data import prompts_csv

    config, spec = settings.config, settings.spec
    file = prompts_csv(config, spec, settings.split)
    rows = [
        ("prompts", str(file), found(str(file), f"python dataset_preprocess.py {spec.name} --split {settings.split}"))
    ]
    rows += [(what, str(path), found(str(path), by)) for what, (path, by) in checkpoints(settings, method).items()]
    rows += reward_rows(config, spec.objectives)
    rows.append(("run folder", f"{config.workspace / method.kind / spec.name}", "made by this run"))
    report_dry_run(rows)


@dataclass(frozen=True)
class Loaded:
    """What answers and scores prompts, on its device."""

    encode: Callable[[Mapping[int, str]], dict[int, list[int]]]
    generate: Generate
    to_text: Callable[[Sequence[int]], str]
    score: Score


def load(settings: Settings, method: Method) -> Loaded:
    """Load a method's models, and the rewards of every objective of the data set."""
    from utils.data import encode_prompts
    from utils.models import load_reference, pick_device
    from utils.rewards import RewardSet

    device = pick_device(settings.device)
    reference, tokenizer = load_reference(settings.config, settings.spec, device)
    policy = method.build(settings, reference, tokenizer, device)
    room = (policy.context or 1 << 30) - settings.max_new_tokens
    if room < 1:
        raise DataError(
            f"--max_new_tokens {settings.max_new_tokens} leaves no room for a prompt: the models attend to "
            f"{policy.context} tokens"
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
            reference=reference if method.own_model and settings.track_kl else None,
        )
    return Loaded(
        encode,
        generate,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip(),
        RewardSet(settings.config, settings.spec, settings.spec.objectives, device).score,
    )


def evaluate_method(settings: Settings, method: Method) -> int:
    """What an evaluation script does once it knows its method: a dry run, answers to the user's texts, or a run."""
    if settings.dry_run:
        dry_run(settings, method)
        return 0
    check_checkpoints(settings, method)
    if settings.texts:
        answer_texts(settings, method)
        return 0
    prompts = load_prompts(settings)
    with open_run(settings.config.workspace, run_spec(settings, method, prompts), rerun=settings.rerun) as run:
        print(f"run folder: {run.folder}")
        if run.complete:
            print("this run is complete and is not repeated (--rerun does)\n")
        else:
            if run.samples:
                print(f"going on after {len(run.samples)} of {len(prompts) * settings.num_trials} answers")
            try:
                evaluate_run(run, settings, method, prompts)
            except DataError:
                run.discard_if_empty()
                raise
        print(format_summary(read_arguments(run.folder), summarize(run.samples)), end="")
    return 0


def evaluate_run(run: Run, settings: Settings, method: Method, prompts: Mapping[int, str]) -> None:
    """Load, evaluate, finish."""
    loaded = load(settings, method)
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
        chunk=max(1, BATCHES_PER_CHUNK * settings.batch_size // method.num_samples),
        num_candidates=method.num_samples,
        extra=judges(settings),
    )
    figures = run.finish()
    if settings.wandb:
        log_to_wandb(run, figures)


def judges(settings: Settings) -> dict[str, Callable]:
    """Independent judges of the data set's objectives, {judge_<objective>: scorer}, where the workspace has them."""
    from utils.judge import load_judges

    return load_judges(settings.config, settings.spec.objectives)


def log_to_wandb(run: Run, figures) -> None:
    """The rewards table and the summary, under the run folder's name."""
    from utils.runs import per_prompt
    from utils.tracking import Tracker

    arguments, rows = read_arguments(run.folder), per_prompt(run.samples)
    with Tracker(True, arguments["method"], run.folder.name, arguments) as tracker:
        tracker.table("rewards", list(rows[0]), [list(row.values()) for row in rows])
        tracker.summary({name: figure.mean for name, figure in figures.items()})


def answer_texts(settings: Settings, method: Method) -> None:
    """Answer the user's own texts on standard output, each with its rewards and log-ratio."""
    from utils.text_formats import format_of

    texts = [sys.stdin.read() if text == "-" else text for text in settings.texts]
    try:
        prompts = dict(enumerate(format_of(settings.spec).wrap_user(text) for text in texts))
    except ValueError as error:
        raise UsageError(f"--prompt: {error}") from None
    loaded = load(settings, method)
    encoded = loaded.encode(prompts)
    part = [(i, t) for i in prompts for t in range(settings.num_trials)]
    candidates = loaded.generate([encoded[i] for i, _ in part], [(settings.seed, i, t) for i, t in part], None)
    rows = pick(part, candidates, prompts, loaded.to_text, loaded.score, settings.weights, 0.0, settings.track_kl, {})
    series = [f"{k} {v}" for k, v in method.series.items()]
    print(", ".join([f"{method.name}: {describe_weights(settings.weights) or 'no weights'}", *series]))
    for row in rows:
        print(f"\n> {texts[row['index']].strip()}\n{row['response']}")
        figures = [f"{name} {value:.3f}" for name, value in row["rewards"].items()]
        if "log_ratio" in row:
            figures.append(f"log-ratio {row['log_ratio']:.2f}")
        end = "ended by itself" if row["finished"] else "cut off"
        print(f"[{', '.join(figures)}; {row['tokens']} tokens, {end}]")
