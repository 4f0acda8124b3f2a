"""Small files that are whole or not there: bytes and text, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def temporary_name(path: Path) -> Path:
    """Where a process writes what is then renamed to `path`; no other process's, also not another machine's."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole file or none: to a temporary name, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value):
    """Plain data with nan and inf as null, so that every JSON reader takes it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, data: Mapping) -> None:
    """Write JSON atomically."""
    write_atomically(path, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV atomically, by default with the first row's columns; floats by repr: reading gives the same
    bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if columns is None else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
