"""The folder that a training makes: begun beside its place, gone on from when killed, and put there when complete."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import yaml

from utils.errors import DataError
from utils.files import flat, hold, put_in_place, same_setting, write_atomically
from utils.places import ADAPTER, record_checksum

METRICS, ARGUMENTS = "metrics.json", "args.yaml"
MODEL_CARD = "README.md"  # PEFT's page about the adapter
STATE = "state.json"  # there once a training has something to go on from


def is_complete(output: Path) -> bool:
    """Whether a training has ended in this folder; one that has not is beside it."""
    return (output / METRICS).is_file() and (output / ARGUMENTS).is_file()


def open_output(
    output: Path,
    settings: dict,
    record: dict,
    *,
    rerun: bool = False,
    main_process: bool = True,
    what: str = "value model",
) -> Path | None:
    """The folder to train in, `<output>.partial` with its args.yaml, or None where `output` is complete.

    The trained adapter takes its place in one rename (`publish`), so `output` is whole or not there.

    Args:
        settings: plain data that determines the result; another result's folder is refused.
        record: more for args.yaml (versions, configuration).
        rerun: train again; what is there is replaced once the new one is complete.
        what: is made there, for messages.

    Raises:
        DataError: `output` or its partial folder was made with other settings, or holds something else; another
            process writes there.
    """
    settings = json.loads(json.dumps(settings))
    partial = output.with_name(output.name + ".partial")
    if main_process:
        hold(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not is_complete(output):
            raise DataError(f"--output_dir {output} exists and holds no {what} of this script; give another folder")
        if not rerun:
            _same_settings(output, settings)
            return None
    if main_process:
        begun = (partial / STATE).is_file() or (partial / METRICS).is_file()
        if partial.exists() and (rerun or not begun):  # nothing was trained there, so nothing is lost
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if (partial / ARGUMENTS).is_file():
            _same_settings(partial, settings)
        else:
            text = yaml.safe_dump({"settings": settings, **record}, sort_keys=False, allow_unicode=True, width=120)
            write_atomically(partial / ARGUMENTS, text)
    if not rerun and (partial / METRICS).is_file():  # killed between the last file and the rename
        if main_process:
            publish(partial, output)
        return None
    return partial


@contextlib.contextmanager
def discarded_unless_begun(partial: Path, *, main_process: bool = True):
    """Around all that may fail for want of usable input before the training: then `partial` holds nothing, and goes."""
    try:
        yield
    except DataError:
        if main_process and not (partial / STATE).is_file() and not (partial / METRICS).is_file():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _same_settings(folder: Path, settings: dict) -> None:
    known = flat((yaml.safe_load((folder / ARGUMENTS).read_text()) or {}).get("settings", {}))
    settings = flat(settings)
    for key in sorted(set(known) | set(settings)):
        if not same_setting(known.get(key), settings.get(key)):
            raise DataError(
                f"{folder} was made with {key}={known.get(key)!r}, this command has {settings.get(key)!r}; "
                "give another --output_dir, the same arguments, or --rerun to replace it"
            )


def publish(partial: Path, output: Path) -> None:
    """Put a complete folder in its place; one that was there before is replaced."""
    assert (partial / METRICS).is_file(), partial
    for path in (*partial.glob("*-*.safetensors"), partial / STATE, *partial.glob(".*.tmp")):  # the checkpoint
        path.unlink(missing_ok=True)
    shutil.rmtree(partial / "checkpoints", ignore_errors=True)  # a library's trainer's
    if (partial / ADAPTER[1]).is_file():
        record_checksum(partial)
    put_in_place(partial, output)


def save_adapter(model, folder: Path) -> None:
    """Write a PEFT adapter (what is trained, no embeddings), over what a killed process or a full disk left of one.

    It is whole once METRICS is there, which is written after it.
    """
    (folder / MODEL_CARD).unlink(missing_ok=True)  # PEFT goes on writing one that it finds, however much of it is there
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
