"""Files and folders that are whole or not there: bytes and text, JSON, CSV; one process at a time where it matters."""

from __future__ import annotations

import csv
import fcntl
import functools
import io
import json
import math
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from utils.errors import DataError

# -------------------------------------------------------------------------------------------------------- whole files


def open_alone(path: Path, *, wait: bool = True) -> io.BufferedRandom:
    """Open a file that only one process may have; the lock ends with the process, or when it is closed.

    The name may go while this process waits (its owner renamed or removed the file): then it is opened anew.

    Raises:
        BlockingIOError: `wait` is off and another process has it.
    """
    while True:
        file = open(path, "a+b")  # noqa: SIM115 (it is the caller's to close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:  # removed between the two looks
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def temporary_name(path: Path) -> Path:
    """Where this machine's processes write what is then renamed to `path`.

    The name is the same in all, so that what a killed one leaves is used up by the next; but no other machine's,
    since locks may not reach over a network's file system.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.tmp")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole file or none: to a temporary name, flushed to the disk, then renamed.

    The lock lets one process of a machine at a time write there. An error without a file's name (no space left) is
    given this one's.
    """
    temporary = temporary_name(path)
    try:
        with _open_temporary(temporary) as file:
            try:
                file.truncate(0)  # what a killed process left
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        _name(error, path)
        raise


def _open_temporary(path: Path) -> io.BufferedRandom:
    """Open a file in a folder that is made if need be, and made again if another process removes it, empty as it is."""
    for _ in range(10):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return open_alone(path)
    return open_alone(path)


def _name(error: OSError, path: Path) -> None:
    if error.filename is None and error.errno is not None:
        error.filename = str(path)


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def same_header(data: bytes) -> bytes:
    """A safetensors file's bytes with its metadata in one order; safetensors writes them in another each time, and a
    table that was fitted again would be taken for another one."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_npy(path: Path) -> np.ndarray:
    """An array of a .npy file.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, whatever numpy's parser makes of its header.
    """
    try:
        return np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # also a SyntaxError, a TokenError, a MemoryError
        raise ValueError(f"no readable .npy file: {' '.join(str(error).split())[:200]}") from error


def plain(value):
    """Plain data with nan and inf as null, so that every JSON reader takes it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def same_setting(known, now) -> bool:
    """Whether a recorded setting is the present one; earlier versions recorded whole paths (see `Config.portable`)."""
    if known == now:
        return True
    paths = isinstance(known, str) and isinstance(now, str) and os.path.isabs(known) and now
    return bool(paths) and not os.path.isabs(now) and known.endswith("/" + now)


def differing(known: Mapping, now: Mapping) -> str:
    """How recorded settings differ from the present ones, in words; "" where they do not."""
    names = [n for n in dict.fromkeys((*now, *known)) if not same_setting(known.get(n), now.get(n))]
    return "; ".join(f"{n}: {known.get(n)!r}, now {now.get(n)!r}" for n in names)


def flat(data: Mapping, separator: str = ".", place: str = "") -> dict:
    """Nested mappings as one, their keys joined by the separator."""
    found = {}
    for key, value in data.items():
        name = f"{place}{key}"
        found |= flat(value, separator, name + separator) if isinstance(value, Mapping) else {name: value}
    return found


def read_json(path: Path) -> dict | None:
    """A file's mapping; None where there is no such file, or another content."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


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


# ------------------------------------------------------------------------------------------------------ whole folders


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end; on an error nothing is left of it.

    To be used by the process that holds `folder` (see `hold`): what a killed one left is removed.
    """
    part = folder.with_name(f".{folder.name}.tmp")
    clear(folder)
    part.mkdir(parents=True)
    try:
        yield part
        put_in_place(part, folder)
    except OSError as error:
        _name(error, folder)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put_in_place(part: Path, folder: Path) -> None:
    """Rename a complete folder, flushed to the disk; one that was there before is replaced."""
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    replaced = _replaced(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    part.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what a killed process that wrote `folder` left beside it."""
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)
    if folder.exists():  # without it, the one that it was to replace is all there is
        shutil.rmtree(_replaced(folder), ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def is_made(folder: Path, known: Mapping | None, now: Mapping, *, rerun: bool, what: str, option: str) -> bool:
    """Whether `folder` holds what these settings make, and it stays.

    Args:
        known: what the folder records of its settings; None where it has no such record.
        what, option: is made there, and says where, for messages.

    Raises:
        DataError: the folder holds something else. Only what has a record is ever replaced, where `rerun` asks for it.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if known is None:
        raise DataError(f"{folder} exists and holds no complete {what}; give another {option}")
    if rerun:
        return False
    if different := differing(known, now):
        raise DataError(
            f"{folder} holds the {what} of other settings ({different}); give another {option}, or --rerun to replace "
            "it"
        )
    return True


# -------------------------------------------------------------------------------------------- one process at a time


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which stays, for the moments in which what it guards is looked at and changed."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


_held: dict[Path, io.BufferedRandom] = {}


def hold(folder: Path) -> None:
    """Let no other process write `folder` until this one calls `let_go` or ends, however that ends.

    The lock is a file beside the folder, since the folder itself is replaced whole.

    Raises:
        DataError: another process holds it; the message says which.
    """
    folder = Path(folder).absolute()
    lock = folder.with_name(f".{folder.name}.lock")
    if lock in _held:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open_alone(lock, wait=False)
    except BlockingIOError:
        raise DataError(
            f"{folder} is being written by {_holder(lock)}; wait for it, or end it: the same command then goes on "
            "from there"
        ) from None
    _held[lock] = file
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": command_line()}).encode())
    file.flush()
    clear(folder)


def _holder(lock: Path) -> str:
    try:
        known = json.loads(lock.read_text())
        return f"process {known['pid']} on {known['host']} ({known['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def let_go() -> None:
    """Give up every folder that this process holds."""
    while _held:
        lock, file = _held.popitem()
        lock.unlink(missing_ok=True)
        file.close()


def lets_go(main: Callable) -> Callable:
    """A script's `main` that, however it ends, no longer holds a folder afterwards."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        finally:
            let_go()

    return wrapped


def command_line() -> str:
    """This process's command, as it can be given again."""
    return shlex.join(sys.argv)
