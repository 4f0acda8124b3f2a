"""Trees on disk: tokens in HDF5, structure and values in JSON; atomic, resumable, mergeable, nothing pickled.

A data folder holds

    collection.json            what the trees were made with; a folder made with other arguments is refused
    all_tokens.hdf5            one group per prompt, `prompt<i>`: `tokens` (flat int32) and `offsets` (N + 1)
    prompt<i>_tree.json        structure, log-ratios and, once labelled, values (after the split: in train/ or val/)
    parts/prompt<i>.npy        tokens of trees that are not yet in all_tokens.hdf5 (only while data is collected)

A tree's tokens are on disk before its JSON file, whose presence means that the tree is complete. HDF5 files cannot be
appended to safely, so they are only ever replaced whole: `consolidate` writes a new one and renames it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from utils.cli import DataError
from utils.files import temporary_name, write_atomically
from utils.trees import Tree, check_tree, expected_log_ratio

TOKENS = "all_tokens.hdf5"
FORMAT = 1


# -------------------------------------------------------------------------------------------------------------- writing


def claim_collection(data_dir: Path, arguments: dict, *, only_check: bool = False) -> None:
    """Record what a folder's trees are made with (unless `only_check`), or check that it is the same.

    Raises:
        DataError: the folder was made with other arguments.
    """
    path = data_dir / "collection.json"
    if path.exists():
        known = _read_json(path)
        for key in sorted(set(known) | set(arguments)):
            if known.get(key) != arguments.get(key):
                raise DataError(
                    f"{data_dir} was made with {key}={known.get(key)!r}, this command has {arguments.get(key)!r}; "
                    "give another --output_dir or the same arguments"
                )
        return
    if not only_check:
        write_atomically(path, json.dumps(arguments, indent=1, sort_keys=True) + "\n")


def write_tree(data_dir: Path, tree: Tree) -> None:
    """Store one new tree: its tokens first, then the JSON file that marks it complete."""
    check_tree(tree)
    flat, offsets = _flatten(tree.tokens)
    part = data_dir / "parts" / f"prompt{tree.prompt_index}.npy"
    write_atomically(part, _npy(np.concatenate([[len(offsets)], offsets, flat]).astype(np.int64)))
    write_structure(data_dir / f"prompt{tree.prompt_index}_tree.json", tree)


def write_structure(path: Path, tree: Tree) -> None:
    """Write a tree's JSON file: everything but its tokens."""
    record = {
        "format": FORMAT,
        "prompt_index": tree.prompt_index,
        "prompt": tree.prompt,
        "parent": tree.parent.tolist(),
        "log_ratio": tree.log_ratio.tolist(),
        "finished": None if tree.finished is None else tree.finished.tolist(),
        "values": {name: values.tolist() for name, values in sorted(tree.values.items())},
    }
    if tree.soft:
        expected = expected_log_ratio(tree.parent, tree.log_ratio, tree.soft)
        record["expected_log_ratio"] = {"mode": tree.soft, "nodes": expected.tolist()}
    write_atomically(path, json.dumps(record, ensure_ascii=False) + "\n")


def write_discarded(data_dir: Path, prompt_index: int, prompt: str, reason: str) -> None:
    """Record that a prompt has no tree, and why, so that it is neither tried again nor missed in silence."""
    record = {"format": FORMAT, "prompt_index": prompt_index, "prompt": prompt, "discarded": reason}
    write_atomically(data_dir / f"prompt{prompt_index}_tree.json", json.dumps(record, ensure_ascii=False) + "\n")


def consolidate(data_dir: Path) -> int:
    """Move the tokens in `parts/` into all_tokens.hdf5, in the order of the prompts; returns how many trees it holds.

    Several processes may fill one folder: a lock lets one at a time replace the file, and a part whose tree has no
    JSON file yet (another process is writing it, or was killed) stays where it is.
    """
    data_dir, target = Path(data_dir), Path(data_dir) / TOKENS
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        parts = {int(p.stem[6:]): p for p in (data_dir / "parts").glob("prompt*.npy")}
        parts = {i: p for i, p in parts.items() if tree_path(data_dir, i) is not None}
        if parts:
            _rewrite(target, parts)
        for part in parts.values():
            part.unlink()
        if (data_dir / "parts").is_dir() and not any((data_dir / "parts").iterdir()):
            (data_dir / "parts").rmdir()
    if not target.exists():
        return 0
    with _open(target) as file:
        return len([_index_of(name, target) for name in file])


