"""Prompts: the rules that turn rows of text into them, their files, and what the reference reads of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.cli import progress
from utils.errors import ConfigError, DataError, nearest
from utils.files import write_csv
from utils.places import prompts_command
from utils.rows import csv_rows
from utils.specs import Config, DatasetSpec, SourceSpec
from utils.text_formats import NO_COLUMN, RowDropped, format_of, prompt_hash, shown_to_reference

TOKENIZER_BATCH = 1000  # texts that are tokenized at a time


def in_hash_range(text: str, source: SourceSpec) -> bool:
    """Whether a prompt (or a user's text) belongs to this source's share of the prompts."""
    low, high = source.hash_range
    return low <= prompt_hash(text) < high


def tokenize_prompts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of what the reference reads, with the tokens that its tokenizer puts before a text, none after it."""
    if not texts:
        return []
    encoded = tokenizer(list(texts))["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer([""])["input_ids"][0][:1]) == [bos]:  # the template may begin with it too
        encoded = [ids[1:] if list(ids[:2]) == [bos, bos] else ids for ids in encoded]
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
    for index, row in enumerate(csv_rows(path)):
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
    if not name or not path.name.endswith("_deduped.csv"):
        return f"dataset_preprocess.py makes such files: {prompts_command('<data set>', 'test', config)}"
    return f"make it with: {prompts_command(name, split, config)}"


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
