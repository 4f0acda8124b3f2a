"""The run folder of an evaluation: arguments first, rows as they come, the summary last.

    <workspace>/<kind>/<dataset>/<objectives>/<method>_<weights>_<time>-<identity>/
        args.yaml       resolved arguments, configuration, versions, commit: written before any model is loaded
        samples.jsonl   one line per prompt and trial: the record that everything else is computed from
        rewards.csv     one row per prompt: means over its trials
        summary.txt     means and errors; written last, so a folder that has it is complete
        kl_search.csv   the betas that were tried, where the run's was found for a KL budget
        parts/          rows of several processes, a file for each part of the answers, until samples.jsonl takes them

A run's *identity* is a hash of what determines its result. The same command finds the newest folder of its identity:
a complete one is reported and not repeated, an incomplete one is completed. One process at a time writes a folder;
the lock is held on samples.jsonl, so it ends with the process, however that ends. Of several processes that share a
run, the first holds the lock and writes the folder; the others only add files to parts/.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import yaml

from utils.errors import DataError
from utils.files import command_line, locked, write_atomically, write_csv
from utils.provenance import git_commit, identity, versions
from utils.summaries import MEASURES, Statistic, format_summary, per_prompt, summarize

ARGUMENTS, SAMPLES, REWARDS, SUMMARY = "args.yaml", "samples.jsonl", "rewards.csv", "summary.txt"
KL_SEARCH, PARTS, CLAIMS = "kl_search.csv", "parts", "claims"
FOLDER_PATIENCE = 600.0  # seconds that a process waits for the run folder that the first one makes
IDENTIFYING = (
    "kind", "dataset", "method", "weights", "series", "indices", "num_trials", "arguments", "determining",
)  # fmt: skip
ARGUMENT_TYPES = {
    "kind": (str,), "method": (str,), "dataset": (str,), "objectives": (list,), "weights": (dict,), "series": (dict,),
    "num_trials": (int,), "indices": (list,), "arguments": (dict,), "kl_added": (float, int), "started": (float, int),
    "process": (dict,), "configuration": (dict,), "resumed": (list,),
}  # fmt: skip
SAMPLE_TYPES = {
    "index": (int,), "trial": (int,), "prompt": (str,), "response": (str,), "rewards": (dict,), "tokens": (int,),
    "generated_tokens": (int,), "seconds": (float, int), "finished": (bool,),
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class RunSpec:
    """What a run is, as plain data; the paths and args.yaml come from it.

    Attributes:
        kind: the folder of the workspace, e.g. mavis_logs.
        method: e.g. mavis, reference, best_of_n, token_table.
        weights: weight of each objective that the command line names; empty for a method that takes none.
        objectives: the objectives that are named in the path.
        series: the settings that the points of one front share (beta, number of samples, value models, ...).
        arguments: resolved arguments that determine the result.
        setting: arguments that do not (device, batch size, ...).
        determining: further plain data that determines the result (fingerprints of models, rewards and prompts).
        configuration: the whole configuration, for the reader.
        kl_added: what the method's KL is at most above the mean log-ratio of its answers (best-of-N), in nats.
    """

    kind: str
    dataset: str
    method: str
    objectives: tuple[str, ...]
    weights: dict[str, float] = field(default_factory=dict)
    series: dict = field(default_factory=dict)
    indices: tuple[int, ...] = ()
    num_trials: int = 1
    arguments: dict = field(default_factory=dict)
    setting: dict = field(default_factory=dict)
    determining: dict = field(default_factory=dict)
    configuration: dict = field(default_factory=dict)
    kl_added: float = 0.0

    @property
    def identity(self) -> str:
        return identity({name: getattr(self, name) for name in IDENTIFYING})

    def name(self, when: float) -> str:
        """The folder's name: method, weights, time to the second, identity."""
        weights = "-".join(f"{w:g}" for w in self.weights.values())
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(when))
        return "_".join(part for part in (self.method, weights, f"{stamp}-{self.identity}") if part)


