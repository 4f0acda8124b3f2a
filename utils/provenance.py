"""What a result came from: names for what determines it, fingerprints of checkpoints, versions, the checkout's commit.

Nothing heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from utils.files import command_line

PACKAGES = ("torch", "transformers", "peft", "numpy")


def identity(determining: Mapping) -> str:
    """Eight hexadecimal digits of a hash of plain data (mappings, lists, strings, numbers)."""
    text = json.dumps(determining, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def fingerprint(path: str | os.PathLike) -> str:
    """What tells one checkpoint from another made later in the same place.

    Names, sizes and 64 evenly spaced blocks of each weight and configuration file: fast for 14 GB, and any training
    step changes every block. A name that is no local path (a Hub name) stands for itself.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    kept = {".safetensors", ".json", ".model", ".npz", ".csv"}
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file() and f.suffix in kept)
    digest = hashlib.sha256()
    for file in files:
        size, block = file.stat().st_size, 1 << 14
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= 64 * block:
                digest.update(stream.read())
            else:
                for i in range(64):
                    stream.seek(i * (size - block) // 63)
                    digest.update(stream.read(block))
    return digest.hexdigest()[:16]


def hash_of(texts: Sequence[str]) -> str:
    """What tells one list of texts from another."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and the packages that a result may depend on (nothing is imported)."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def of_training(device, processes: int, config) -> dict:
    """What a training's args.yaml says beside its settings: command, code, versions, devices, configuration."""
    return {
        "command": command_line(), "commit": git_commit(), "versions": versions(), "device": str(device),
        "processes": processes, "configuration": config.as_dict(),
    }  # fmt: skip


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")
