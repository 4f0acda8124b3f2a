"""YAML to frozen, validated dataclasses: what stands behind the names on the command line.

A configuration is data. No code branches on its name or on a data set's name; adding a data set or an objective is
one entry in one YAML file. `load_config` is the only way in, and every mistake in a file ends in a `ConfigError` of
one line that names the key, the nearest valid one and the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = "configs/paper_7b.yaml"
NORMALIZATIONS = ("minmax", "none", "zscore")  # of values over the candidates of a step


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that says what to do."""


def nearest(name: str, valid) -> str:
    """The end of an error message: the nearest valid name, if one is near, and the list of all."""
    valid = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid) if valid else '(none)'}"


# ---------------------------------------------------------------------------------------------------- specifications


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter's shape (PEFT's names)."""

    r: int
    alpha: int
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model: `path` is a Hub name or a folder (see `Config.locate`)."""

    path: str
    num_layers: int | None = None  # keep the first N layers; None keeps all
    special_tokens: dict[str, str] = field(default_factory=dict)  # e.g. {pad_token: "[PAD]"}, added to the tokenizer
    lora: LoraSpec | None = None
    # How a value model reads a text: "last": the head on the last token's state, as published; "mean": the mean of the
    # head over the response's tokens (0 where there are none).
    pooling: str = "last"
    made_by: str = ""  # the command that makes `path`, for the error message when it is missing


@dataclass(frozen=True)
class SourceSpec:
    """Where rows of text come from: local files first (`files`, if they exist), else a data set of the Hub."""

    hub: str = ""
    hub_config: str | None = None
    hub_data_dir: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()  # paths, relative to $DATA_DIR (or to the workspace where it is not set)
    hash_range: tuple[float, float] = (0.0, 1.0)  # keep prompts whose hash lies in [low, high): disjoint splits


@dataclass(frozen=True)
class TreeSpec:
    """The shape of iteration 0's trees (published: 4 children, then 2, 5 layers)."""

    root_children: int = 4
    non_root_children: int = 2
    num_layers: int = 5
    num_prompts: int = 5000


@dataclass(frozen=True)
class TrainingSpec:
    """Value regression's hyperparameters; the defaults are the published ones."""

    num_epochs: int = 1
    batch_size: int = 16  # nodes per optimizer step
    lr: float = 2e-5
    weight_decay: float = 2e-3
    warmup_steps: int = 100
    bf16: bool = False
    packing: str = "node"  # "node": one path per example, as published; "tree": one pass over a tree's unique tokens
    deepest_fraction: float = 0.5  # share of each tree's deepest-level nodes that is trained on
    targets: str = "ends"  # "ends": a node's target at its last token, as published; "dense": at each of its tokens
    # Where the head starts: "mean": a new one predicts about the targets' mean; "ridge": the regression of the targets
    # on the states before training, after which num_epochs may be 0.
    head_start: str = "mean"
    standardize: bool = False  # train in units of the targets' standard deviation, so that lr means the same for all
    seed: int = 8888


@dataclass(frozen=True)
class SFTSpec:
    """Supervised fine-tuning's hyperparameters; the defaults are the published ones."""

    lora: LoraSpec = LoraSpec(64, 128, 0.05)
    lr: float = 1.4e-4
    batch_size: int = 1
    max_steps: int = 20_000
    num_samples: int = 5_000
    max_length: int = 512
    weight_decay: float = 0.01
    warmup_steps: int = 0
    bf16: bool = True
    seed: int = 8888


@dataclass(frozen=True)
class PPOSpec:
    """Reinforcement learning's hyperparameters (Finetuning/PPO/ppo.py); the defaults are the published ones where the
    paper names them (adapter, lr, batch, epochs, KL target and coefficient, gradient norm, top-k)."""

    lora: LoraSpec = LoraSpec(64, 128, 0.05)
    lr: float = 1e-5
    batch_size: int = 64  # answers per step, over all processes
    num_epochs: int = 2  # passes over the prompts
    num_prompts: int | None = None  # prompts of the training split; None takes all
    max_steps: int | None = None  # at most this many steps
    ppo_epochs: int = 4  # passes over each step's answers
    mini_batch_size: int = 16  # answers per optimizer step
    micro_batch_size: int = 8  # answers per forward pass: memory alone, it changes no result
    kl_coef: float = 0.1  # initial, then adaptive
    kl_target: float | None = 3.0  # nats per answer; None keeps the coefficient
    kl_horizon: float = 10_000.0  # answers
    clip_ratio: float = 0.2
    clip_value: float = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    max_grad_norm: float = 0.5
    top_k: int | None = None  # None: decoding.top_k
    num_generations: int = 4  # answers per prompt, of the algorithms that compare answers (rloo, grpo)
    seed: int = 8888