class Run:
    """An open run folder: the only writer of its files. Use as a context manager, or call `close()`."""

    def __init__(self, folder: Path, arguments: Mapping, stream: io.BufferedRandom | None):
        self.folder = folder
        self.arguments = dict(arguments)
        self.samples: list[dict] = []
        self._stream = stream
        self._in_order = True  # what `samples` holds is what samples.jsonl holds
        if stream is not None:
            try:
                self._recover()
            except BaseException:
                self.close()
                raise
        else:
            self.samples = read_samples(folder)

    @property
    def complete(self) -> bool:
        return (self.folder / SUMMARY).exists()

    @property
    def done(self) -> set[tuple[int, int]]:
        """(prompt index, trial) of the rows that are written."""
        return {(s["index"], s["trial"]) for s in self.samples}

    def append(self, samples: Sequence[Mapping]) -> None:
        """Write samples, flushed to the disk, and the rows of rewards.csv as far as they go."""
        self._stream.write(as_lines(samples).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.samples.extend(dict(s) for s in samples)
        self._write_rewards()

    @property
    def in_parts(self) -> list[dict]:
        """The rows of `parts/` that samples.jsonl does not have, each once."""
        rows = {(s["index"], s["trial"]): s for s in read_parts(self.folder)}
        return [rows[key] for key in sorted(rows.keys() - self.done)]

    def gather(self) -> None:
        """Take the rows of `parts/` along; `finish` writes them to samples.jsonl."""
        self.samples += self.in_parts
        self._in_order = False

    def finish(self, note: str = "") -> dict[str, Statistic]:
        """Write samples.jsonl in its order, rewards.csv and, last and atomically, summary.txt; returns its figures.

        The order is that of one process that was never interrupted: by prompt, then by trial.
        """
        place = {index: n for n, index in enumerate(self.arguments["indices"])}
        ordered = sorted(self.samples, key=lambda s: (place.get(s["index"], -1), s["trial"]))
        if not self._in_order or ordered != self.samples:
            self.samples, self._in_order = ordered, True
            write_atomically(self.folder / SAMPLES, as_lines(ordered))
        expected = {(i, t) for i in self.arguments["indices"] for t in range(self.arguments["num_trials"])}
        assert self.done == expected, f"{self.folder}: {len(self.done)} rows of {len(expected)}"
        self._write_rewards()
        figures = summarize(self.samples)
        write_atomically(self.folder / SUMMARY, format_summary(self.arguments, figures) + note)
        for name in (PARTS, CLAIMS):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return figures

    def note_kl_search(self, record: Mapping, table: str) -> None:
        """How the run's beta was found, in args.yaml, kl_search.csv and, of a complete run, the summary.

        Runs are told apart by their beta, however it came about: a complete run of that beta takes the note too.
        """
        if self.arguments.get("kl_search") == record and (self.folder / KL_SEARCH).exists():
            return
        write_atomically(self.folder / KL_SEARCH, table)
        configuration = self.arguments.pop("configuration")  # long, so it stays last
        self.arguments |= {"kl_search": dict(record), "configuration": configuration}
        write_arguments(self.folder, self.arguments)
        if self.complete:
            write_atomically(self.folder / SUMMARY, format_summary(self.arguments, summarize(self.samples)))

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that could not start: it has no rows, and its command would make it again."""
        if self._stream is not None and not self.samples and not read_parts(self.folder):
            shutil.rmtree(self.folder)
            self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()  # the lock goes with it
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _recover(self) -> None:
        """Keep the whole lines of samples.jsonl; a last line that a kill tore is cut off."""
        self._stream.seek(0)
        text = self._stream.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            self._stream.truncate(whole)
        self.samples = parse_samples(_utf8(text[:whole], self.folder / SAMPLES), self.folder / SAMPLES)

    def _write_rewards(self) -> None:
        write_csv(self.folder / REWARDS, per_prompt(self.samples))


def run_parent(workspace: str | os.PathLike, spec: RunSpec) -> Path:
    """The folder that holds the run's folder."""
    return Path(workspace) / spec.kind / spec.dataset / "_".join(spec.objectives)


def find_run(workspace: str | os.PathLike, spec: RunSpec) -> Path | None:
    """The newest folder of the run's identity."""
    found = [f for f in run_parent(workspace, spec).glob(f"*-{spec.identity}*") if (f / ARGUMENTS).is_file()]
    return max(found, key=lambda f: (read_arguments(f)["started"], f.name), default=None)


def is_complete(workspace: str | os.PathLike, spec: RunSpec) -> bool:
    """Whether `open_run` would give a run that is not to be repeated."""
    folder = find_run(workspace, spec)
    return folder is not None and (folder / SUMMARY).exists()


def open_run(workspace: str | os.PathLike, spec: RunSpec, *, rerun: bool = False, shared: bool = False) -> Run:
    """Make the run's folder, or find the newest one of the same identity.

    A complete folder comes back closed for writing (`run.complete`); an incomplete one comes back with the rows that it
    has. `rerun` starts anew where the newest folder is complete, and completes it where it is not. `shared` is for the
    first of several processes that share the run: what lies in parts/ stays there until the run is finished.

    Raises:
        DataError: another process holds the folder; the message says which.
    """
    parent = run_parent(workspace, spec)
    parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(workspace) / spec.kind / ".lock"):
        folder = find_run(workspace, spec)
        if folder and (folder / SUMMARY).exists():
            if not rerun:
                return Run(folder, read_arguments(folder), None)
            folder = None
        process = {"pid": os.getpid(), "host": socket.gethostname(), "command": command_line()}
        now = time.time()
        if folder is None:
            for unborn in parent.glob(f"*-{spec.identity}*"):
                if not (unborn / ARGUMENTS).exists():  # killed before it was written, which the lock covers
                    shutil.rmtree(unborn)
            folder, copies = parent / spec.name(now), 1
            while folder.exists():  # a rerun within the same second
                copies += 1
                folder = parent / f"{spec.name(now)}-{copies}"
            folder.mkdir()
            stream = _lock_samples(folder)
            arguments = {
                "identity": spec.identity, "kind": spec.kind, "method": spec.method, "dataset": spec.dataset,
                "objectives": list(spec.objectives), "weights": spec.weights, "series": spec.series,
                "num_trials": spec.num_trials, "indices": list(spec.indices), "arguments": spec.arguments,
                "setting": spec.setting, "determining": spec.determining, "kl_added": spec.kl_added, "started": now,
                "process": process, "versions": versions(), "commit": git_commit(), "resumed": [],
                "configuration": spec.configuration,
            }  # fmt: skip
        else:
            stream = _lock_samples(folder)
            arguments = read_arguments(folder)
            arguments["resumed"].append({"time": now, "versions": versions(), "commit": git_commit()})
            arguments["process"] = process
        write_arguments(folder, arguments)
    run = Run(folder, arguments, stream)
    if not shared and (folder / PARTS).is_dir():  # of several processes that were interrupted
        if rows := run.in_parts:
            run.append(rows)
        for name in (PARTS, CLAIMS):
            shutil.rmtree(folder / name, ignore_errors=True)
    return run


