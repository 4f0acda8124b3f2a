"""Value regression on trees: the scalar head's output at a node's last token is fitted to the node's value.

The value of a node is `score(hidden state at the last token of the path root..node)`, its target the mean reward of
the leaves below it (minus what the policy's log-ratio costs), the loss the mean squared error over nodes. Two ways to
read the nodes give the same loss and the same gradients:

- `node`, as published: one right-padded path per node;
- `tree`: a tree's tokens once, in preorder, each token seeing its own path only. A tree of 28 nodes has about a
  quarter of its paths' tokens.

Both are one `Layout`: a set of nodes of one tree that is read in one row. A path is a layout with one node in it.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save

from utils.cli import DataError, progress
from utils.config import TrainingSpec
from utils.files import hold, put_in_place, write_atomically, write_csv, write_json
from utils.places import ADAPTER, record_checksum
from utils.policies import pools_mean, without_adapter
from utils.prefix_tree import tree_mask
from utils.trees import Tree, expected_log_ratio

EVALUATIONS_PER_EPOCH = 10
# Penalties that `start_at_ridge` chooses from; the largest leave a head that is there nearly as it is.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
BETWEEN = 0.1  # what a prompt's mean counts there
VALIDATION_SHARE = 0.2  # of the training's cost, at most, however many validation trees there are
TOKENS_PER_PASS = 8192  # padded tokens of one forward pass; a step that has more is done in several
LOG_COLUMNS = ("step", "epoch", "nodes", "lr", "train_loss", "val_loss", "grad_norm", "seconds")


# ------------------------------------------------------------------------------------------------- measures of a fit


def _centred(x, groups) -> np.ndarray:
    """(N,) minus the mean of its group; without groups, minus the mean."""
    x = np.asarray(x, np.float64)
    if groups is None:
        return x - x.mean()
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    return x - (np.bincount(group, weights=x) / np.bincount(group))[group]


def explained_variance(targets, predictions, groups=None) -> float:
    """The share of the targets' variance that the predictions explain: 1 is perfect, 0 is what a constant reaches.

    Args:
        targets, predictions: (N,)
        groups: (N,) labels; target and prediction are then centred within each group, so that only what is explained
            *within* a group counts. None: one group.

    Returns:
        1 - var(target - prediction) / var(target); nan where the targets do not vary.
    """
    targets, predictions = np.asarray(targets, np.float64), np.asarray(predictions, np.float64)
    if targets.size == 0:
        return math.nan
    total = np.square(_centred(targets, groups)).sum()
    rest = np.square(_centred(targets - predictions, groups)).sum()
    return float(1.0 - rest / total) if total > 1e-12 * max(1.0, np.square(targets).sum()) else math.nan


def correlation(targets, predictions, groups=None) -> float:
    """Pearson correlation of targets and predictions (N,), centred within each group; nan where one is constant."""
    if np.size(targets) == 0:
        return math.nan
    t, p = _centred(targets, groups), _centred(predictions, groups)
    scale = math.sqrt(np.square(t).sum() * np.square(p).sum())
    return float((t * p).sum() / scale) if scale > 1e-12 else math.nan


def target_noise(tree: Tree, targets, nodes) -> np.ndarray:
    """(n,) sampling variance of inner nodes' targets, each the mean of c children's: var(children) / c.

    nan for fewer than two children, and where the target is not the children's mean (a soft value's is not).
    """
    targets, noise = np.asarray(targets, np.float64), np.full(len(nodes), math.nan)
    for i, node in enumerate(nodes):
        below = targets[tree.children(node)]
        if len(below) > 1 and math.isclose(below.mean(), targets[node], rel_tol=1e-6, abs_tol=1e-9):
            noise[i] = below.var(ddof=1) / len(below)
    return noise


def explainable_variance(targets, noise, groups) -> float:
    """The explained variance within groups that a model would reach that knew every target but for its noise.

    Args:
        targets, groups: (N,), see `explained_variance`.
        noise: (N,) variance of each target's error (`target_noise`). The errors are taken as independent, as they are
            among the nodes of one depth; nan if any is unknown.
    """
    _, group, size = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    total = np.square(_centred(targets, groups)).sum()
    return float(1.0 - (noise * (1 - 1 / size[group])).sum() / total) if total > 1e-12 else math.nan


def fit_report(targets, predictions, groups, noise=None) -> dict[str, float]:
    """The measures of metrics.json on some nodes: (N,) each."""
    targets, predictions = np.asarray(targets, np.float64), np.asarray(predictions, np.float64)
    report = {
        "nodes": int(targets.size),
        "mse": float(np.square(targets - predictions).mean()) if targets.size else math.nan,
        "explained_variance": explained_variance(targets, predictions),
        "explained_variance_within_prompt": explained_variance(targets, predictions, groups),
        "correlation": correlation(targets, predictions),
        "correlation_within_prompt": correlation(targets, predictions, groups),
    }
    if noise is not None:
        report["explainable_variance_within_prompt"] = explainable_variance(targets, noise, groups)
    return report


# -------------------------------------------------------------------------------------------- which nodes, what targets


def node_targets(tree: Tree, objective: str, kl_penalty: float = 0.0, log_ratio: str | None = None) -> np.ndarray:
    """(N,) soft values (paper eq. 8): value - kl_penalty * expected log-ratio, of the label's mode or the future's."""
    values = np.asarray(tree.values[objective], np.float64)
    if kl_penalty == 0:
        return values
    return values - kl_penalty * expected_log_ratio(tree.parent, tree.log_ratio, log_ratio or tree.soft or "future")


def _readable(tree: Tree) -> np.ndarray:
    """(N,) nodes that can be trained on: not the root, and with a token of their own."""
    readable = np.array([len(t) > 0 for t in tree.tokens])
    readable[0] = False
    return readable


def training_nodes(tree: Tree, deepest_fraction: float, seed: int) -> np.ndarray:
    """Every node but the root, with a fraction of this tree's deepest level (its own, not the data set's).

    The choice is a function of (seed, prompt index) alone, not of which trees come before.
    """
    depth, readable = tree.depth, _readable(tree)
    deepest = np.flatnonzero(readable & (depth == depth.max()))
    if deepest_fraction < 1:
        generator = np.random.default_rng([seed, tree.prompt_index + 1])
        left_out = len(deepest) - round(deepest_fraction * len(deepest))
        readable[generator.choice(deepest, size=left_out, replace=False)] = False
    return np.flatnonzero(readable)


def validation_nodes(tree: Tree) -> np.ndarray:
    """Inner nodes only: a leaf's target is one reward, an inner node's a mean that says more about the value."""
    inner = _readable(tree)
    inner[tree.leaves] = False
    return np.flatnonzero(inner)


@dataclass(frozen=True)
class Example:
    """A tree with the nodes that are read of it and the targets of all its nodes."""

    tree: Tree
    nodes: np.ndarray  # (n,) in preorder
    targets: np.ndarray  # (N,) float64

    @cached_property
    def preorder(self) -> list[int]:
        return preorder(self.tree.parent)

    @cached_property
    def path_lengths(self) -> np.ndarray:
        """(N,) tokens of the path root..node."""
        lengths = np.array([len(t) for t in self.tree.tokens], np.int64)
        for node in range(1, len(lengths)):
            lengths[node] += lengths[self.tree.parent[node]]
        return lengths


def preorder(parent) -> list[int]:
    """All nodes, each before its descendants and these directly after it."""
    children: list[list[int]] = [[] for _ in parent]
    for node in range(len(parent) - 1, 0, -1):
        children[parent[node]].append(node)  # the last child first, so that the stack gives the first one first
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(children[node])
    return order


def make_examples(
    trees: Iterable[Tree],
    objective: str,
    choose: Callable[[Tree], np.ndarray],
    *,
    kl_penalty: float = 0.0,
    log_ratio: str | None = None,
    vocab_size: int | None = None,
    data_dir: str | Path = "",
) -> list[Example]:
    """Trees to examples; `choose` says which nodes (see `training_nodes`). Trees without any are left out.

    Raises:
        DataError: a tree has no values of the objective, a value that is not finite, or tokens beyond `vocab_size`;
            soft values of trees that are labelled with different log-ratios.
    """
    examples, modes = [], set()
    for tree in trees:
        modes.add(tree.soft)
        if kl_penalty and log_ratio is None and len(modes) > 1:
            raise DataError(
                f"the trees in {data_dir} are labelled with different log-ratios; say which with --log_ratio, or label "
                f"them again: python label_tree.py {data_dir} {objective} --soft"
            )
        name = f"the tree of prompt {tree.prompt_index}" + (f" in {data_dir}" if str(data_dir) else "")
        if objective not in tree.values:
            found = ", ".join(sorted(tree.values)) or "none"
            raise DataError(
                f"{name} has no values of {objective!r} (found: {found}); label the trees first: "
                f"python label_tree.py {data_dir} {objective}"
            )
        targets = node_targets(tree, objective, kl_penalty, log_ratio)
        if not np.isfinite(targets).all():
            raise DataError(f"{name} has values of {objective!r} that are not finite; label it again")
        largest = max((int(t.max()) for t in tree.tokens if len(t)), default=0)
        if vocab_size is not None and largest >= vocab_size:
            raise DataError(
                f"{name} has token {largest}, the value model knows {vocab_size} tokens: the trees were made with "
                "another tokenizer; use the configuration that made them"
            )
        chosen = set(choose(tree).tolist())
        if chosen:
            order = preorder(tree.parent)
            examples.append(Example(tree, np.array([n for n in order if n in chosen], np.int64), targets))
    return examples


def fingerprint(*splits: Sequence[Example]) -> str:
    """What is trained on, in short: a resumed training must see the same nodes, tokens and targets."""
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(b"split")
        for example in examples:
            digest.update(np.int64(example.tree.prompt_index).tobytes())
            digest.update(example.nodes.tobytes())
            digest.update(example.targets[example.nodes].astype("<f8").tobytes())
            for tokens in example.tree.tokens:
                digest.update(np.asarray(tokens, "<i4").tobytes() + b"|")
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """Nodes of one tree, read in one row of L tokens: the union of their paths, in preorder.

    A token i sees exactly the tokens j with `j <= i < ends[j]`: in preorder a segment's descendants follow it directly,
    so `ends[j]`, where they end, says who reads token j.
    """

    tokens: np.ndarray  # (L,) int64
    positions: np.ndarray  # (L,) each token's place on its own path
    ends: np.ndarray  # (L,)
    places: np.ndarray  # (m,) the positions that are trained on: each node's last token, or all of its tokens
    targets: np.ndarray  # (m,) float32
    weights: np.ndarray  # (m,) float32, 1 for each node in all
    response: int  # where the prompt ends

    @property
    def is_path(self) -> bool:
        """Whether causal attention says the same."""
        return bool((self.ends == len(self.tokens)).all())


def lay_out(example: Example, nodes: Sequence[int], dense: bool = False) -> Layout:
    """The row that reads `nodes` and their ancestors once each; `dense` puts a node's target at each of its tokens."""
    parent, tokens = example.tree.parent, example.tree.tokens
    needed = set()
    for node in nodes:
        node = int(node)
        while node >= 0 and node not in needed:
            needed.add(node)
            node = int(parent[node])
    order = [n for n in example.preorder if n in needed]
    stop, length = {}, 0
    for node in order:
        length += len(tokens[node])
        stop[node] = length
    end = dict(stop)
    for node in reversed(order[1:]):
        above = int(parent[node])
        end[above] = max(end[above], end[node])
    paths = example.path_lengths
    nodes = np.asarray(nodes, np.int64)
    sizes = np.array([len(tokens[n]) if dense else 1 for n in nodes], np.int64)
    places = np.concatenate(
        [np.arange(stop[int(n)] - size, stop[int(n)]) for n, size in zip(nodes, sizes, strict=True)]
    )
    return Layout(
        tokens=np.concatenate([tokens[n] for n in order]).astype(np.int64),
        positions=np.concatenate([np.arange(paths[n] - len(tokens[n]), paths[n]) for n in order]),
        ends=np.concatenate([np.full(len(tokens[n]), end[n]) for n in order]),
        places=places,
        targets=np.repeat(example.targets[nodes], sizes).astype(np.float32),
        weights=np.repeat(1 / sizes, sizes).astype(np.float32),
        response=len(tokens[0]),
    )