@dataclass(frozen=True)
class ArmSpec:
    """Hyperparameters of autoregressive reward models (Finetuning/ARM/train_arm.py)."""

    lora: LoraSpec = LoraSpec(8, 16, 0.05)
    lr: float = 5e-4
    batch_size: int = 32  # pairs per step
    num_epochs: int = 1
    reward_beta: float = 0.05  # multiplies the log-probabilities in the Bradley-Terry loss
    num_prompts: int = 5000  # prompts whose sampled answers are compared
    answers_per_prompt: int = 4
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    seed: int = 8888


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: its prompts, how they are shown to the reference, and the defaults of its stages."""

    name: str
    exp_type: str  # the name that Finetuning/ scripts use ("assistant", "summary")
    prompt_format: str  # a key of text_formats.FORMATS: how a row becomes a prompt
    reference_template: str  # what the reference reads; fields {prompt}, {user}
    splits: dict[str, SourceSpec]
    objectives: tuple[str, ...]
    max_new_tokens: int
    max_prompt_tokens: int
    min_prompt_tokens: int = 1
    max_post_chars: int | None = None  # exclusive bounds on the user's text, where the format has them
    min_post_chars: int | None = None
    num_val_prompts: int = 300
    sft_model: str = ""  # the reference; empty: sft_model/<name>
    sft: SFTSpec = SFTSpec()
    trees: TreeSpec = TreeSpec()
    training: TrainingSpec = TrainingSpec()
    ppo: PPOSpec = PPOSpec()
    arm: ArmSpec = ArmSpec()


@dataclass(frozen=True)
class RewardTrainingSpec:
    """How `train_reward_model.py` makes a reward model, where no published one is used."""

    kind: str  # "preference": rows with chosen and rejected; "labels": rows with a text and a 0/1 label
    source: SourceSpec
    holdout: SourceSpec
    head: str = "linear"  # "linear": frozen trunk, Bradley-Terry on averaged features; "full": fine-tune every layer
    num_layers: int | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_rows: int | None = None
    max_holdout_rows: int | None = None
    max_length: int = 512
    lr: float = 1e-4
    num_epochs: int = 1
    batch_size: int = 8
    l2: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class ObjectiveSpec:
    """One reward: a checkpoint (`path`) or a Python callable (`function`), and the text it is shown.

    `text` is a template with the fields {prompt} (the data set's prompt), {user} (the human's words in it), {shown}
    (what the reference read), {response}, {bos}, {eos}.
    """

    name: str
    kind: str  # "classifier": a sequence-classification checkpoint; "pooled": train_reward_model.py's linear head;
    #            "callable": package.module:function from (prompts, responses) to N numbers
    path: str = ""
    function: str = ""
    label: int = 0  # which logit of a classifier
    sign: float = 1.0
    text: str = "{prompt}{response}"
    max_length: int = 512
    description: str = ""
    training: RewardTrainingSpec | None = None
    deepest_fraction_continued: float | None = None  # value training with --init_checkpoint (published: 1.0 for harm)


@dataclass(frozen=True)
class DecodingSpec:
    """Decoding's defaults (published v1: temperature 1, k 15, min-max)."""

    temperature: float = 1.0
    top_k: int = 15
    normalization: str = "minmax"
    batch_size: int = 32
    cuda_graphs: bool = False  # on a GPU: a step is recorded once and launched whole


