"""Where checkpoints lie, and the commands that make them. Nothing heavy is imported: a dry run is instant."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from utils.cli import found
from utils.config import REPOSITORY
from utils.errors import DataError
from utils.files import write_json
from utils.specs import Config, DatasetSpec, ObjectiveSpec

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RECORD = "metrics.json"  # beside an adapter: what it was made from
CHECKSUM = "adapter_checksum"  # in it; not in what earlier versions wrote


def reference_path(config: Config, dataset: DatasetSpec) -> tuple[str, str]:
    """Where the reference of a data set lies, and the command that makes it."""
    made_by = ""  # a checkpoint that the configuration names may be on the Hub
    if not dataset.sft_model:
        made_by = f"Finetuning/SFT/sft.py --exp_type {dataset.exp_type} ..., then Finetuning/SFT/merge_sft_lora.py"
    elif dataset.sft_model == config.base_model.path:
        made_by = config.base_model.made_by
    return config.sft_path(dataset), made_by


def prompts_command(dataset: str, split: str, config: Config | None) -> str:
    """The command that makes a split's prompts; None for a file that no configuration is known of."""
    return f"python dataset_preprocess.py {dataset} --split {split}" + (f" {config.flags}" if config else "")


def value_model_folder(config: Config, value_model_dir: str | Path | None, iteration: int, objective: str) -> Path:
    """<value_model_dir>/iter_<N>/<objective>."""
    root = Path(value_model_dir) if value_model_dir else config.default_path("value_models")
    return root / f"iter_{iteration}" / objective


def value_model_command(config: Config, objective: str, folder: str | Path) -> str:
    """The command that trains an objective's value model into `<root>/iter_<N>/<objective>`, but for its data."""
    iteration, before = Path(folder).parent.name, Path(folder).parent.parent
    command = (
        f"python train_value_model.py {config.flags} --dataset {dataset_of(config, objective)} "
        f"--objective {objective} --data_dir <labelled trees> --output_dir {shlex.quote(str(folder))}"
    )
    if match := re.fullmatch(r"iter_([1-9]\d*)", iteration):  # it goes on from the one before it
        command += f" --init_checkpoint {shlex.quote(str(before / f'iter_{int(match[1]) - 1}' / objective))}"
    return command


def candidate_head_command(
    config: Config, objective: str, iteration: int, heads: str | None = None, value_models: str | None = None
) -> str:
    """The command that fits an objective's candidate head; folders that are not the workspace's are named."""
    command = (
        f"python fit_candidate_heads.py {objective} {config.flags} --dataset {dataset_of(config, objective)} "
        f"--value_model_iter {iteration}"
    )
    for flag, folder in (("--output_dir", heads), ("--value_model_dir", value_models)):
        command += f" {flag} {shlex.quote(str(folder))}" if folder else ""
    return command


def dataset_of(config: Config, objective: str) -> str:
    """The data set whose objective it is."""
    return next((d.name for d in config.datasets.values() if objective in d.objectives), "...")


def candidate_head_path(candidate_head_dir: str | Path, iteration: int, objective: str) -> Path:
    """<candidate_head_dir>/iter_<N>/<objective>.safetensors."""
    return Path(candidate_head_dir) / f"iter_{iteration}" / f"{objective}.safetensors"


def check_adapter_folder(folder: Path, what: str, made_by: str = "") -> None:
    """Raise a DataError unless `folder` holds a PEFT adapter in safetensors, undamaged where it says what it was."""
    missing = [n for n in ADAPTER if not (folder / n).is_file()]
    if missing:
        hint = f"; make it with: {made_by}" if made_by else ""
        raise DataError(f"{what}: no {' and no '.join(missing)} in {folder}{hint}")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise DataError(f"{what}: {folder / 'adapter_config.json'} is not JSON")
    try:
        recorded = json.loads((folder / RECORD).read_text()).get(CHECKSUM)
    except (OSError, ValueError, AttributeError):  # an adapter from elsewhere
        recorded = None
    if recorded is not None and recorded != adapter_checksum(folder):
        raise DataError(f"{what}: the adapter in {folder} is not the one that {RECORD} was written for: it is damaged")


def adapter_checksum(folder: Path) -> str:
    """Of an adapter's weights and its configuration."""
    digest = hashlib.sha256()
    for name in ADAPTER:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def record_checksum(folder: Path) -> None:
    """Put an adapter's checksum into its metrics.json, so that a damaged byte is noticed where it is loaded."""
    record = json.loads((folder / RECORD).read_text())
    write_json(folder / RECORD, record | {CHECKSUM: adapter_checksum(folder)})


def training_command(config: Config, spec: ObjectiveSpec) -> str:
    """The command that makes an objective's reward model, or "" if it is a published one."""
    if spec.training is None:
        return ""
    return f"python Finetuning/RM/train_reward_model.py {config.flags} --objective {spec.name}"


def reward_rows(config: Config, objectives: Sequence[str]) -> list[tuple[str, str, str]]:
    """What a `RewardSet` would load, for `report_dry_run`."""
    rows = []
    for spec in map(config.objective, objectives):
        path = spec.function if spec.kind == "callable" else config.locate(spec.path)
        where = function_found(config, path) if spec.kind == "callable" else found(path, training_command(config, spec))
        rows.append((f"reward of {spec.name} ({spec.kind})", path, where))
    return rows


def function_found(config: Config, function: str) -> str:
    """What a dry run says of package.module:function, whose module is looked at and not run."""
    module, _, name = function.partition(":")
    if not module or not name:
        return "missing: it must read package.module:function"
    folders = (Path.cwd(), config.path.resolve().parent, REPOSITORY)
    files = (folder.joinpath(*module.split(".")).with_suffix(".py") for folder in folders)
    file = next((f for f in files if f.is_file()), None)
    if file is None:  # of an installed package, or nowhere
        top = module.partition(".")[0]
        ours = any((folder / top).is_dir() for folder in folders)
        return "missing: no such module" if ours or not importlib.util.find_spec(top) else "Python"
    try:
        nodes = ast.parse(file.read_text()).body
    except (SyntaxError, ValueError) as error:
        return f"missing: {file} is no Python ({error})"
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    # A name may also be assigned or imported: only what is near to another one is taken for a mistake.
    close = difflib.get_close_matches(name, names, n=1)
    return "here" if name in names or not close else f"missing: {file} has no {name!r}; did you mean {close[0]!r}?"


def last_checkpoint(folder: Path) -> Path | None:
    """A trainer's newest checkpoint that was written to its end (its state file comes last)."""

    def complete(checkpoint: Path) -> bool:
        try:
            return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False

    steps = {
        int(c.name.rpartition("-")[2]): c for c in folder.glob("checkpoint-*") if c.name.rpartition("-")[2].isdigit()
    }
    return next((steps[n] for n in sorted(steps, reverse=True) if complete(steps[n])), None)