@dataclass(frozen=True)
class Batch:
    """Layouts padded on the right to one length, on the device."""

    inputs: dict[str, torch.Tensor]  # what the backbone reads
    rows: torch.Tensor  # (m,) the rows of what is trained on
    places: torch.Tensor  # (m,) and its positions there
    targets: torch.Tensor  # (m,) float32
    weights: torch.Tensor  # (m,) float32
    ends: torch.Tensor  # (B, L), see `Layout`
    response: torch.Tensor  # (B,)


def collate(layouts: Sequence[Layout], device=None) -> Batch:
    """B layouts to tensors (B, L). Paths get an ordinary 2-D mask, trees a 4-D additive one."""
    size, length = len(layouts), max(len(x.tokens) for x in layouts)
    tokens, positions = np.zeros((size, length), np.int64), np.zeros((size, length), np.int64)
    ends = np.tile(np.arange(1, length + 1), (size, 1))  # padding sees, and is seen by, itself alone
    for row, x in enumerate(layouts):
        tokens[row, : len(x.tokens)], positions[row, : len(x.tokens)] = x.tokens, x.positions
        ends[row, : len(x.tokens)] = x.ends

    def put(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    inputs = {"input_ids": put(tokens)}
    if all(x.is_path for x in layouts):
        real = [np.arange(length) < len(x.tokens) for x in layouts]
        inputs["attention_mask"] = put(np.stack(real).astype(np.int64))
    else:
        inputs |= {"attention_mask": tree_mask(put(ends)), "position_ids": put(positions)}  # (B, 1, L, L), (B, L)
    return Batch(
        inputs,
        rows=put(np.repeat(np.arange(size), [len(x.places) for x in layouts])),
        places=put(np.concatenate([x.places for x in layouts])),
        targets=put(np.concatenate([x.targets for x in layouts])),
        weights=put(np.concatenate([x.weights for x in layouts])),
        ends=put(ends),
        response=put(np.array([x.response for x in layouts])),
    )


def backbone_inputs(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The batch's inputs for a backbone of that precision."""
    mask = batch.inputs["attention_mask"]
    if mask.dim() == 2 or dtype == torch.float32:
        return batch.inputs
    return batch.inputs | {"attention_mask": mask.to(dtype).clamp_(min=torch.finfo(dtype).min)}


def _head_and_states(model, batch: Batch):
    """The sequence-classification model under any adapter, and its hidden states (B, L, H)."""
    head = without_adapter(model)
    backbone = getattr(head, head.base_model_prefix)
    inputs = backbone_inputs(batch, next(backbone.parameters()).dtype)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    return head, hidden.to(head.score.weight.dtype)


def response_mean(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """(m, L) weights of the mean over the response's tokens, from its first to each place."""
    j = torch.arange(batch.ends.shape[1], device=batch.ends.device)
    place = batch.places[:, None]
    own = (j <= place) & (place < batch.ends[batch.rows]) & (j >= batch.response[batch.rows, None])
    return own.to(dtype) / own.sum(-1, keepdim=True).clamp(min=1)


def node_values(model, batch: Batch) -> torch.Tensor:
    """(m,) float32 values at a batch's places.

    Args:
        model: a `...ForSequenceClassification` causal model with one label, bare or under a PEFT adapter. The head is
            applied in its own precision, at the places only or, for a model that pools, at every token.
    """
    head, hidden = _head_and_states(model, batch)
    with torch.autocast(hidden.device.type, enabled=False):
        if not pools_mean(model):
            return head.score(hidden[batch.rows, batch.places])[:, 0].float()
        scores = head.score(hidden)[..., 0]  # (B, L)
        return (response_mean(batch, scores.dtype) * scores[batch.rows]).sum(-1).float()


def node_states(model, batch: Batch) -> torch.Tensor:
    """(m, H) what the head reads at a batch's places: the value is linear in it."""
    _, hidden = _head_and_states(model, batch)
    if not pools_mean(model):
        return hidden[batch.rows, batch.places]
    with torch.autocast(hidden.device.type, enabled=False):
        weights, states = response_mean(batch, hidden.dtype), hidden.new_zeros(len(batch.rows), hidden.shape[-1])
        for row in range(len(hidden)):
            mine = batch.rows == row
            states[mine] = weights[mine] @ hidden[row]
    return states


def passes(layouts: Sequence[Layout], max_tokens: int = TOKENS_PER_PASS) -> list[list[int]]:
    """Indices of layouts in groups of like length, each at most `max_tokens` padded tokens (or one layout)."""
    order = sorted(range(len(layouts)), key=lambda i: len(layouts[i].tokens))
    groups: list[list[int]] = []
    for i in order:  # growing lengths: the newest is the group's padded length
        if not groups or (len(groups[-1]) + 1) * len(layouts[i].tokens) > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


# ------------------------------------------------------------------------------------------------------------ steps

Unit = tuple[int, np.ndarray]  # (index of an example, nodes that are read in one row)


def make_units(examples: Sequence[Example], packing: str, batch_size: int) -> list[Unit]:
    """The rows of an epoch; a tree's nodes are cut, in preorder, into near-equal parts where they exceed a batch."""
    if packing == "node":
        return [(i, nodes) for i, x in enumerate(examples) for nodes in x.nodes[:, None]]
    if packing != "tree":
        raise ValueError(f"unknown packing {packing!r}; valid: node, tree")
    parts = [max(1, round(len(x.nodes) / batch_size)) for x in examples]
    return [(i, nodes) for i, x in enumerate(examples) for nodes in np.array_split(x.nodes, parts[i])]


def unit_tokens(example: Example, nodes: np.ndarray) -> int:
    """How many tokens the unit's row has."""
    return int(example.path_lengths[nodes[0]]) if len(nodes) == 1 else len(lay_out(example, nodes).tokens)


def plan_epoch(
    units: Sequence[Unit], lengths: np.ndarray, packing: str, batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Optimizer steps of an epoch: lists of units, about `batch_size` nodes each, keyed by (seed, epoch).

    Paths are shuffled freely, as published. Trees are shuffled, then sorted by length within a window of 32 steps, so
    that the trees of one step need little padding, and the window's steps are shuffled again.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(units))
    if packing == "node":
        return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    per_step = max(1, round(batch_size / np.mean([len(nodes) for _, nodes in units])))
    steps: list[list[int]] = []
    for start in range(0, len(order), 32 * per_step):
        window, filled = order[start : start + 32 * per_step], math.inf
        if per_step > 1:
            window = window[np.argsort(lengths[window], kind="stable")]
        grouped: list[list[int]] = []
        for unit in window.tolist():
            size = len(units[unit][1])
            if filled + size / 2 > batch_size:
                grouped.append([])
                filled = 0
            grouped[-1].append(unit)
            filled += size
        steps += [grouped[i] for i in generator.permutation(len(grouped))]
    return steps


def share(step: Sequence[Unit], rank: int, world: int) -> list[Unit]:
    """One process's part of a step: the nodes, in order, are cut into `world` near-equal parts."""
    if world == 1:
        return list(step)
    total = sum(len(nodes) for _, nodes in step)
    low, high, seen, mine = total * rank // world, total * (rank + 1) // world, 0, []
    for i, nodes in step:
        part = nodes[max(0, low - seen) : max(0, high - seen)]
        if len(part):
            mine.append((i, part))
        seen += len(nodes)
    return mine


def add_gradients(
    model,
    examples: Sequence[Example],
    units: Sequence[Unit],
    total: int,
    *,
    dense: bool = False,
    scale: float = 1.0,
    bf16: bool = False,
    device=None,
    max_tokens: int = TOKENS_PER_PASS,
) -> torch.Tensor:
    """Add to `.grad` what these units contribute to the gradient of the step's mean squared error.

    Args:
        total: nodes of the whole step, over all passes and processes: what the mean is taken over.
        dense: train on every token of a node's segment, each with an equal part of the node's weight.
        scale: the model's output is the value in this unit.

    Returns:
        the units' part of the loss, a detached scalar on the device, in the unit of the targets squared.
    """
    layouts = [lay_out(examples[i], nodes, dense) for i, nodes in units]
    loss = torch.zeros((), device=device)
    for group in passes(layouts, max_tokens):
        batch = collate([layouts[i] for i in group], device)
        with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=bf16):
            values = node_values(model, batch)
        part = (batch.weights * (values - batch.targets / scale).square()).sum() / total
        part.backward()
        loss += part.detach() * scale**2
    return loss


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """The learning rate's factor at a step: up to 1 after `warmup` steps, then down to 0 at `total`."""
    return min((step + 1) / (warmup + 1), (total - step) / max(1, total - warmup))


@torch.no_grad()
def predict(
    model,
    examples: Sequence[Example],
    *,
    packing: str = "tree",
    bf16: bool = False,
    device=None,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = TOKENS_PER_PASS,
) -> torch.Tensor:
    """(M,) float32 values of all the examples' nodes, in order; a process fills its own rows and leaves 0 elsewhere."""
    units = make_units(examples, packing, max(len(x.nodes) for x in examples))  # whole trees, or single nodes
    starts = np.cumsum([0, *(len(nodes) for _, nodes in units)])
    layouts = [lay_out(examples[i], nodes) for i, nodes in units]
    values = torch.zeros(int(starts[-1]), device=device)
    training = model.training
    model.eval()
    for number, group in enumerate(passes(layouts, max_tokens)):
        if number % world != rank:
            continue
        batch = collate([layouts[i] for i in group], device)
        with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=bf16):
            predicted = node_values(model, batch)
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
        values[torch.from_numpy(places).to(values.device)] = predicted
    model.train(training)
    return values


# ---------------------------------------------------------------------------------------------------- output folder

METRICS, ARGUMENTS, STATE = "metrics.json", "args.yaml", "state.json"


def open_output(
    output: Path,
    settings: dict,
    record: dict,
    *,
    rerun: bool = False,
    main_process: bool = True,
    what: str = "value model",
) -> Path | None:
    """The folder to train in, `<output>.partial` with its args.yaml, or None where `output` is complete.

    The trained adapter takes its place in one rename (`publish`), so `output` is whole or not there.

    Args:
        settings: plain data that determines the result; another result's folder is refused.
        record: more for args.yaml (versions, configuration).
        rerun: train again; what is there is replaced once the new one is complete.
        what: is made there, for messages.

    Raises:
        DataError: `output` or its partial folder was made with other settings, or holds something else; another
            process writes there.
    """
    settings = json.loads(json.dumps(settings))
    partial = output.with_name(output.name + ".partial")
    if main_process:
        hold(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / METRICS).is_file() or not (output / ARGUMENTS).is_file():
            raise DataError(f"--output_dir {output} exists and holds no {what} of this script; give another folder")
        if not rerun:
            _same_settings(output, settings)
            return None
    if main_process:
        begun = (partial / STATE).is_file() or (partial / METRICS).is_file()
        if partial.exists() and (rerun or not begun):  # nothing was trained there, so nothing is lost
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if (partial / ARGUMENTS).is_file():
            _same_settings(partial, settings)
        else:
            text = yaml.safe_dump({"settings": settings, **record}, sort_keys=False, allow_unicode=True, width=120)
            write_atomically(partial / ARGUMENTS, text)
    if not rerun and (partial / METRICS).is_file():  # killed between the last file and the rename
        if main_process:
            publish(partial, output)
        return None
    return partial


@contextlib.contextmanager
def discarded_unless_begun(partial: Path, *, main_process: bool = True):
    """Around all that may fail for want of usable input before the training: then `partial` holds nothing, and goes."""
    try:
        yield
    except DataError:
        if main_process and not (partial / STATE).is_file() and not (partial / METRICS).is_file():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _flat(data: dict, place: str = "") -> dict:
    """Nested mappings as one of dotted keys."""
    flat = {}
    for key, value in data.items():
        flat |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return flat


def _same_settings(folder: Path, settings: dict) -> None:
    known = _flat((yaml.safe_load((folder / ARGUMENTS).read_text()) or {}).get("settings", {}))
    settings = _flat(settings)
    for key in sorted(set(known) | set(settings)):
        if known.get(key) != settings.get(key):
            raise DataError(
                f"{folder} was made with {key}={known.get(key)!r}, this command has {settings.get(key)!r}; "
                "give another --output_dir, the same arguments, or --rerun to replace it"
            )


def publish(partial: Path, output: Path) -> None:
    """Put a complete folder in its place; one that was there before is replaced."""
    assert (partial / METRICS).is_file(), partial
    for path in (*partial.glob("*-*.safetensors"), partial / STATE, *partial.glob(".*.tmp")):  # the checkpoint
        path.unlink(missing_ok=True)
    shutil.rmtree(partial / "checkpoints", ignore_errors=True)  # a library's trainer's
    if (partial / ADAPTER[1]).is_file():
        record_checksum(partial)
    put_in_place(partial, output)


def save_adapter(model, folder: Path, metrics: dict) -> None:
    """The PEFT adapter (LoRA and head, no embeddings), then metrics.json, which says that it is whole."""
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    write_json(folder / METRICS, metrics)


# --------------------------------------------------------------------------------------------------------- training


def _head_weight(model) -> torch.Tensor:
    """The scalar head's weight (1, H)."""
    return without_adapter(model).score.weight


@torch.no_grad()
def start_at_mean(
    model, examples: Sequence[Example], *, packing: str = "tree", device=None, max_trees: int = 8
) -> None:
    """Let a new model's head predict about the targets' mean from the start, judging by the first trees' nodes.

    The head has no bias, so a reward that lies far from 0 would otherwise be approached step by step, while the loss
    says nothing about the differences that matter. For a mean of 0 the head stays 0.
    """
    training, few = model.training, examples[:max_trees]
    model.eval()
    states = [
        node_states(model, collate([lay_out(few[i], nodes)], device))
        for i, nodes in make_units(few, packing, max(len(x.nodes) for x in few))
    ]
    model.train(training)
    direction = torch.cat(states).mean(0)  # (H,)
    mean = float(np.concatenate([x.targets[x.nodes] for x in examples]).mean())
    _head_weight(model).copy_((mean * direction / direction.square().sum())[None])


@torch.no_grad()
def start_at_ridge(
    model,
    examples: Sequence[Example],
    *,
    bf16: bool = False,
    device=None,
    folds: int = 5,
    max_tokens: int = TOKENS_PER_PASS,
    accelerator=None,
) -> float:
    """Let the head be the ridge regression of the targets on the states, drawn towards where it is (a new one is at 0).

    Only differences within a prompt steer, and most of the variance lies between prompts, of which there are few: the
    error of a tree's mean counts `BETWEEN` as much as that of its nodes' differences from it. The penalty is the one of
    `RIDGES` that predicts these differences best, over folds of whole trees.

    Args:
        accelerator: an `accelerate.Accelerator` where several processes share the passes; their moments are summed in
            float64, so that all get what one process would, to rounding, and the same bits.

    Returns:
        the penalty, as a share of the states' mean square.
    """
    training, weight = model.training, _head_weight(model)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    size = weight.shape[1]
    model.eval()
    gram = torch.zeros(2, folds, size, size, dtype=torch.float64, device=device)  # of the states; [1] within a prompt
    cross = torch.zeros(2, folds, size, dtype=torch.float64, device=device)  # with the targets
    layouts = [lay_out(x, x.nodes) for x in examples]
    bar = progress(total=len(layouts), desc="ridge", unit="tree")
    for group in passes(layouts, max_tokens)[rank::world]:
        batch = collate([layouts[i] for i in group], device)
        with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=bf16):
            states = node_states(model, batch).double()
        for row, i in enumerate(group):
            mine = batch.rows == row
            x = states[mine]
            add_moments(gram, cross, i % folds, x, batch.targets[mine].double() - x @ weight[0].double())
        bar.update(len(group))
    bar.close()
    model.train(training)
    if world > 1:
        gram, cross = accelerator.reduce(gram, "sum"), accelerator.reduce(cross, "sum")
    ridge, step = choose_ridge(gram, cross)
    if world > 1:  # the first one's, for all: other hardware may round the solution otherwise
        step = accelerator.reduce(step if rank == 0 else torch.zeros_like(step), "sum")
    weight += step[None].to(weight.dtype)
    return ridge


def choose_ridge(gram: torch.Tensor, cross: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The penalty of `RIDGES` that predicts the differences within a prompt best over folds, and its solution (H,).

    Args:
        gram: (2, folds, H, H) float64, X'X of each fold: [0] what is minimised, [1] within prompts alone.
        cross: (2, folds, H), X'y likewise.
    """
    size, unit = gram.shape[-1], gram[0].sum(0).diagonal().mean()
    used = [f for f in range(gram.shape[1]) if gram[0, f].any()]

    def solve(kept: list[int], ridge: float) -> torch.Tensor:
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram[0, kept].sum(0) + ridge * unit * eye, cross[0, kept].sum(0))

    error = gram.new_zeros(len(RIDGES))  # less the targets' own square
    for n, ridge in enumerate(RIDGES):
        for f in used if len(used) > 1 else ():
            w = solve([g for g in used if g != f], ridge)
            error[n] += w @ gram[1, f] @ w - 2 * w @ cross[1, f]
    best = RIDGES[int(error.argmin())] if len(used) > 1 else RIDGES[-1]
    return best, solve(used, best)


def add_moments(gram: torch.Tensor, cross: torch.Tensor, fold: int, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add one prompt's states (n, H) and targets (n,) to the moments that `choose_ridge` reads."""
    mean, level, count = x.mean(0), y.mean(), len(y)
    x, y = x - mean, y - level
    gram[1, fold] += x.T @ x
    cross[1, fold] += y @ x
    gram[0, fold] += x.T @ x + BETWEEN * count * torch.outer(mean, mean)
    cross[0, fold] += y @ x + BETWEEN * count * level * mean


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products have instructions of their own here; elsewhere they are emulated, and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_optimizer(model, spec: TrainingSpec):
    """Adafactor with a learning rate from outside, as the published training uses it."""
    from transformers.optimization import Adafactor

    parameters = [p for p in model.parameters() if p.requires_grad]
    return Adafactor(parameters, lr=spec.lr, weight_decay=spec.weight_decay, scale_parameter=False, relative_step=False)


def seed_of(*key: int) -> int:
    """A seed for torch, below 2^63, that the numbers of the key give."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Checkpoint:
    """What a killed training goes on from: trained parameters, Adafactor's state, the best parameters so far.

    `state.json` is written last and names the files that belong to it, so that a kill between two files leaves the
    checkpoint before. Tensors are safetensors; nothing is pickled.
    """

    def __init__(self, folder: Path, model, optimizer):
        self.folder, self.optimizer = folder, optimizer
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def save(self, state: dict, *, best: bool) -> dict:
        """Write the checkpoint of `state["step"]`; `best` says that its parameters are the best so far."""
        tensors, steps = {}, {}
        for name, parameter in self.parameters.items():
            tensors[name] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                if key == "step":
                    steps[name] = value
                elif torch.is_tensor(value) and key != "RMS":  # RMS is computed anew in each step
                    tensors[f"{name}//{key}"] = value
        state = {**state, "state_file": f"state-{state['step']}.safetensors", "optimizer_steps": steps}
        self._write(state["state_file"], tensors)
        if best:
            state["best_file"] = f"best-{state['step']}.safetensors"
            self._write(state["best_file"], {n: p.detach() for n, p in self.parameters.items()})
        write_json(self.folder / STATE, state)
        for path in self.folder.glob("*-*.safetensors"):
            if path.name not in (state["state_file"], state.get("best_file")):
                path.unlink()
        return state

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        write_atomically(self.folder / name, save({k: v.cpu().contiguous() for k, v in tensors.items()}))

    def load(self) -> dict | None:
        """Restore parameters and optimizer; None where there is no checkpoint."""
        if not (self.folder / STATE).is_file():
            return None
        state = json.loads((self.folder / STATE).read_text())
        tensors = load_file(self.folder / state["state_file"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
            if name not in state["optimizer_steps"]:  # a checkpoint from before the first step
                continue
            self.optimizer.state[parameter] = {"step": state["optimizer_steps"][name], "RMS": 0} | {
                key.rsplit("//", 1)[1]: value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(f"{name}//")
            }
        return state

    def load_best(self, state: dict) -> None:
        """Put the best parameters into the model."""
        tensors = load_file(self.folder / state["best_file"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])


def _read_log(path: Path, up_to: int) -> list[dict]:
    """The loss curve's rows until a step; later ones are written again by the resumed training."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("step", "").isdigit() and int(row["step"]) <= up_to]


def train(
    model,
    training: Sequence[Example],
    validation: Sequence[Example],
    spec: TrainingSpec,
    folder: Path,
    *,
    accelerator=None,
    device: torch.device | str = "cpu",
    max_tokens: int = TOKENS_PER_PASS,
    say: Callable[[str], None] = lambda line: None,
    log: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Fit the model's trainable parameters and leave the best ones (by validation loss) in it.

    Args:
        model: see `node_values`; what requires a gradient is trained.
        spec: hyperparameters. A step has `batch_size` nodes over all processes, so that the number of processes does
            not change what is learned.
        folder: where training_log.csv and the checkpoint are; a checkpoint there is gone on from.
        accelerator: an `accelerate.Accelerator` where several processes train together.
        say, log: called with lines for the user and with rows of the loss curve.

    Returns:
        the contents of metrics.json.

    Raises:
        DataError: nothing to train or validate on, trees that changed since the checkpoint, a loss that is not finite.
    """
    for split, examples in (("training", training), ("validation", validation)):
        if not examples:
            raise DataError(
                f"no nodes to use in the {split} trees" + ("; inner nodes are needed" if split[0] == "v" else "")
            )
    device = torch.device(device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    units = make_units(training, spec.packing, spec.batch_size)
    lengths = np.array([unit_tokens(training[i], nodes) for i, nodes in units], np.int64)
    plan = [
        step for epoch in range(spec.num_epochs)
        for step in plan_epoch(units, lengths, spec.packing, spec.batch_size, spec.seed, epoch)
    ]  # fmt: skip
    total, warmup = len(plan), min(spec.warmup_steps, len(plan) // 2)
    evaluated, logged = _milestones(training, validation, spec, int(lengths.sum()), total)

    optimizer = make_optimizer(model, spec)
    checkpoint = Checkpoint(Path(folder), model, optimizer)
    parameters, mark = list(checkpoint.parameters.values()), fingerprint(training, validation)
    state = checkpoint.load()
    scale = 1.0
    if spec.standardize:
        scale = float(np.concatenate([x.targets[x.nodes] for x in training]).std()) or 1.0
    if state is None:
        state = {"step": 0, "seconds": 0.0, "best_loss": None, "fingerprint": mark}
        with torch.no_grad():
            _head_weight(model).div_(scale)
    if state["fingerprint"] != mark:
        raise DataError(f"the trees have changed since the training in {folder} began; --rerun starts it anew")
    if state["step"]:
        say(f"going on from step {state['step']} of {total}")
    log_file = Path(folder) / "training_log.csv"
    rows = _read_log(log_file, state["step"])
    if accelerator:
        accelerator.wait_for_everyone()  # everyone has read the checkpoint before anyone replaces it

    def evaluate() -> np.ndarray:
        values = predict(model, validation, packing=spec.packing, bf16=spec.bf16, device=device, rank=rank, world=world,
                         max_tokens=max_tokens)  # fmt: skip
        values = accelerator.reduce(values, "sum") if world > 1 else values
        return values.cpu().numpy().astype(np.float64) * scale

    def keep(done: int, val_loss: float, note: str = "") -> None:
        """Write the checkpoint of a step, as the best one where it is."""
        nonlocal state
        best = state["best_loss"] is None or val_loss < state["best_loss"]
        state |= {"step": done, "seconds": time.perf_counter() - begun}
        if best:
            state |= {"best_loss": val_loss, "best_step": done}
        if rank == 0:
            write_csv(log_file, rows, LOG_COLUMNS)
            state = checkpoint.save(state, best=best)
        say(f"step {done}/{total}: {note}validation {val_loss:.4f}" + (" (best)" if best else ""))

    targets = np.concatenate([x.targets[x.nodes] for x in validation])
    begun, running, since = time.perf_counter() - state["seconds"], torch.zeros((), device=device), 0
    bar = progress(total=total, desc="value model", unit="step")
    bar.update(state["step"])
    if state["best_loss"] is None and spec.head_start == "ridge":  # a start that may be the best there is
        keep(0, float(np.square(evaluate() - targets).mean()))
    model.train()
    with torch.random.fork_rng(
        devices=[device] if device.type == "cuda" else []
    ):  # dropout draws from the global stream
        for step in range(state["step"], total):
            torch.manual_seed(seed_of(spec.seed, step, rank))  # ... which each step keys anew
            picked = [units[i] for i in plan[step]]
            nodes = sum(len(n) for _, n in picked)
            optimizer.zero_grad(set_to_none=True)
            running += add_gradients(model, training, share(picked, rank, world), nodes, dense=spec.targets == "dense",
                                     scale=scale, bf16=spec.bf16, device=device, max_tokens=max_tokens)  # fmt: skip
            if world > 1:
                add_up(accelerator, parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * linear_schedule(step, total, warmup)
            optimizer.step()
            done, since = step + 1, since + 1
            bar.update(1)
            bar.tokens(int(lengths[plan[step]].sum()))
            if done not in logged:
                continue
            loss = float(accelerator.reduce(running, "sum") if world > 1 else running) / since
            if not math.isfinite(loss):
                raise DataError(
                    f"the training loss is {loss} at step {done}; try a smaller --lr or --no-bf16, and --rerun"
                )
            row = {
                "step": done, "epoch": round(done * spec.num_epochs / total, 4), "nodes": nodes,
                "lr": f"{optimizer.param_groups[0]['lr']:.4g}", "train_loss": f"{loss:.6g}", "val_loss": "",
                "grad_norm": f"{float(norm):.4g}", "seconds": round(time.perf_counter() - begun, 2),
            }  # fmt: skip
            running, since = torch.zeros((), device=device), 0
            rows.append(row)
            if done in evaluated:
                val_loss = float(np.square(evaluate() - targets).mean())
                row |= {"val_loss": f"{val_loss:.6g}", "seconds": round(time.perf_counter() - begun, 2)}
                keep(done, val_loss, f"train {loss:.4f}, ")
            log(row)
    bar.close()
    if accelerator:
        accelerator.wait_for_everyone()
    state = json.loads((Path(folder) / STATE).read_text())  # what rank 0 wrote, for every process
    checkpoint.load_best(state)
    with torch.no_grad():
        _head_weight(model).mul_(scale)
    scale = 1.0
    tokens = int(lengths.sum()) * spec.num_epochs
    final_epoch = [float(r["train_loss"]) for r in rows if float(r["epoch"]) > spec.num_epochs - 1]
    return {
        "num_trees": len(training), "num_nodes": sum(len(x.nodes) for x in training),
        "num_val_trees": len(validation), "num_val_nodes": len(targets),
        "num_steps": total, "best_step": state["best_step"], "warmup_steps": warmup,
        "train_loss": float(np.mean(final_epoch)) if final_epoch else math.nan, "val_loss": state["best_loss"],
        "validation": validation_report(validation, evaluate()),
        "packing": spec.packing, "bf16": spec.bf16, "tokens_read": tokens,
        "tokens_as_paths": int(sum(x.path_lengths[x.nodes].sum() for x in training)) * spec.num_epochs,
        "seconds": state["seconds"], "tokens_per_second": tokens / max(state["seconds"], 1e-9),
        "processes": world, "device": str(device), "fingerprint": mark,
    }  # fmt: skip


def validation_report(examples: Sequence[Example], predictions: np.ndarray) -> dict:
    """`fit_report` over all validation nodes and per depth, with predictions (M,) in the examples' order."""
    targets = np.concatenate([x.targets[x.nodes] for x in examples])
    groups = np.concatenate([np.full(len(x.nodes), i) for i, x in enumerate(examples)])
    depths = np.concatenate([x.tree.depth[x.nodes] for x in examples])
    noise = np.concatenate([target_noise(x.tree, x.targets, x.nodes) for x in examples])
    report = fit_report(targets, predictions, groups)
    report["target_mean"], report["target_variance"] = float(targets.mean()), float(targets.var())
    report["by_depth"] = {
        int(d): fit_report(*(a[depths == d] for a in (targets, predictions, groups, noise))) for d in np.unique(depths)
    }
    return report


def _milestones(training, validation, spec: TrainingSpec, epoch_tokens: int, total: int) -> tuple[set[int], set[int]]:
    """The steps after which the model is evaluated, and those after which a row is logged (more of them).

    About 10 evaluations an epoch, fewer where they would take more than a fifth of the training's time (a training
    token costs about three times what one of validation does), and one at the end in any case.
    """
    if total == 0:
        return set(), set()
    if spec.packing == "node":
        cost = sum(int(x.path_lengths[x.nodes].sum()) for x in validation)
    else:
        cost = sum(unit_tokens(x, x.nodes) for x in validation)
    affordable = int(VALIDATION_SHARE * 3 * epoch_tokens / max(1, cost))
    count = min(total, spec.num_epochs * max(1, min(EVALUATIONS_PER_EPOCH, affordable)))
    evaluated = {round(total * (i + 1) / count) for i in range(count)}
    rows = min(total, max(200, count))
    return evaluated, evaluated | {round(total * (i + 1) / rows) for i in range(rows)}


def add_up(accelerator, parameters: Sequence[torch.Tensor]) -> None:
    """Sum the processes' gradients; a process without nodes in this step has none and adds zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = accelerator.reduce(torch.cat([p.grad.reshape(-1) for p in parameters]), "sum")
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
