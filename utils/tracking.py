"""Weights & Biases, for every stage's --wandb: one run of the project `mavis` per stage.

Nothing needs the package, and it is imported only where --wandb asks for it. Where the run goes is for wandb's own
environment to say: WANDB_MODE (online, offline, disabled), WANDB_DIR, WANDB_PROJECT, WANDB_API_KEY.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from utils.cli import check_wandb
from utils.errors import DataError
from utils.files import flat

PROJECT = "mavis"


class Tracker:
    """A stage's run in W&B, or nothing at all where it is not wanted. Use as a context manager.

    Args:
        wanted: --wandb, and in this process (only the main one of several logs).
        stage: the script's name without .py, which groups the runs.
        name: the run's name, e.g. what the stage makes (default: the stage's).
        settings: plain data that is kept with the run: arguments, models, places.

    Raises:
        DataError: no wandb, or it cannot start (no API key, no network).
    """

    def __init__(self, wanted: bool, stage: str, name: str = "", settings: Mapping[str, Any] | None = None):
        self.run = None
        check_wandb(wanted)
        if not wanted:
            return
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name or stage,
                job_type=stage,
                config=dict(settings or {}),
            )
        except (wandb.Error, OSError) as error:
            hint = "WANDB_MODE=offline keeps it on this machine, wandb login gives a key"
            raise DataError(f"--wandb: {' '.join(str(error).split())} ({hint})") from None

    def log(self, row: Mapping[str, Any], step: int | None = None) -> None:
        """A row of a curve; what is no finite number is left out."""
        if self.run is not None:
            self.run.log(_numbers(row), step=step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Figures that stand for the whole run; nested ones are joined with a slash."""
        if self.run is not None:
            self.run.summary.update(_numbers(flat(figures, "/")))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        """A table of text and numbers."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def images(self, files: Mapping[str, str | Path]) -> None:
        """Pictures, {name: PNG file}."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Image(str(file)) for name, file in files.items()})

    def finish(self, *, failed: bool = False) -> None:
        """End the run; what comes later goes nowhere."""
        if self.run is not None:
            self.run.finish(exit_code=int(failed))
            self.run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        self.finish(failed=kind is not None)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, also those that are written as text."""
    found = {}
    for name, value in row.items():
        try:
            value = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            found[name] = int(value) if value.is_integer() else value
    return found