def _rewrite(target: Path, parts: dict[int, Path]) -> None:
    """Replace the token store by one that also holds `parts`."""
    temporary = temporary_name(target)
    try:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(h5py.File(temporary, "w"))
            old = stack.enter_context(_open(target)) if target.exists() else {}
            for index in sorted({_index_of(name, target) for name in old} | set(parts)):
                if index in parts:
                    offsets, flat = _read_part(parts[index])
                else:  # written anew, not copied: the file's bytes then do not tell how often it was interrupted
                    offsets, flat = _read_entry(old, index, target)
                _store(out, index, flat, offsets)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _store(file: h5py.File, index: int, flat: np.ndarray, offsets: np.ndarray) -> None:
    group = file.create_group(f"prompt{index}")
    group.create_dataset("tokens", data=flat.astype(np.int32))
    group.create_dataset("offsets", data=offsets.astype(np.int64))


def _flatten(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64)
    return np.concatenate(tokens).astype(np.int32), offsets


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- reading


def tree_path(data_dir: str | Path, prompt_index: int) -> Path | None:
    """Where a prompt's JSON file lies (the folder itself, train/ or val/), or None."""
    for folder in (Path(data_dir), Path(data_dir) / "train", Path(data_dir) / "val"):
        path = folder / f"prompt{prompt_index}_tree.json"
        if path.is_file():
            return path
    return None


def stored_indices(data_dir: str | Path, split: str = "all") -> list[int]:
    """Prompts with a JSON file, discarded ones included; split is "all", "train" or "val"."""
    folders = {"all": ("", "train", "val"), "train": ("train",), "val": ("val",)}[split]
    found = set()
    for folder in folders:
        for path in (Path(data_dir) / folder).glob("prompt*_tree.json"):
            digits = path.name[len("prompt") : -len("_tree.json")]
            if digits.isdigit():
                found.add(int(digits))
    return sorted(found)


def tree_indices(data_dir: str | Path, split: str = "all") -> list[int]:
    """Prompts that have a tree, in order."""
    return [i for i in stored_indices(data_dir, split) if "discarded" not in _read_json(tree_path(data_dir, i))]


def value_names(data_dir: str | Path, prompt_index: int) -> set[str]:
    """The objectives that a prompt's tree has values of, without reading the tree."""
    return set(_read_json(tree_path(data_dir, prompt_index)).get("values", {}))


def read_tree(data_dir: str | Path, prompt_index: int) -> Tree:
    """One prompt's tree.

    Raises:
        DataError: no such tree, or files that are corrupt, truncated, foreign or of two different trees.
    """
    path = tree_path(data_dir, prompt_index)
    if path is None:
        raise DataError(f"no tree of prompt {prompt_index} in {data_dir}; make it with get_data_base.py")
    record = _read_json(path)
    if record.get("format") != FORMAT or "prompt_index" not in record:
        raise DataError(f"{path} is not a tree of this project (format {record.get('format')!r}, expected {FORMAT})")
    if "discarded" in record:
        raise DataError(f"prompt {prompt_index} in {data_dir} has no tree: {record['discarded']}")
    try:
        finished = record["finished"]
        tree = Tree(
            parent=np.array(record["parent"], np.int64),
            tokens=_read_tokens(Path(data_dir), prompt_index),
            log_ratio=np.array(record["log_ratio"], np.float64),
            values={name: np.array(v, np.float64) for name, v in record["values"].items()},
            prompt=str(record["prompt"]),
            prompt_index=prompt_index,
            finished=None if finished is None else np.array(finished, bool),
            soft=record["expected_log_ratio"]["mode"] if "expected_log_ratio" in record else None,
        )
        check_tree(tree)
        if tree.soft:
            expected = expected_log_ratio(tree.parent, tree.log_ratio, tree.soft)
            if not np.allclose(expected, record["expected_log_ratio"]["nodes"], atol=1e-9):
                raise ValueError("the expected log-ratios are not those of the nodes' log-ratios")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} and {TOKENS} do not hold one sound tree: {' '.join(str(error).split())}") from error
    return tree


def read_trees(data_dir: str | Path, split: str = "all") -> Iterator[Tree]:
    """All trees of a folder, in the order of the prompts; split is "all", "train" or "val"."""
    for index in tree_indices(data_dir, split):
        yield read_tree(data_dir, index)