@dataclass(frozen=True)
class EvaluationSpec:
    """Evaluation's defaults: prompts from index 0 of the test split."""

    num_prompts: int = 100
    num_trials: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """Everything that stands behind the names; `workspace` is where the stages keep what they make."""

    path: Path
    workspace: Path
    base_model: ModelSpec
    value_model: ModelSpec
    datasets: dict[str, DatasetSpec]
    objectives: dict[str, ObjectiveSpec]
    decoding: DecodingSpec = DecodingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    cpu_dtype: str = "float32"  # of frozen models; "auto": bfloat16 where the hardware has it
    gpu_dtype: str = "bfloat16"
    label: str = ""  # printed in reports, so that a small world's results are not taken for another's

    def dataset(self, name: str) -> DatasetSpec:
        """The data set of that name (or of that `exp_type`)."""
        for spec in self.datasets.values():
            if name in (spec.name, spec.exp_type):
                return spec
        raise ConfigError(f"unknown data set {name!r} in {self.path}; {nearest(name, self.datasets)}")

    def objective(self, name: str) -> ObjectiveSpec:
        if name not in self.objectives:
            raise ConfigError(f"unknown objective {name!r} in {self.path}; {nearest(name, self.objectives)}")
        return self.objectives[name]

    def locate(self, path: str) -> str:
        """A folder of the workspace if there is one of that name, else a local folder, else the name itself (Hub)."""
        if not os.path.isabs(path) and (self.workspace / path).exists():
            return str(self.workspace / path)
        return path

    def portable(self, path: str | os.PathLike) -> str:
        """A path as it is put on record: from the workspace on where it lies there, so that a workspace can move."""
        place, workspace = Path(path).resolve(), self.workspace.resolve()
        if not place.exists():  # a Hub name
            return str(path)
        return str(place.relative_to(workspace) if place.is_relative_to(workspace) else place)

    def default_path(self, *parts: str) -> Path:
        """Where a default artefact lies: below the workspace."""
        return self.workspace.joinpath(*parts)

    def sft_path(self, dataset: DatasetSpec) -> str:
        """The reference model of a data set, as a workspace path or a Hub name."""
        return self.locate(dataset.sft_model or f"sft_model/{dataset.name}")

    def as_dict(self) -> dict:
        """Plain data for args.yaml."""
        return _plain(self)


# ------------------------------------------------------------------------------------------------------------ loading


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _build(cls, data, where: str, file: Path, **given):
    """Build dataclass `cls` from a mapping; `where` is the key's place in the file, for the message."""
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: {where or 'the file'} must be a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in given]
    for key in data:
        if key not in names:
            raise ConfigError(
                f"{file}: unknown key {(where + '.' if where else '') + str(key)!r}; {nearest(key, names)}"
            )
    values = dict(given)
    for f in dataclasses.fields(cls):
        if f.name in given:
            continue
        place = f"{where}.{f.name}" if where else f.name
        if f.name in data:
            values[f.name] = _convert(hints[f.name], data[f.name], place, file)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{file}: key {place!r} is missing")
    return cls(**values)


IN_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


def _convert(hint, value, where: str, file: Path):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where, file)
    if dataclasses.is_dataclass(hint):
        given = {"name": where.rsplit(".", 1)[-1]} if "name" in hint.__dataclass_fields__ else {}
        return _build(hint, value, where, file, **given)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {where} must be a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}", file) for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{file}: {where} must be a list, got {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{file}: {where} must have {len(args)} entries, got {len(value)}")
        return tuple(_convert(args[0], v, f"{where}[{i}]", file) for i, v in enumerate(value))
    if hint is Path:
        return Path(str(value))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 2e-5 as a string
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{file}: {where} must be {IN_WORDS[hint]}, got {value!r}")


def _resolve(path: str | os.PathLike) -> Path:
    """A configuration's file: as given, else below the repository, so that scripts run from anywhere."""
    candidates = [Path(path), REPOSITORY / path, REPOSITORY / "configs" / f"{path}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = [p.stem for p in (REPOSITORY / "configs").glob("*.yaml")]
    raise ConfigError(f"no configuration file {str(path)!r}; {nearest(Path(path).stem, known)} (in configs/)")


def load_config(path: str | os.PathLike | None = None, workspace: str | os.PathLike | None = None) -> Config:
    """Read and validate a configuration.

    Args:
        path: a YAML file; None takes the environment's MAVIS_CONFIG, else the paper's configuration.
        workspace: overrides the file's `workspace`. A relative one in the file is relative to the repository.

    Raises:
        ConfigError: one line that names what is wrong.
    """
    file = _resolve(path or os.environ.get("MAVIS_CONFIG") or DEFAULT_CONFIG)
    try:
        data = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file}: not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: the file must be a mapping, got {type(data).__name__}")
    data = dict(data)
    if workspace is not None:
        data["workspace"] = str(Path(workspace).absolute())
    elif "workspace" in data:
        data["workspace"] = str((REPOSITORY / str(data["workspace"])).resolve())
    config = _build(Config, data, "", file, path=file)
    _check(config)
    return config


