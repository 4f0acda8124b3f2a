"""Rows of text from local files (JSON lines, JSON, CSV, parquet; plain or gzipped) or the Hub.

Every mistake in a file ends in a `DataError` of one line that names the file and, where it has one, the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.errors import DataError
from utils.specs import Config, SourceSpec

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


def locate_file(name: str | os.PathLike, config: Config) -> Path | None:
    """A data file or folder: as given if absolute, else below $DATA_DIR, else below the workspace; None if nowhere."""
    name = os.path.expanduser(name)
    roots = [Path(os.environ["DATA_DIR"])] if os.environ.get("DATA_DIR") else []
    roots += [config.workspace]
    return next((root / name for root in roots if (root / name).exists()), None)  # root / absolute is the absolute


def _roots(config: Config) -> str:
    """Where `locate_file` looks, for messages."""
    data_dir = os.environ.get("DATA_DIR")
    return f"$DATA_DIR ({data_dir or 'not set'}) and the workspace ({config.workspace})"


def given_file(name: str | os.PathLike, config: Config) -> Path:
    """A file of the command line: as given (relative to where the user is), else as in the configuration.

    Raises:
        DataError: it is nowhere.
    """
    path = Path(os.path.expanduser(name))
    found = path if path.exists() else locate_file(name, config)
    if found is None:
        raise DataError(f"no data file {str(name)!r} here or in {_roots(config)}; check --data_files")
    return found


def source_files(source: SourceSpec, config: Config) -> list[Path]:
    """The local files of a source, or [] where it has none here and the Hub is asked.

    Raises:
        DataError: some of its files are here and others are not, or none is and the source names no Hub data set.
    """
    found = {name: locate_file(name, config) for name in source.files}
    missing = [name for name, path in found.items() if path is None]
    if not missing:
        return [path for path in found.values() if path is not None]
    if len(missing) == len(found) and source.hub:
        return []
    hint = "set DATA_DIR to the folder that holds the data, or give --data_files"
    base = config.base_model
    if base.made_by and not os.path.exists(config.locate(base.path)):  # nothing of this configuration was made yet
        hint = f"this configuration's first step was not taken: {base.made_by}; else {hint}"
    raise DataError(f"no data file {', '.join(missing)} in {_roots(config)}; {hint}")


def local_files(source: SourceSpec, config: Config, data_files: Sequence[str | os.PathLike] = ()) -> list[Path]:
    """The files that `iter_rows` would read: the command line's, else the source's; [] stands for the Hub."""
    return [given_file(name, config) for name in data_files] or source_files(source, config)


def iter_rows(source: SourceSpec, config: Config, data_files: Sequence[str | os.PathLike] = ()) -> Iterator[dict]:
    """Rows of text from `data_files` if given, else from the source's local files if they exist, else from the Hub.

    A folder stands for the data files in it whose name begins with the source's split.

    Raises:
        DataError: a file is missing or damaged (the line is named), or the Hub cannot give the data set.
    """
    files = local_files(source, config, data_files)
    if files:
        for file in files:
            yield from read_rows(file, source.split)
    elif source.hub:
        yield from _hub_rows(source)
    else:
        raise DataError(f"{config.path}: a source names neither `files` nor `hub`; give --data_files")


def describe_source(source: SourceSpec, config: Config, data_files: Sequence[str | os.PathLike] = ()) -> str:
    """Where `iter_rows` would read from, for reports."""
    files = local_files(source, config, data_files)
    if files:
        return ", ".join(str(file) for file in files)
    parts = [source.hub, source.hub_config or source.hub_data_dir or "", source.split]
    return "Hub: " + " ".join(part for part in parts if part)


def read_rows(path: Path, split: str = "") -> Iterator[dict]:
    """The rows of one file (jsonl, json, csv, each plain or .gz; parquet), or of a folder's files of that split."""
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.startswith(split) and f.name.lower().endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: no data file in this folder has a name that begins with {split!r}")
        for file in files:
            yield from read_rows(file)
        return
    if not path.is_file():
        raise DataError(f"no data file {str(path)!r}")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from _jsonl_rows(path)
    elif name.endswith(".json"):
        yield from _json_rows(path)
    elif name.endswith(".csv"):
        yield from csv_rows(path)
    elif path.name.lower().endswith(".parquet"):
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path}: cannot read this kind of file; expected one of {', '.join(SUFFIXES)}")


@contextmanager
def _opened(path: Path):
    """A text file, plain or gzip. newline="" keeps the line ends inside quoted CSV cells."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield file


def _damage(error: Exception) -> str:
    """What a reading error means for the user."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error):
        return "not a gzip file, though its name ends in .gz"
    if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
        return "damaged or cut gzip file; fetch it again"
    return " ".join(str(error).split())


def _no_object(row: object) -> str:
    return f"expected an object with named columns, got {type(row).__name__}"


READ_ERRORS = (UnicodeDecodeError, EOFError, zlib.error, OSError)


def _jsonl_rows(path: Path) -> Iterator[dict]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({_damage(error)})") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: {_no_object(row)}")
                yield row
    except READ_ERRORS as error:
        raise DataError(f"{path}, after line {number}: {_damage(error)}") from None


def _json_rows(path: Path) -> Iterator[dict]:
    """A list of objects; the Hub also calls files of one object per line .json."""
    try:
        with _opened(path) as file:
            start = file.read(4096).lstrip()
            if not start.startswith("["):
                yield from _jsonl_rows(path)
                return
            file.seek(0)
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except READ_ERRORS as error:
        raise DataError(f"{path}: {_damage(error)}") from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, entry {index}: {_no_object(row)}")
        yield row


def csv_rows(path: Path) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole text
    reader = None
    try:
        with _opened(path) as file:
            reader = csv.DictReader(file, strict=True)
            if not reader.fieldnames:
                raise DataError(f"{path}: empty file; expected a first line with the names of the columns")
            for row in reader:
                if None in row:
                    columns = len(reader.fieldnames)
                    raise DataError(f"{path}, line {reader.line_num}: more than the {columns} cells of the first line")
                yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num if reader else 0}: not CSV ({_damage(error)})") from None
    except READ_ERRORS as error:
        raise DataError(f"{path}, after line {reader.reader.line_num if reader else 0}: {_damage(error)}") from None


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_damage(error)})") from None


def _hub_rows(source: SourceSpec) -> Iterator[dict]:
    """A data set of the Hub; one that is kept as a loading script is read from the Hub's own parquet copy of it."""
    import datasets

    def load(*args, **kwargs):
        return datasets.load_dataset(*args, **{name: value for name, value in kwargs.items() if value is not None})

    try:
        try:
            rows = load(source.hub, name=source.hub_config, data_dir=source.hub_data_dir, split=source.split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            folder = f"{source.hub_config or 'default'}/{source.split}"
            copy = f"hf://datasets/{source.hub}@refs%2Fconvert%2Fparquet/{folder}/*.parquet"
            rows = load("parquet", data_files=copy, split="train")
    except Exception as error:  # the libraries below raise a dozen kinds for "cannot be reached" and "does not exist"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(
            f"cannot load {source.hub} ({source.split}) from the Hub ({reason}); give local files with --data_files"
            + (f", or put {', '.join(source.files)} below $DATA_DIR" if source.files else "")
        ) from error
    yield from rows
