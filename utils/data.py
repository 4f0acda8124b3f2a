"""Prompt files: rows of text from local files or the Hub, the rules that turn them into prompts, and reading them back.

Every mistake in a file ends in a `DataError` of one line that names the file and, where it has one, the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.cli import DataError, progress
from utils.config import Config, ConfigError, DatasetSpec, SourceSpec, nearest
from utils.files import write_csv
from utils.text_formats import NO_COLUMN, RowDropped, format_of, prompt_hash, shown_to_reference

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
TOKENIZER_BATCH = 1000  # texts that are tokenized at a time

# -------------------------------------------------------------------------------------------------------------- rows


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
        yield from _csv_rows(path)
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


def _csv_rows(path: Path) -> Iterator[dict]:
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


# ----------------------------------------------------------------------------------------------------------- prompts


def in_hash_range(text: str, source: SourceSpec) -> bool:
    """Whether a prompt (or a user's text) belongs to this source's share of the prompts."""
    low, high = source.hash_range
    return low <= prompt_hash(text) < high


def tokenize_prompts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of what the reference reads, with the tokens that its tokenizer puts before a text, none after it."""
    if not texts:
        return []
    encoded = tokenizer(list(texts))["input_ids"]
    eos, token = tokenizer.eos_token_id, tokenizer.eos_token
    if eos is None:
        return encoded

    def closed(ids, text):  # a tokenizer that closes each text would make every prompt a finished one
        return len(ids) and ids[-1] == eos and not text.endswith(token)

    return [ids[:-1] if closed(ids, text) else ids for ids, text in zip(encoded, texts, strict=True)]


def kept_rows(
    spec: DatasetSpec,
    rows: Iterable[dict],
    tokenizer,
    *,
    hash_range: tuple[float, float] = (0.0, 1.0),
    counts: dict[str, int] | None = None,
) -> Iterator[tuple[dict, str, list[int]]]:
    """The rows that pass the data set's rules, in order, as (row, prompt, token ids of what the reference reads).

    The rules (`DatasetSpec`): the row has a prompt in the format; its user's text lies between the character bounds
    (exclusive); its hash lies in `hash_range`; it is the first of its prompt; what the reference reads has from
    `min_prompt_tokens` to `max_prompt_tokens` tokens, both included.

    Args:
        counts: filled in place: "rows read", each reason that dropped a row, in the rules' order, then "kept".
    """
    counts = {} if counts is None else counts
    format_ = format_of(spec)
    low, high = hash_range
    seen: set[str] = set()
    pending: list[tuple[dict, str]] = []
    reasons = {
        "short": f"not more than {spec.min_post_chars} characters",
        "long": f"not fewer than {spec.max_post_chars} characters",
        "hash": "in another split's share",
        "duplicate": "duplicate prompt",
        "few": f"fewer than {spec.min_prompt_tokens} tokens",
        "many": f"more than {spec.max_prompt_tokens} tokens",
    }
    tally = {"rows read": 0, "format": {}, **dict.fromkeys(reasons, 0), "kept": 0}

    def flush():
        shown = [shown_to_reference(spec, prompt) for _, prompt in pending]
        for (row, prompt), ids in zip(pending, tokenize_prompts(tokenizer, shown), strict=True):
            if len(ids) < spec.min_prompt_tokens:
                tally["few"] += 1
            elif len(ids) > spec.max_prompt_tokens:
                tally["many"] += 1
            else:
                tally["kept"] += 1
                yield row, prompt, ids
        pending.clear()

    def report():
        counts.clear()
        counts["rows read"] = tally["rows read"]
        counts.update(sorted(tally["format"].items()))
        counts.update({text: tally[key] for key, text in reasons.items() if tally[key]})
        counts["kept"] = tally["kept"]

    try:
        for row in progress(rows, desc="rows", unit="row"):
            tally["rows read"] += 1
            try:
                prompt = format_.prompt_of_row(row)
            except RowDropped as dropped:
                if str(dropped) == NO_COLUMN and tally["rows read"] == 1:
                    raise DataError(
                        f"no usable column for the {spec.prompt_format!r} prompts of {spec.name}: the rows have "
                        f"{', '.join(repr(c) for c in row) or 'none'}; expected one of {', '.join(format_.columns)}"
                    ) from None
                tally["format"][str(dropped)] = tally["format"].get(str(dropped), 0) + 1
                continue
            length = len(format_.user_of_prompt(prompt))
            if spec.min_post_chars is not None and length <= spec.min_post_chars:
                tally["short"] += 1
            elif spec.max_post_chars is not None and length >= spec.max_post_chars:
                tally["long"] += 1
            elif not low <= prompt_hash(prompt) < high:
                tally["hash"] += 1
            elif prompt in seen:
                tally["duplicate"] += 1
            else:
                seen.add(prompt)
                pending.append((row, prompt))
                if len(pending) == TOKENIZER_BATCH:
                    yield from flush()
        yield from flush()
    finally:  # also where the reader has enough and stops early
        report()


def build_prompts(
    spec: DatasetSpec, rows: Iterable[dict], tokenizer, *, hash_range: tuple[float, float] = (0.0, 1.0)
) -> tuple[list[str], dict[str, int]]:
    """The prompts that a data set's rules keep, in the order of the rows, and how many rows each rule dropped.

    Returns:
        The prompts, and {"rows read": n, <reason>: n, ..., "kept": n} in the order of the rules (see `kept_rows`).

    Raises:
        DataError: nothing is kept, or the rows have no column that the format reads.
    """
    counts: dict[str, int] = {}
    prompts = [prompt for _, prompt, _ in kept_rows(spec, rows, tokenizer, hash_range=hash_range, counts=counts)]
    if not prompts:
        dropped = "; ".join(f"{n} {reason}" for reason, n in counts.items() if reason not in ("rows read", "kept"))
        raise DataError(
            f"no prompt of {spec.name} is left of {counts['rows read']} rows ({dropped or 'the source is empty'}); "
            f"check the data and the limits of datasets.{spec.name} in the configuration"
        )
    return prompts, counts


def prompts_csv(config: Config, spec: DatasetSpec, split: str) -> Path:
    """Where the prompts of a split lie: <workspace>/datasets/<data set>/<data set>_<split>_deduped.csv."""
    return config.default_path("datasets", spec.name, f"{spec.name}_{split}_deduped.csv")


def split_source(spec: DatasetSpec, split: str) -> SourceSpec:
    """The source of a split.

    Raises:
        ConfigError: the data set has no such split.
    """
    if split not in spec.splits:
        raise ConfigError(f"data set {spec.name} has no split {split!r}; {nearest(split, spec.splits)}")
    return spec.splits[split]


def write_prompts(path: str | os.PathLike, prompts: Sequence[str]) -> None:
    """Write a CSV with the one column `prompt`; the file appears whole or not at all."""
    write_csv(Path(path), [{"prompt": prompt} for prompt in prompts], ["prompt"])


def read_prompts(path: str | os.PathLike, config: Config | None = None) -> list[str]:
    """The prompts of a CSV, in order; a prompt's index is its place in this list.

    Args:
        config: named in the command that a missing file's message gives.

    Raises:
        DataError: no such file, no column `prompt`, no row, or an empty prompt (its line is named).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no prompts in {path}: {_made_by(path, config)}")
    prompts = []
    for index, row in enumerate(_csv_rows(path)):
        if "prompt" not in row:
            raise DataError(f"{path}: no column 'prompt'; the columns are {', '.join(repr(c) for c in row)}")
        if not (row["prompt"] or "").strip():
            raise DataError(f"{path}: prompt {index} is empty; {_made_by(path, config)}")
        prompts.append(row["prompt"])
    if not prompts:
        raise DataError(f"{path}: no prompt in this file; {_made_by(path, config)}")
    return prompts


def _made_by(path: Path, config: Config | None) -> str:
    """The command that makes a prompts file, from its name."""
    name, _, split = path.name.removesuffix("_deduped.csv").rpartition("_")
    option = f" --config {config.path}" if config is not None else ""
    if not name or not path.name.endswith("_deduped.csv"):
        return f"dataset_preprocess.py makes such files: python dataset_preprocess.py <data set> --split test{option}"
    return f"make it with: python dataset_preprocess.py {name} --split {split}{option}"


def encode_prompts(
    spec: DatasetSpec, tokenizer, prompts: Sequence[str], max_context: int | None = None
) -> list[list[int]]:
    """Token ids of what the reference reads for each prompt.

    Args:
        max_context: the most tokens that a prompt may have (the model's context less what it is to write); None: any.

    Raises:
        DataError: a prompt is empty or too long; its index is named.
    """
    format_ = format_of(spec)
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not format_.user_of_prompt(prompt):
            raise DataError(f"prompt {index} is empty: {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise DataError(f"prompt {index} is not valid Unicode: {ascii(prompt)[:200]}") from None
    encoded = tokenize_prompts(tokenizer, [shown_to_reference(spec, prompt) for prompt in prompts])
    for index, ids in enumerate(encoded):
        if not len(ids):
            raise DataError(f"prompt {index} is empty once it is tokenized: {prompts[index]!r}")
        if max_context is not None and len(ids) > max_context:
            raise DataError(
                f"prompt {index} has {len(ids)} tokens and at most {max_context} fit the model's context "
                f"beside what it is to write; shorten it: {prompts[index][:60]!r}..."
            )
    return [list(ids) for ids in encoded]
