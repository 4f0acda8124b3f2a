"""What is evaluated at a point of a command line: its method, what determines its result, and its models.

A script says which `Method` a point is: which policy is built, from which checkpoints. What points share is loaded once
(`Models`). Nothing heavy is imported here at the top, so that a script's `--help` is instant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from utils.answers import Generate, Read, Remembered, Score, sampler
from utils.cli import found, report_dry_run
from utils.errors import DataError, UsageError
from utils.places import prompts_command, reference_path, reward_rows, training_command
from utils.provenance import fingerprint, hash_of
from utils.runs import RunSpec
from utils.settings import Settings

T = TypeVar("T")

BATCHES_PER_CHUNK = 4  # rows are written after this many batches' worth of answers


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
        read_by_reference: answers are read once more by the reference for the log-ratio, since the policy is no tilted
            reference (or since that is asked for).
        loads_late: the models of a point are loaded when its turn comes, since those of all would be many.
        num_samples: candidates per answer (best of N).
        shares_candidates: points differ in how candidates are ranked alone, so that each is made once for all points.
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
    read_by_reference: bool = False
    loads_late: bool = False
    shares_candidates: bool = False
    kl_added: float = 0.0
    decodes: bool = True
    determining: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------------- what determines a result


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
            "prompts": hash_of(list(prompts.values())),
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
    rows = [("prompts", str(file), found(str(file), prompts_command(spec.name, split, config)))]
    for settings, method in zip(points, methods, strict=True):
        loaded = checkpoints(settings, method).items()
        rows += [(what, str(path), found(str(path), by)) for what, (path, by) in loaded]
    rows = list(dict.fromkeys(rows)) + reward_rows(config, spec.objectives)
    rows.append(("run folder", f"{config.workspace / methods[0].kind / spec.name}", "made by this run"))
    report_dry_run(rows)


# -------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """What answers and scores prompts at one point, on its device."""

    encode: Callable[[Mapping[int, str]], dict[int, list[int]]]
    generate: Generate
    to_text: Callable[[Sequence[int]], str]
    score: Score
    read: Read | None  # of a policy that does not know the reference's log-probability
    work: dict[str, float]  # of a decoded token, see `Policy.work`


def load(settings: Settings, method: Method, models: Models) -> Loaded:
    """A point's policy on the shared models, and the rewards of every objective of the data set.

    Raises:
        DataError: something is missing, damaged or does not fit.
        UsageError: more candidates than there are tokens to choose from; graphs where there is no GPU.
    """
    from utils.data import encode_prompts
    from utils.decoding import read_by
    from utils.graphs import graphs_for
    from utils.models import stop_tokens
    from utils.text_formats import answer_texts

    by_default = settings.config.decoding.cuda_graphs and method.decodes
    graphs = graphs_for(models.device, settings.cuda_graphs, by_default)
    policy, tokenizer = method.build(settings, models), models.tokenizer
    ends = stop_tokens(models.reference, tokenizer)
    if graphs is not None:
        policy.graphs = graphs
    room = (policy.context or 1 << 30) - settings.max_new_tokens
    if room < 1:
        raise DataError(
            f"--max_new_tokens {settings.max_new_tokens} leaves no room for a prompt: the models attend to "
            f"{policy.context} tokens"
        )
    if settings.suppress_first_eos and settings.top_k > models.vocab_size - len(ends):
        raise UsageError(
            f"--suppress_first_eos leaves fewer than --topk {settings.top_k} of the {models.vocab_size} tokens"
        )

    def encode(prompts: Mapping[int, str]) -> dict[int, list[int]]:
        return dict(zip(prompts, encode_prompts(settings.spec, tokenizer, list(prompts.values()), room), strict=True))

    if method.generator is not None:
        generate = method.generator(settings, policy, ends)
    else:
        generate = sampler(
            policy,
            num_samples=method.num_samples,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=ends,
            batch_size=settings.batch_size,
            suppress_first_eos=settings.suppress_first_eos,
        )
    if method.shares_candidates:
        generate = models.once("candidates", lambda own=generate: Remembered(own))

    def to_text(ids: Sequence[int]) -> str:
        return answer_texts(tokenizer, [ids])[0]

    read = None
    if method.read_by_reference and settings.track_kl:
        read = functools.partial(read_by, models.reference, temperature=settings.temperature)
    return Loaded(encode, generate, to_text, models.score, read, policy.work())


def chunk_size(settings: Settings, method: Method) -> int:
    """Answers that are decoded and written together, and that one of several processes takes at a time."""
    return max(1, BATCHES_PER_CHUNK * settings.batch_size // method.num_samples)