def join_run(workspace: str | os.PathLike, spec: RunSpec, patience: float = FOLDER_PATIENCE) -> Path:
    """The folder of a run that this process shares with others, once the first one has made it.

    Raises:
        DataError: there is none after `patience` seconds.
    """
    end = time.monotonic() + patience
    while (folder := find_run(workspace, spec)) is None:
        if time.monotonic() > end:
            raise DataError(
                f"the first process has made no run folder in {run_parent(workspace, spec)} in {patience:g} seconds; "
                "see what it says"
            )
        time.sleep(0.2)
    return folder


def write_arguments(folder: Path, arguments: Mapping) -> None:
    text = yaml.safe_dump(dict(arguments), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    write_atomically(folder / ARGUMENTS, text)


def part_path(folder: Path, name: str) -> Path:
    """Where one of several processes writes a part's rows, whole or not at all."""
    return Path(folder) / PARTS / f"{name}.jsonl"


def read_parts(folder: Path) -> list[dict]:
    """The rows that lie in `parts/`; each (index, trial) may be in several files."""
    rows = []
    for file in sorted((Path(folder) / PARTS).glob("[0-9]*.jsonl")):
        with suppress(FileNotFoundError):  # gathered in this moment
            rows += parse_samples(_text(file), file)
    return rows


def rows_done(folder: Path) -> set[tuple[int, int]]:
    """(prompt index, trial) of the rows that a run's folder holds, for a process that is not its writer."""
    file = Path(folder) / SAMPLES
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # what a kill tore is cut off by the writer
    rows = parse_samples(_utf8(whole, file), file) + read_parts(folder)
    return {(s["index"], s["trial"]) for s in rows}


def _lock_samples(folder: Path) -> io.BufferedRandom:
    stream = (folder / SAMPLES).open("a+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        holder = read_arguments(folder)["process"]
        raise DataError(
            f"{folder} is being written by process {holder['pid']} on {holder['host']} ({holder['command']}); "
            "wait for it, or end it: the same command then goes on from there"
        ) from None
    return stream


# ----------------------------------------------------------------------------------------------------------- reading


def as_lines(samples: Sequence[Mapping]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(s, ensure_ascii=False, allow_nan=False) + "\n" for s in samples)


def parse_samples(text: str, file: Path) -> list[dict]:
    samples = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number} is not JSON ({error}); delete that line to go on") from None
        problem = _sample_problem(sample)
        if not problem and samples and sample["rewards"].keys() != samples[0]["rewards"].keys():
            problem = f"other rewards than the first line ({', '.join(samples[0]['rewards'])})"
        if problem:
            raise DataError(f"{file}, line {number} is damaged: {problem}; delete that line to go on")
        samples.append(sample)
    return samples


def _sample_problem(sample) -> str:
    """What a line of samples.jsonl lacks, or ""."""
    if not isinstance(sample, dict):
        return "no JSON object"
    for name, kinds in SAMPLE_TYPES.items():
        if type(sample.get(name)) not in kinds:
            return f"no {name} that is a {kinds[0].__name__}"
    scores = {f"reward {k}": v for k, v in sample["rewards"].items()}
    extra = sample.get("extra", {})
    if not isinstance(extra, dict) or not scores:
        return "no scores"
    numbers = scores | extra | {name: sample[name] for name in MEASURES if name in sample}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{name} is no finite number"
    return ""


def read_samples(folder: str | os.PathLike) -> list[dict]:
    """The lines of a folder's samples.jsonl."""
    file = Path(folder) / SAMPLES
    return parse_samples(_text(file), file)


def _text(file: Path) -> str:
    return _utf8(file.read_bytes(), file)


def _utf8(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is damaged: no UTF-8 text at byte {error.start}") from None


def read_arguments(folder: str | os.PathLike) -> dict:
    """A folder's args.yaml."""
    file = Path(folder) / ARGUMENTS
    try:
        data = yaml.safe_load(_text(file))
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise DataError(f"{file} is not readable YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{file} is not readable YAML: {error}") from None
    if not isinstance(data, dict) or "identity" not in data:
        raise DataError(f"{file} is not a run's args.yaml")
    for name, kinds in ARGUMENT_TYPES.items():
        if type(data.get(name)) not in kinds:
            raise DataError(f"{file} is damaged: no {name} that is a {kinds[0].__name__}")
    if "determining" in data and data["identity"] != _identity_of(data):
        raise DataError(f"{file} was changed after the run, or is damaged: its identity is not that of its entries")
    return data


def _identity_of(arguments: Mapping) -> str:
    """`RunSpec.identity` of what an args.yaml holds; "" where it cannot be."""
    try:
        return identity({name: arguments[name] for name in IDENTIFYING})
    except (TypeError, ValueError):
        return ""