# Numbers and the least that each may be, wherever in the file a key of that name stands.
LEAST = {
    name: 1
    for name in (
        "r", "alpha", "root_children", "non_root_children", "num_layers", "num_prompts", "num_epochs", "batch_size",
        "max_steps", "num_samples", "max_length", "max_new_tokens", "max_prompt_tokens", "min_prompt_tokens",
        "num_val_prompts", "max_rows", "max_holdout_rows", "top_k", "num_trials", "ppo_epochs", "mini_batch_size",
        "micro_batch_size",
    )
} | {
    name: 0
    for name in (
        "dropout", "weight_decay", "warmup_steps", "deepest_fraction", "l2", "label", "seed", "kl_coef", "value_coef",
        "gamma", "gae_lambda",
    )
} | {name: 2 for name in ("num_generations", "answers_per_prompt")}  # fmt: skip
MAY_BE_ZERO = r"datasets\.\w+\.training\.num_epochs"  # a value model may keep the head that it starts with
ABOVE_ZERO = (
    "lr", "temperature", "kl_target", "kl_horizon", "clip_ratio", "clip_value", "max_grad_norm", "reward_beta",
)  # fmt: skip
TEMPLATE_FIELDS = {
    "reference_template": ("prompt", "user"),
    "text": ("prompt", "user", "shown", "response", "bos", "eos"),
}


def number_problem(key: str, value: float) -> str:
    """What is wrong with a number under a key of that name, or ""."""
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if key in ABOVE_ZERO and value <= 0:
        return f"must be above 0, got {value}"
    return f"must be at least {LEAST[key]}, got {value}" if value < LEAST.get(key, -math.inf) else ""


def _check_numbers(value, where: str, file: Path) -> None:
    """Raise a ConfigError for a number below what its key allows, in a configuration as plain data."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        place = f"{where}.{key}" if where else str(key)
        if isinstance(child, (dict, list)):
            _check_numbers(child, place, file)
        elif isinstance(child, (int, float)) and not isinstance(child, bool):
            if child == 0 and re.fullmatch(MAY_BE_ZERO, place):
                continue
            if problem := number_problem(str(key), child):
                raise ConfigError(f"{file}: {place} {problem}")


def _check(config: Config) -> None:
    """What types alone do not say."""

    def choice(value, valid, where):
        if value not in valid:
            raise ConfigError(f"{config.path}: {where} is {value!r}; {nearest(value, valid)}")

    def template(text, where, needed):
        fields = re.findall(r"\{(\w+)\}", text)
        for name in fields:
            choice(name, TEMPLATE_FIELDS[where.rsplit(".", 1)[-1]], f"a field of {where}")
        if not set(fields) & set(needed):
            raise ConfigError(f"{config.path}: {where} must contain {{{'} or {'.join(needed)}}}, got {text!r}")

    _check_numbers(config.as_dict(), "", config.path)
    for spec in config.datasets.values():
        where = f"datasets.{spec.name}"
        for objective in spec.objectives:
            choice(objective, config.objectives, f"{where}.objectives")
        if not spec.objectives or len(set(spec.objectives)) < len(spec.objectives):
            raise ConfigError(f"{config.path}: {where}.objectives must name at least one, each once")
        choice(spec.training.packing, ("node", "tree"), f"{where}.training.packing")
        choice(spec.training.targets, ("ends", "dense"), f"{where}.training.targets")
        choice(spec.training.head_start, ("mean", "ridge"), f"{where}.training.head_start")
        if spec.training.num_epochs == 0 and spec.training.head_start != "ridge":
            raise ConfigError(f"{config.path}: {where}.training.num_epochs is 0, which needs head_start: ridge")
        template(spec.reference_template, f"{where}.reference_template", ("prompt", "user"))
        for name, source in spec.splits.items():
            low, high = source.hash_range
            if not 0 <= low < high <= 1:
                raise ConfigError(
                    f"{config.path}: {where}.splits.{name}.hash_range must be two numbers from 0 to 1, the lower "
                    f"first, got [{low:g}, {high:g}]"
                )
    for spec in config.objectives.values():
        where = f"objectives.{spec.name}"
        template(spec.text, f"{where}.text", ("response",))
        choice(spec.kind, ("classifier", "pooled", "callable"), f"{where}.kind")
        needed = "function" if spec.kind == "callable" else "path"
        if not getattr(spec, needed):
            raise ConfigError(f"{config.path}: {where}.{needed} is missing (kind {spec.kind!r} needs it)")
        if spec.training:
            choice(spec.training.kind, ("preference", "labels"), f"{where}.training.kind")
            choice(spec.training.head, ("linear", "full"), f"{where}.training.head")
    choice(config.value_model.pooling, ("last", "mean"), "value_model.pooling")
    choice(config.decoding.normalization, NORMALIZATIONS, "decoding.normalization")
    for dtype, where in ((config.cpu_dtype, "cpu_dtype"), (config.gpu_dtype, "gpu_dtype")):
        choice(dtype, ("auto", "float32", "float64", "bfloat16", "float16"), where)
