"""Sharing a stage's work among processes, on one machine or several, through the file system alone.

A stage's work is cut into *units* that depend on the command line alone, so that a unit gives the same bytes whichever
process does it. A process claims the next unit that is neither done nor claimed, does it, and goes on: who is faster
does more. Nothing waits for anything in between, and no process group is made; a launcher only has to number the
processes.

Three rules keep this simple:

- *What is done* is told by a unit's output alone, which appears by a rename. A claim saves work and decides nothing:
  two processes that do one unit write the same file twice.
- *A claim* is a file that only one process can create (O_CREAT | O_EXCL, which network file systems keep), and says
  whose it is. It counts as long as its process lives: the process's own file has a heartbeat, and on the same machine
  the process itself can be looked for. So a launch that was killed leaves nothing that blocks the next one, and a
  process that is killed in a launch that goes on loses its claim too.
- *A claim that counts no more* is taken over by creating the file of the next number, which again one process can.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self, TypeVar

from utils.errors import UsageError

LEASE = 120.0  # seconds without a heartbeat after which a process counts as gone
BEAT = 10.0  # seconds between two heartbeats
POLL = 0.5  # seconds between two looks at what others are doing
T = TypeVar("T")

# What launchers set: torchrun and accelerate, then MPI's own.
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """This process among those that share a command: its number, how many there are, its number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int | None = None

    @property
    def first(self) -> bool:
        """Whether it is the one that prints, merges and writes what there is once."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world}"


def this_process(environment: Mapping[str, str] | None = None) -> Process:
    """What the launcher says in the environment; one process alone where there is none.

    Raises:
        UsageError: numbers that cannot be meant.
    """
    environment = os.environ if environment is None else environment

    def number(names: tuple[str, ...]) -> tuple[str, int | None]:
        name = next((n for n in names if environment.get(n)), names[0])
        text = environment.get(name)
        if not text:
            return name, None
        if not text.isdecimal():
            raise UsageError(f"the environment's {name} is {text!r}; a launcher sets it to a whole number")
        return name, int(text)

    (name, rank), (of, world), (_, local) = number(RANK), number(WORLD), number(LOCAL)
    if rank is None and world is None:
        return Process()
    if rank is None or world is None:
        raise UsageError(f"the environment has only one of {name} and {of}; set both, or neither for one process")
    if rank >= world:
        raise UsageError(f"the environment's {name} is {rank} and {of} is {world}; numbers run from 0 to {of} - 1")
    return Process(rank, world, local)


# ------------------------------------------------------------------------------------------------------------- claims


class Alone:
    """The claims of a process that shares its work with no other: everything is its own."""

    def take(self, unit: str) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass


class Claims:
    """Claims of units of work in a folder that all processes see. Use as a context manager.

    Args:
        folder: made where it is missing; of one division of one stage's work.
        lease: seconds without a heartbeat after which another process counts as gone.
        beat: seconds between this process's heartbeats.
    """

    def __init__(self, folder: str | Path, *, lease: float = LEASE, beat: float = BEAT):
        self.folder, self.lease, self.beat = Path(folder), lease, beat
        self.token = uuid.uuid4().hex
        self._seen: dict[str, tuple[str, float]] = {}  # of others: what was read last, and since when it says so
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        (self.folder / "owners").mkdir(parents=True, exist_ok=True)
        self._own = (self.folder / "owners" / self.token).open("xb", buffering=0)
        self._beat(0)
        threading.Thread(target=self._beats, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        (self.folder / "owners" / self.token).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a process that came when everything was done, nothing is left
            (self.folder / "owners").rmdir()
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def take(self, unit: str) -> bool:
        """Claim a unit; False where it is claimed by a process that lives, this one included."""
        generation = 0
        while True:
            path = self.folder / f"{unit}.{generation}"
            try:
                file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if not self._gone(path):
                    return False
                generation += 1
                continue
            except FileNotFoundError:  # the folder was removed: everything is done
                return False
            with os.fdopen(file, "wb") as stream:
                stream.write(self.token.encode())
                stream.flush()
                os.fsync(stream.fileno())
            return True

    def _gone(self, claim: Path) -> bool:
        """Whether the process behind a claim has ended, or has shown no sign of life for a lease."""
        try:
            token = claim.read_text()
        except FileNotFoundError:  # likewise
            return False
        if not token:  # just created, or its process was killed in that moment
            return self._unchanged(str(claim), "")
        try:
            sign = (self.folder / "owners" / token).read_text()
        except FileNotFoundError:  # it ended by itself
            return True
        where, _, who = sign.rpartition(" ")[0].rpartition(" ")
        if where and where == machine() and not _alive(who):
            return True
        return self._unchanged(token, sign)

    def _unchanged(self, what: str, sign: str) -> bool:
        """Whether a sign of life is the same for longer than a lease, by this machine's own clock."""
        now = time.monotonic()
        if self._seen.get(what, (None,))[0] != sign:
            self._seen[what] = (sign, now)
        return now - self._seen[what][1] > self.lease

    def _beats(self) -> None:
        count = 0
        while not self._ended.wait(self.beat):
            count += 1
            try:
                self._beat(count)
            except OSError:
                continue  # a beat that is missed costs others' work at worst; the next one may be written
        self._own.close()

    def _beat(self, count: int) -> None:
        """Write the process's file: machine, process, count; always equally long, so that it is replaced in place."""
        os.pwrite(self._own.fileno(), f"{machine()} {_process_id(os.getpid())} {count:012d}".encode(), 0)
        os.fsync(self._own.fileno())


@cache
def machine() -> str:
    """What tells the place where process numbers have a meaning from others; "" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process_id(pid: int) -> str:
    """A process's number and when it started, since numbers are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return f"{pid}/"
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold spaces
    return f"{pid}/{'' if fields[0] in 'ZX' else fields[19]}"


def _alive(process_id: str) -> bool:
    pid, _, started = process_id.partition("/")
    return pid.isdecimal() and bool(started) and _process_id(int(pid)) == process_id


def claims_of(process: Process, folder: str | Path) -> Claims | Alone:
    """Claims where several processes share the work."""
    return Claims(folder) if process.several else Alone()


def forget(folder: str | Path) -> None:
    """Remove the claims of work that is all done."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or of other work too
        Path(folder).parent.rmdir()


def share(
    units: Mapping[str, T], *, done: Callable[[T], bool], claims: Claims | Alone, wait: bool = False
) -> Iterator[T]:
    """Yield, one at a time, the units that this process is to do; each must be done when the next one is asked for.

    Args:
        units: {name: unit}, in the order in which they are begun.
        done: whether a unit's output is there.
        wait: go on until all are done, by whomever: a unit whose process is gone is then taken over. Otherwise it ends
            where the rest is others'.
    """
    left = dict(units)
    while left:
        for name, unit in list(left.items()):
            if not done(unit):
                if not claims.take(name):
                    continue
                if not done(unit):  # else it was finished between the two looks
                    yield unit
                    assert done(unit), f"{name} has no output"
            del left[name]
        if not wait:
            return
        if left:
            time.sleep(POLL)


def chunks(items: list[T], size: int) -> dict[str, list[T]]:
    """{name: at most `size` items}, in order; names say the places of the first and the last."""
    parts = (range(first, min(first + size, len(items))) for first in range(0, len(items), size))
    return {f"{part[0]:07d}-{part[-1]:07d}": [items[i] for i in part] for part in parts}


def refuse_several(flag: str, why: str) -> None:
    """Raise a UsageError where several processes were started for what one must do."""
    process = this_process()
    if process.several:
        raise UsageError(f"{flag} is for one process, and this is {process}: {why}")
