"""Token tables: how much of a reward a context-free value of each token explains, and the control that steers by it.

A table is a ridge regression of a leaf's reward on the counts of its response's tokens, both centred within the
prompt: what is left is what decoding can steer. A method that is worth its value models must beat it at equal KL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import DataError
from utils.files import same_header, write_atomically
from utils.fit_measures import explained_variance, fit_report
from utils.tree_examples import validation_nodes
from utils.trees import Tree

L2_GRID = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
CHECKSUM = "sha256"  # of the table, in the file's header; not in what earlier versions wrote
HOLDOUT = 5  # every fifth prompt chooses the penalty


@dataclass(frozen=True)
class Leaves:
    """Nodes of some trees, the leaves if nothing else is said: token counts (N, V) sparse of the response up to each,
    rewards (N,) and the tree (N,) that each belongs to."""

    counts: object
    rewards: np.ndarray
    tree: np.ndarray

    def subset(self, keep: np.ndarray) -> Leaves:
        rows = np.flatnonzero(keep)
        return Leaves(self.counts[rows], self.rewards[rows], np.unique(self.tree[rows], return_inverse=True)[1])

    def centre(self, values: np.ndarray) -> np.ndarray:
        """Values (N,) less the mean of their tree."""
        size = np.bincount(self.tree)
        return values - (np.bincount(self.tree, values) / size)[self.tree]


def collect_leaves(
    trees: Iterable[Tree],
    objective: str,
    vocab_size: int,
    nodes: Callable[[Tree], Sequence[int]] = lambda tree: tree.leaves,
) -> Leaves:
    """The leaves of labelled trees, or other nodes with their values.

    Raises:
        DataError: a tree without the objective's values, or a token outside the vocabulary.
    """
    from scipy.sparse import csr_matrix

    columns, starts, rewards, member = [], [0], [], []
    for number, tree in enumerate(trees):
        if objective not in tree.values:
            raise DataError(
                f"the tree of prompt {tree.prompt_index} has no values of {objective}; label it with label_tree.py"
            )
        for leaf in nodes(tree):
            tokens = np.asarray(tree.response_tokens(leaf), np.int64)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise DataError(
                    f"the tree of prompt {tree.prompt_index} has token {tokens.max()}, outside a vocabulary of "
                    f"{vocab_size}; its trees were made with another reference"
                )
            columns.append(tokens)
            starts.append(starts[-1] + len(tokens))
            rewards.append(tree.values[objective][leaf])
            member.append(number)
    if not rewards:
        raise DataError("no trees to fit a token table on")
    flat = np.concatenate(columns)
    counts = csr_matrix((np.ones(len(flat)), flat, np.array(starts)), shape=(len(rewards), vocab_size))
    counts.sum_duplicates()
    return Leaves(counts, np.array(rewards, np.float64), np.array(member, np.int64))


def solve_ridge(leaves: Leaves, l2: float) -> np.ndarray:
    """The table (V,) that minimises  sum (centred reward - centred counts . w)^2 + l2 |w|^2, by conjugate gradients."""
    from scipy.sparse.linalg import LinearOperator, cg

    used = np.unique(leaves.counts.indices)
    x = leaves.counts[:, used]
    y = leaves.centre(leaves.rewards)

    def normal(w):
        return x.T @ leaves.centre(x @ w) + l2 * w

    solution, status = cg(
        LinearOperator((len(used), len(used)), matvec=normal, dtype=np.float64), x.T @ y, rtol=1e-8, maxiter=5000
    )
    assert status == 0, f"conjugate gradients did not converge: {status}"
    table = np.zeros(leaves.counts.shape[1])
    table[used] = solution
    return table


def explained_within(leaves: Leaves, table: np.ndarray) -> float:
    """R^2 within the prompt: the share of the leaves' variance there that the table predicts (nan: none to predict)."""
    return explained_variance(leaves.rewards, leaves.counts @ table, leaves.tree)


def choose_l2(leaves: Leaves, grid: Sequence[float] = L2_GRID) -> float:
    """The penalty that explains most within held-out prompts; the largest where there are too few prompts to tell."""
    held = leaves.tree % HOLDOUT == HOLDOUT - 1
    if not held.any():
        return float(grid[-1])
    inside, outside = leaves.subset(~held), leaves.subset(held)
    scores = [explained_within(outside, solve_ridge(inside, l2)) for l2 in grid]
    return float(grid[int(np.nanargmax(scores))]) if np.isfinite(scores).any() else float(grid[-1])


def fit_token_table(
    trees: Iterable[Tree], objective: str, vocab_size: int, l2: float | None = None
) -> tuple[np.ndarray, float]:
    """(table (V,) float64, the penalty used); None has it chosen by held-out prompts. Tokens never seen get 0."""
    leaves = collect_leaves(trees, objective, vocab_size)
    l2 = choose_l2(leaves) if l2 is None else l2
    return solve_ridge(leaves, l2), l2