def _read_tokens(data_dir: Path, index: int) -> list[np.ndarray]:
    part = data_dir / "parts" / f"prompt{index}.npy"
    if part.is_file():
        offsets, flat = _read_part(part)
    else:
        with _open(data_dir / TOKENS) as file:
            if f"prompt{index}" not in file:
                raise DataError(f"{data_dir / TOKENS} has no entry prompt{index}")
            offsets, flat = _read_entry(file, index, data_dir / TOKENS)
    if (
        offsets.ndim != 1
        or flat.ndim != 1
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != len(flat)
        or (np.diff(offsets) < 0).any()
    ):
        place = part if part.is_file() else data_dir / TOKENS
        raise DataError(
            f"{place}: the tokens of prompt {index} are corrupt: offsets do not fit their {flat.size} tokens"
        )
    return [flat[a:b].astype(np.int32) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def _index_of(name: str, path: Path) -> int:
    """The prompt of an entry of a token store."""
    number = name.removeprefix("prompt")
    if name == number or not number.isdecimal():
        raise DataError(f"{path} has an entry {name!r}, so it is no token store of this project; move it away")
    return int(number)


def _read_entry(file: h5py.File, index: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and tokens of one prompt in an open token store."""
    try:
        group = file[f"prompt{index}"]
        return group["offsets"][:], group["tokens"][:]
    except (KeyError, OSError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: entry prompt{index} is corrupt or foreign ({error})") from error


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        stored = np.load(path, allow_pickle=False)
        count = int(stored[0])
    except (ValueError, OSError, EOFError, IndexError, TypeError) as error:
        raise DataError(
            f"{path} is corrupt ({error}); delete it and its tree's JSON file, and collect again"
        ) from error
    return stored[1 : 1 + count], stored[1 + count :]


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"no {path}; collect trees with get_data_base.py, or name the folder that holds them") from None
    except OSError as error:
        raise DataError(
            f"{path} is no readable HDF5 file ({' '.join(str(error).split())}); it may be truncated"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is no readable JSON file ({error}); delete it and make it again") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return record


# -------------------------------------------------------------------------------------------------------------- merging


def merge_hdf5_files(input_files: Sequence[str | Path], output_file: str | Path) -> int:
    """Merge token stores into one, in the order of the prompts; returns how many entries it holds.

    An entry that is in several inputs must be the same in all.

    Raises:
        DataError: two different trees of one name, or an unreadable input; nothing is written then.
    """
    sources: dict[str, Path] = {}
    for path in map(Path, input_files):
        with _open(path) as file:
            for name in file:
                index = _index_of(name, path)
                entry = _read_entry(file, index, path)
                if name in sources:
                    with _open(sources[name]) as other:
                        theirs = _read_entry(other, index, sources[name])
                    if not all(map(np.array_equal, entry, theirs)):
                        raise DataError(
                            f"{path} and {sources[name]} hold two different trees named {name}; nothing was merged"
                        )
                sources.setdefault(name, path)
    output = Path(output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(output)
    try:
        with h5py.File(temporary, "w") as out:
            for name in sorted(sources, key=lambda n: (len(n), n)):
                with _open(sources[name]) as file:
                    file.copy(name, out)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return len(sources)


def split_folder(data_dir: str | Path, output_dir: str | Path, num_val: int) -> tuple[int, int]:
    """Copy a folder of trees into the layout of training: the first `num_val` prompts to val/, the rest to train/.

    Returns:
        how many trees are in train/ and in val/.

    Raises:
        DataError: no trees, or none left for training.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    indices = stored_indices(data_dir)
    trees = set(tree_indices(data_dir))
    val = [i for i in indices[:num_val] if i in trees]
    train = [i for i in indices[num_val:] if i in trees]
    if not trees:
        raise DataError(f"no trees in {data_dir}; make them with get_data_base.py")
    if not train or not val:
        raise DataError(
            f"{data_dir} has {len(indices)} prompts; with the first {num_val} for validation, {len(val)} trees are for "
            f"validation and {len(train)} for training; collect more, or give another --num_val"
        )
    consolidate(data_dir)
    for index in (*val, *train):  # a damaged tree is refused before anything is copied
        read_tree(data_dir, index)
    write_atomically(output_dir / TOKENS, (data_dir / TOKENS).read_bytes())
    for name, other, chosen in (("val", "train", val), ("train", "val", train)):
        for index in chosen:
            file = f"prompt{index}_tree.json"
            write_atomically(output_dir / name / file, tree_path(data_dir, index).read_bytes())
            (output_dir / other / file).unlink(missing_ok=True)  # of an earlier split with another num_val
    return len(train), len(val)
