"""YAML to a frozen, validated `Config`.

`load_config` is the only way in, and every mistake in a file ends in a `ConfigError` of one line that names the key,
the nearest valid one and the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import types
import typing
from pathlib import Path

import yaml

from utils.errors import ConfigError, nearest
from utils.specs import NORMALIZATIONS, Config, DatasetSpec, ObjectiveSpec, SourceSpec
from utils.summaries import MEASURES
from utils.text_formats import FORMATS

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = "configs/paper_7b.yaml"


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


def _convert(hint, value, where: str, file: Path, key: str = ""):
    """A value of the file as a type hint says; `key` is what a mapping calls it, which is its name."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where, file)
    if dataclasses.is_dataclass(hint):
        given = {"name": key} if "name" in hint.__dataclass_fields__ else {}
        return _build(hint, value, where, file, **given)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {where} must be a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}", file, str(k)) for k, v in value.items()}
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
    flags = f"--config {shlex.quote(str(file))}"
    if workspace is not None:
        flags += f" --workspace {shlex.quote(str(workspace))}"
    config = _build(Config, data, "", file, path=file, flags=flags)
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
        "dropout", "weight_decay", "warmup_steps", "l2", "label", "seed", "kl_coef", "value_coef", "deepest_fraction",
        "deepest_fraction_continued", "gamma", "gae_lambda",
    )
} | {name: 2 for name in ("num_generations", "answers_per_prompt")}  # fmt: skip
MOST = {name: 1 for name in ("deepest_fraction", "deepest_fraction_continued", "gamma", "gae_lambda")}
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # of a data set or an objective: a part of folders' names and of lists with commas
TAKEN = ("all", "index", *MEASURES)  # by command lines and by the columns of a run's rewards.csv
MAY_BE_ZERO = rf"datasets\.{NAME}\.training\.num_epochs"  # a value model may keep the head that it starts with
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
    if value > MOST.get(key, math.inf):
        return f"must be at most {MOST[key]}, got {value}"
    if key == "dropout" and value >= 1:
        return f"must be below 1, got {value}"
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


def _choice(config: Config, value, valid, where: str) -> None:
    if value not in valid:
        raise ConfigError(f"{config.path}: {where} is {value!r}; {nearest(value, valid)}")


def _check_template(config: Config, text: str, where: str, needed: tuple[str, ...]) -> None:
    fields = re.findall(r"\{(\w+)\}", text)
    for name in fields:
        _choice(config, name, TEMPLATE_FIELDS[where.rsplit(".", 1)[-1]], f"a field of {where}")
    if not set(fields) & set(needed):
        raise ConfigError(f"{config.path}: {where} must contain {{{'} or {'.join(needed)}}}, got {text!r}")


def _check_source(config: Config, source: SourceSpec, where: str) -> None:
    low, high = source.hash_range
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"{config.path}: {where}.hash_range must be two numbers from 0 to 1, the lower first, got "
            f"[{low:g}, {high:g}]"
        )


def _check_names(config: Config) -> None:
    """Names that are parts of folders, columns and lists, and that two data sets must not share."""
    for where, found in (("datasets", config.datasets), ("objectives", config.objectives)):
        for name in found:
            if not re.fullmatch(NAME, name) or name in TAKEN or name.startswith("judge_"):
                raise ConfigError(
                    f"{config.path}: {where}.{name}: letters, digits, '_' and '-' make a name; taken are "
                    f"{', '.join(TAKEN)} and what begins with judge_"
                )
    owners: dict[tuple[str, str], str] = {}
    for spec in config.datasets.values():
        shared = [("name or exp_type", name) for name in {spec.name, spec.exp_type}]
        shared += [("objective", name) for name in spec.objectives]  # what is made for one lies under its name alone
        for what, name in shared:
            if (owner := owners.setdefault((what, name), spec.name)) != spec.name:
                both = f"datasets.{owner} and datasets.{spec.name}"
                raise ConfigError(f"{config.path}: {both} have the same {what}, {name!r}")


def _check_dataset(config: Config, spec: DatasetSpec) -> None:
    where = f"datasets.{spec.name}"
    _choice(config, spec.prompt_format, FORMATS, f"{where}.prompt_format")
    for objective in spec.objectives:
        _choice(config, objective, config.objectives, f"{where}.objectives")
    if not spec.objectives or len(set(spec.objectives)) < len(spec.objectives):
        raise ConfigError(f"{config.path}: {where}.objectives must name at least one, each once")
    _choice(config, spec.training.packing, ("node", "tree"), f"{where}.training.packing")
    _choice(config, spec.training.targets, ("ends", "dense"), f"{where}.training.targets")
    _choice(config, spec.training.head_start, ("mean", "ridge"), f"{where}.training.head_start")
    if spec.training.num_epochs == 0 and spec.training.head_start != "ridge":
        raise ConfigError(f"{config.path}: {where}.training.num_epochs is 0, which needs head_start: ridge")
    _check_template(config, spec.reference_template, f"{where}.reference_template", ("prompt", "user"))
    for name, source in spec.splits.items():
        _check_source(config, source, f"{where}.splits.{name}")


def _check_objective(config: Config, spec: ObjectiveSpec) -> None:
    where = f"objectives.{spec.name}"
    _check_template(config, spec.text, f"{where}.text", ("response",))
    _choice(config, spec.kind, ("classifier", "pooled", "callable"), f"{where}.kind")
    needed = "function" if spec.kind == "callable" else "path"
    if not getattr(spec, needed):
        raise ConfigError(f"{config.path}: {where}.{needed} is missing (kind {spec.kind!r} needs it)")
    if spec.training:
        _choice(config, spec.training.kind, ("preference", "labels"), f"{where}.training.kind")
        _choice(config, spec.training.head, ("linear", "full"), f"{where}.training.head")
        _check_source(config, spec.training.source, f"{where}.training.source")
        _check_source(config, spec.training.holdout, f"{where}.training.holdout")


def _check(config: Config) -> None:
    """What types alone do not say."""
    _check_names(config)
    _check_numbers(config.as_dict(), "", config.path)
    for dataset in config.datasets.values():
        _check_dataset(config, dataset)
    for objective in config.objectives.values():
        _check_objective(config, objective)
    _choice(config, config.value_model.pooling, ("last", "mean"), "value_model.pooling")
    _choice(config, config.decoding.normalization, NORMALIZATIONS, "decoding.normalization")
    for dtype, where in ((config.cpu_dtype, "cpu_dtype"), (config.gpu_dtype, "gpu_dtype")):
        _choice(config, dtype, ("auto", "float32", "float64", "bfloat16", "float16"), where)