def split_trees(data_dir: str | Path) -> tuple[list[Tree], list[Tree]]:
    """(trees to fit, held-out trees): train/ and val/, or, where the folder is not split, every fifth is held out."""
    from utils.hdf5_utils import read_trees

    train, val = list(read_trees(data_dir, "train")), list(read_trees(data_dir, "val"))
    if not train or not val:
        trees = list(read_trees(data_dir))
        train, val = [t for i, t in enumerate(trees) if i % HOLDOUT], trees[::HOLDOUT]
    if not train or not val:
        raise DataError(
            f"{len(train) + len(val)} trees in {data_dir}: a token table needs at least 2, one of them held out"
        )
    return train, val


def fit_and_report(
    train: Sequence[Tree], val: Sequence[Tree], objective: str, vocab_size: int, l2: float | None = None
) -> tuple[np.ndarray, dict]:
    """A table (V,) and what it explains within the prompts of `val`: of the leaves' rewards, which it was fitted to,
    and of the values of inner nodes, at which value models are measured too."""
    table, l2 = fit_token_table(train, objective, vocab_size, l2)
    leaves = collect_leaves(val, objective, vocab_size)
    report = {"objective": objective, "train_trees": len(train), "val_trees": len(val), "l2": l2}
    report["leaves"] = fit_report(leaves.rewards, leaves.counts @ table, leaves.tree)
    if any(len(validation_nodes(tree)) for tree in val):
        inner = collect_leaves(val, objective, vocab_size, validation_nodes)
        report["inner_nodes"] = fit_report(inner.rewards, inner.counts @ table, inner.tree)
    return table, report


# --------------------------------------------------------------------------------------------------------------- files


def save_token_table(path: str | Path, table: np.ndarray, report: Mapping | None = None) -> None:
    """One table as safetensors with its report in the header, written whole or not at all."""
    from safetensors.numpy import save

    data = np.asarray(table, np.float32)
    metadata = {"report": json.dumps(report or {}), CHECKSUM: hashlib.sha256(data.tobytes()).hexdigest()}
    write_atomically(Path(path), same_header(save({"table": data}, metadata=metadata)))


def load_token_table(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """The table (V,) float32 of a file.

    Raises:
        DataError: no such table, or one of another vocabulary.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"no token table {path}; make it with: python fit_token_table.py DATA_DIR {path.stem} "
            f"--output_dir {path.parent}"
        )
    try:
        with safe_open(str(path), "numpy") as file:
            table, checksum = file.get_tensor("table"), (file.metadata() or {}).get(CHECKSUM)
        if checksum not in (None, hashlib.sha256(table.tobytes()).hexdigest()):
            raise ValueError("its checksum is not the one that was written")
    except (SafetensorError, KeyError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no token table ({type(error).__name__}: {error})") from error
    if table.ndim != 1 or not np.isfinite(table).all():
        raise DataError(f"{path} is no token table: expected a vector of finite numbers, got shape {table.shape}")
    if vocab_size is not None and len(table) != vocab_size:
        raise DataError(
            f"{path} has {len(table)} tokens, the reference has {vocab_size}; fit it on trees of this reference"
        )
    return table


def load_token_tables(
    folder: str | Path, objectives: Sequence[str], vocab_size: int | None = None
) -> dict[str, np.ndarray]:
    """{objective: table (V,) float32} of <folder>/<objective>.safetensors."""
    return {name: load_token_table(Path(folder) / f"{name}.safetensors", vocab_size) for name in objectives}


# ------------------------------------------------------------------------------------ the control that reads a prompt


def inverse_document_frequency(token_lists: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """log(texts / texts with the token), (V,); tokens in no text count as in one."""
    seen = np.zeros(vocab_size)
    for tokens in token_lists:
        seen[np.unique(np.asarray(tokens, np.int64))] += 1
    return np.log(max(1, len(token_lists)) / np.maximum(seen, 1))


def prompt_words_table(user: str, tokenizer, idf: np.ndarray) -> np.ndarray:
    """The table (V,) of one prompt's own words: a token of the user's text is worth its idf, with or without a space
    before it and whatever its case, and every other token nothing. No learning: what "reading the prompt" is worth
    before any value model does it."""
    table = np.zeros_like(idf)
    for word in user.split():
        bare = word.strip(".,;:!?\"'()")
        for form in {f for w in (word, bare, bare.lower(), bare.capitalize()) if w for f in (w, " " + w)}:
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            table[ids] = idf[ids]
    return table


def prompt_words(spec, texts: Sequence[str], tokenizer, vocab_size: int):
    """The function from a prompt's token ids to its table of own words, with idf from `texts` (prompts of a data set).

    The words of the data set's template are nobody's own.
    """
    from utils.data import encode_prompts

    idf = inverse_document_frequency(encode_prompts(spec, tokenizer, list(texts)), vocab_size)
    frame = spec.reference_template.replace("{user}", " ").replace("{prompt}", " ")
    common = set(tokenizer.decode(tokenizer(frame)["input_ids"], skip_special_tokens=True).split())

    def table_of(prompt: Sequence[int]) -> np.ndarray:
        words = tokenizer.decode(list(prompt), skip_special_tokens=True).split()
        return prompt_words_table(" ".join(w for w in words if w not in common), tokenizer, idf)

    return table_of
