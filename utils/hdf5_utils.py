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

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import h5py
import numpy as np

from utils.errors import DataError
from utils.files import locked, npy, read_npy, write_atomically
from utils.trees import Tree, check_tree, expected_log_ratio

TOKENS = "all_tokens.hdf5"
LOCK = ".lock"  # held while what several processes write is read and replaced
FORMAT = 1
CHECKSUM = "checksum"  # not in the files of earlier versions, which are read without it
KEYS = {"format", "prompt_index", "prompt", "parent", "log_ratio", "finished", "values", "expected_log_ratio", CHECKSUM}


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
    write_atomically(part, npy(np.concatenate([[len(offsets)], offsets, flat]).astype(np.int64)))
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
    record[CHECKSUM] = _checksum(record, tree.tokens)
    write_atomically(path, json.dumps(record, ensure_ascii=False) + "\n")


def update_tree(data_dir: str | Path, prompt_index: int, change: Callable[[Tree], Tree]) -> Tree:
    """Write what `change` makes of a stored tree (all but its tokens), and return it.

    It is read anew and written under the folder's lock, so that what another process labels at the same time stays.
    """
    with locked(Path(data_dir) / LOCK):
        tree = change(read_tree(data_dir, prompt_index))
        write_structure(tree_path(data_dir, prompt_index), tree)
    return tree


def _checksum(record: Mapping, tokens: Sequence[np.ndarray]) -> str:
    """Of a tree's JSON record, without the checksum itself, and its tokens: a damaged byte in either file shows."""
    flat, offsets = _flatten(tokens)
    plain = {key: value for key, value in record.items() if key != CHECKSUM}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    digest.update(offsets.astype("<i8").tobytes() + flat.astype("<i4").tobytes())
    return digest.hexdigest()


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
    with locked(data_dir / LOCK):
        parts = {int(p.stem[6:]): p for p in (data_dir / "parts").glob("prompt*.npy")}
        parts = {i: p for i, p in parts.items() if tree_path(data_dir, i) is not None}
        if parts:
            _rewrite(target, parts)
        for part in parts.values():
            part.unlink()
        with suppress(OSError):  # not there, or not empty: another process is writing a tree
            (data_dir / "parts").rmdir()
    if not target.exists():
        return 0
    with _open(target) as file:
        return len(_indices_of(file, target))


def _rewrite(target: Path, parts: dict[int, Path]) -> None:
    """Replace the token store by one that also holds `parts`."""
    with _open(target) if target.exists() else nullcontext({}) as old:
        entries = {
            # The old ones are written anew, not copied: the file's bytes then do not tell how often it was interrupted.
            index: _read_part(parts[index]) if index in parts else _read_entry(old, index, target)
            for index in sorted(_indices_of(old, target) | set(parts))
        }
    _write_store(target, entries)


def _write_store(path: Path, entries: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a token store atomically: {prompt: (offsets, tokens)}, in the order of the prompts.

    It is made in memory (some ten megabytes for thousands of trees), so that a full disk is an ordinary error.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for index in sorted(entries):
            offsets, flat = entries[index]
            group = file.create_group(f"prompt{index}")
            group.create_dataset("tokens", data=flat.astype(np.int32))
            group.create_dataset("offsets", data=offsets.astype(np.int64))
    write_atomically(path, buffer.getvalue())


def _flatten(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64)
    return np.concatenate(tokens).astype(np.int32), offsets


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
        if unknown := set(record) - KEYS:
            raise ValueError(f"unknown entries {', '.join(sorted(unknown))} in the JSON file")
        if record["prompt_index"] != prompt_index:
            raise ValueError(f"the JSON file is that of prompt {record['prompt_index']}")
        if tree.soft:
            expected = expected_log_ratio(tree.parent, tree.log_ratio, tree.soft)
            if not np.allclose(expected, record["expected_log_ratio"]["nodes"], atol=1e-9):
                raise ValueError("the expected log-ratios are not those of the nodes' log-ratios")
        if CHECKSUM in record and record[CHECKSUM] != _checksum(record, tree.tokens):
            raise ValueError("their checksum is not the one that was written; delete the JSON file and collect again")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} and {TOKENS} do not hold one sound tree: {' '.join(str(error).split())}") from error
    return tree


def read_trees(data_dir: str | Path, split: str = "all") -> Iterator[Tree]:
    """All trees of a folder, in the order of the prompts; split is "all", "train" or "val"."""
    for index in tree_indices(data_dir, split):
        yield read_tree(data_dir, index)


def _read_tokens(data_dir: Path, index: int) -> list[np.ndarray]:
    place = data_dir / "parts" / f"prompt{index}.npy"
    try:
        offsets, flat = _read_part(place)
    except FileNotFoundError:  # not there, or moved into the store just now
        place = data_dir / TOKENS
        with _open(data_dir / TOKENS) as file:
            offsets, flat = _read_entry(file, index, place)
    if (
        offsets.ndim != 1
        or flat.ndim != 1
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != len(flat)
        or (np.diff(offsets) < 0).any()
    ):
        raise DataError(
            f"{place}: the tokens of prompt {index} are corrupt: offsets do not fit their {flat.size} tokens"
        )
    return [flat[a:b].astype(np.int32) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def _indices_of(file: h5py.File | Mapping, path: Path) -> set[int]:
    """The prompts of an open token store."""
    try:
        names = list(file)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is a damaged HDF5 file ({' '.join(str(error).split())})") from error
    return {_index_of(name, path) for name in names}


def _index_of(name: str, path: Path) -> int:
    """The prompt of an entry of a token store."""
    number = name.removeprefix("prompt")
    if name == number or not number.isdecimal():
        raise DataError(f"{path} has an entry {name!r}, so it is no token store of this project; move it away")
    return int(number)


def _read_entry(file: h5py.File, index: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and tokens of one prompt in an open token store."""
    name = f"prompt{index}"
    try:
        if name not in file:
            raise DataError(f"{path} has no entry {name}")
        group = file[name]
        return group["offsets"][:], group["tokens"][:]
    except DataError:
        raise
    except (KeyError, OSError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: entry prompt{index} is corrupt or foreign ({error})") from error


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        stored = read_npy(path)
        count = int(stored[0])
    except FileNotFoundError:
        raise
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
    except (ValueError, OSError, RecursionError) as error:
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
    entries: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    sources: dict[int, Path] = {}
    for path in map(Path, input_files):
        with _open(path) as file:
            for index in sorted(_indices_of(file, path)):
                entry = _read_entry(file, index, path)
                if index in entries and not all(map(np.array_equal, entry, entries[index])):
                    raise DataError(
                        f"{path} and {sources[index]} hold two different trees named prompt{index}; nothing was merged"
                    )
                entries[index] = entry
                sources[index] = path
    _write_store(Path(output_file), entries)
    return len(entries)


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
