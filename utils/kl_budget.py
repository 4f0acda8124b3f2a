"""Finding the beta whose KL meets a budget, so that methods can be compared at equal KL.

The KL of a beta is measured on the run's own prompts, one answer each, with the random numbers of the run's first
trial: all betas, and all methods, share them. What was measured is kept in a file beside the run folders, so that a
search that was killed goes on, and another budget starts from what is known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from utils.errors import DataError
from utils.files import open_alone

LARGEST_BETA = 64.0  # with min-max values the likeliest candidate's odds then grow by e^64: nothing is left to tilt
HALVINGS = 10  # of the interval between two betas
COLUMNS = "beta,kl,error"


@dataclass(frozen=True)
class Measured:
    """The KL of a beta in nats: a mean over prompts, and its standard error (nan for one prompt)."""

    beta: float
    kl: float
    error: float

    def line(self) -> str:
        return f"{self.beta!r},{self.kl!r},{self.error!r}\n"  # by repr: reading gives the same bits


@dataclass(frozen=True)
class Search:
    """The betas that were tried for a budget, in their order, and the one that was found."""

    budget: float
    found: Measured
    tried: tuple[Measured, ...]
    met: bool  # within its standard error; else the nearest after all halvings

    def table(self) -> str:
        """kl_search.csv."""
        return COLUMNS + "\n" + "".join(m.line() for m in self.tried)

    def record(self) -> dict:
        """What args.yaml says of it."""
        found = self.found
        return {
            "budget": self.budget, "beta": found.beta, "kl": found.kl, "error": found.error, "met": self.met,
            "tried": len(self.tried), "trials": 1,
        }  # fmt: skip


def search_beta(
    measure: Callable[[float], Measured], budget: float, *, largest: float = LARGEST_BETA, halvings: int = HALVINGS
) -> Search:
    """The beta whose KL is the budget, to within the KL's standard error.

    Betas 0, 1, 2, 4, ... up to `largest` until one has more than the budget, then bisection of the last interval.
    Always the same betas for the same measurements.

    Args:
        measure: a beta to its KL.
        budget: in nats, above 0.

    Raises:
        DataError: the budget is below the KL of beta 0, or above that of every beta up to `largest`.
    """
    tried: list[Measured] = []

    def at(beta: float) -> Measured:
        tried.append(measure(beta))
        return tried[-1]

    def met(m: Measured) -> bool:
        return abs(m.kl - budget) <= m.error  # never for one prompt, whose error is nan

    def result(found: Measured) -> Search:
        return Search(budget, found, tuple(tried), met(found) or found.kl == budget)

    low = at(0.0)
    if low.kl >= budget:
        if met(low) or low.kl == budget:
            return result(low)
        raise DataError(
            f"--kl_budget {budget:g} is below the KL of beta 0, {low.kl:.4f} nats (s.e. {low.error:.4f}), which the "
            "cut to the top k tokens has without any tilt; give a larger budget, or a larger --topk"
        )
    high = at(min(1.0, largest))
    while not met(high) and high.kl < budget:
        if high.beta >= largest:
            raise DataError(
                f"--kl_budget {budget:g} is not reached: beta {largest:g}, the largest that is tried, has a KL of "
                f"{high.kl:.4f} nats (s.e. {high.error:.4f}); the most was {max(m.kl for m in tried):.4f}"
            )
        low, high = high, at(min(2 * high.beta, largest))
    if met(high):
        return result(high)
    for _ in range(halvings):
        middle = at((low.beta + high.beta) / 2)
        if met(middle):
            return result(middle)
        low, high = (middle, high) if middle.kl < budget else (low, middle)
    return result(min(reversed(tried), key=lambda m: abs(m.kl - budget)))  # of equals the last, next to the crossing


class Measurements:
    """The file of what was measured for one method at one point, one line per beta. Use as a context manager.

    One process at a time holds it; the lock ends with the process. A file without a line is removed.
    """

    def __init__(self, file: Path):
        self.file = file
        self.known: dict[float, Measured] = {}

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stream = open_alone(self.file, wait=False)
        except BlockingIOError:
            raise DataError(f"{self.file} is being written by another process; wait for it, or end it") from None
        self._stream.seek(0)
        text = self._stream.read()
        whole = text.rfind(b"\n") + 1
        self._stream.truncate(whole)  # a last line that a kill tore
        for number, line in enumerate(text[:whole].decode(errors="replace").splitlines()[1:], start=2):
            try:
                beta, kl, error = map(float, line.split(","))
            except ValueError:
                self._stream.close()
                raise DataError(f"{self.file}, line {number} is not {COLUMNS}; delete that line to go on") from None
            self.known[beta] = Measured(beta, kl, error)
        return self

    def __exit__(self, *_) -> None:
        if not self.known:
            self.file.unlink(missing_ok=True)
        self._stream.close()

    def add(self, measured: Measured) -> None:
        """Keep a measurement, flushed to the disk."""
        assert not math.isnan(measured.kl), measured
        if not self.known:
            self._stream.truncate(0)
            self._stream.write(f"{COLUMNS}\n".encode())
        self.known[measured.beta] = measured
        self._stream.write(measured.line().encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())
