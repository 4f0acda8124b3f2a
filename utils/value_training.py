"""Value regression on trees: the scalar head's output at a node's last token is fitted to the node's value.

A node's target is the mean reward of the leaves below it (minus what the policy's log-ratio costs), the loss the mean
squared error over nodes. How nodes are read is the matter of `tree_layouts`.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.checkpoint import Checkpoint
from utils.cli import progress
from utils.errors import DataError
from utils.files import write_csv
from utils.fit_measures import validation_report
from utils.node_values import head_weight, node_values, predict, values_of_states
from utils.optimization import add_up, linear_schedule, seed_of
from utils.specs import TrainingSpec
from utils.tree_examples import Example, fingerprint
from utils.tree_layouts import TOKENS_PER_PASS, Unit, collate, lay_out, make_units, passes, unit_tokens

EVALUATIONS_PER_EPOCH = 10
VALIDATION_SHARE = 0.2  # of the training's cost, at most, however many validation trees there are
LOG_COLUMNS = ("step", "epoch", "nodes", "lr", "train_loss", "val_loss", "grad_norm", "seconds")


# ---------------------------------------------------------------------------------------------------------------- steps


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


def make_optimizer(model, spec: TrainingSpec):
    """Adafactor with a learning rate from outside, as the published training uses it."""
    from transformers.optimization import Adafactor

    parameters = [p for p in model.parameters() if p.requires_grad]
    return Adafactor(parameters, lr=spec.lr, weight_decay=spec.weight_decay, scale_parameter=False, relative_step=False)


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


# ------------------------------------------------------------------------------------------------------------- training


def _read_log(path: Path, up_to: int) -> list[dict]:
    """The loss curve's rows until a step; later ones are written again by the resumed training."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("step", "").isdigit() and int(row["step"]) <= up_to]


@dataclass(frozen=True)
class Course:
    """The optimizer steps of a training, and those after which one looks at it."""

    units: list[Unit]
    lengths: np.ndarray  # (units,) tokens of each one's row
    steps: list[list[int]]  # the units of each step
    warmup: int  # steps in which the learning rate rises
    evaluated: set[int]  # numbers of steps after which the validation loss is taken
    logged: set[int]  # and those after which the loss curve has a row


def plan_course(training: Sequence[Example], validation: Sequence[Example], spec: TrainingSpec) -> Course:
    """What `train` does, as a function of its examples and hyperparameters alone."""
    units = make_units(training, spec.packing, spec.batch_size)
    lengths = np.array([unit_tokens(training[i], nodes) for i, nodes in units], np.int64)
    steps = [
        step for epoch in range(spec.num_epochs)
        for step in plan_epoch(units, lengths, spec.packing, spec.batch_size, spec.seed, epoch)
    ]  # fmt: skip
    evaluated, logged = milestones(training, validation, spec, int(lengths.sum()), len(steps))
    return Course(units, lengths, steps, min(spec.warmup_steps, len(steps) // 2), evaluated, logged)


class History:
    """The loss curve of a training and its best step so far, kept in the folder with the checkpoint.

    Args:
        mark: the `fingerprint` of what is trained on.
        writes: whether this process is the one that writes.

    Raises:
        DataError: the checkpoint is that of other trees.
    """

    def __init__(self, checkpoint: Checkpoint, mark: str, writes: bool):
        self.checkpoint, self.writes, self.file = checkpoint, writes, checkpoint.folder / "training_log.csv"
        state = checkpoint.load()
        self.is_new = state is None
        self.state = state or {"step": 0, "seconds": 0.0, "best_loss": None, "fingerprint": mark}
        if self.state["fingerprint"] != mark:
            raise DataError(
                f"the trees have changed since the training in {checkpoint.folder} began; --rerun starts it anew"
            )
        self.rows = _read_log(self.file, self.state["step"])
        self._begun = time.perf_counter() - self.state["seconds"]

    @property
    def seconds(self) -> float:
        """What the training took so far, over all processes that were killed."""
        return time.perf_counter() - self._begun

    def keep(self, step: int, val_loss: float) -> bool:
        """Write the checkpoint after that many steps; returns whether it is the best so far."""
        best = self.state["best_loss"] is None or val_loss < self.state["best_loss"]
        self.state |= {"step": step, "seconds": self.seconds}
        if best:
            self.state |= {"best_loss": val_loss, "best_step": step}
        if self.writes:
            write_csv(self.file, self.rows, LOG_COLUMNS)
            self.state = self.checkpoint.save(self.state, best=best)
        return best


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
    validation_states: torch.Tensor | None = None,
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
        validation_states: (M, H) what the head reads at the validation nodes. Given where the head alone is new (no
            epochs), so that these nodes are not read again.
        say, log: called with lines for the user and with rows of the loss curve.

    Returns:
        the contents of metrics.json.

    Raises:
        DataError: trees that changed since the checkpoint, a loss that is not finite.
    """
    assert training and validation, (len(training), len(validation))
    assert validation_states is None or spec.num_epochs == 0, spec
    device = torch.device(device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    course = plan_course(training, validation, spec)
    total = len(course.steps)
    targets = np.concatenate([x.targets[x.nodes] for x in validation])
    scale = 1.0  # the model's output is the value in this unit
    if spec.standardize:
        scale = float(np.concatenate([x.targets[x.nodes] for x in training]).std()) or 1.0

    optimizer = make_optimizer(model, spec)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    history = History(Checkpoint(folder, parameters, optimizer), fingerprint(training, validation), rank == 0)
    if history.is_new:
        with torch.no_grad():
            head_weight(model).div_(scale)
    first = history.state["step"]
    if first:
        say(f"going on from step {first} of {total}")
    if accelerator:
        accelerator.wait_for_everyone()  # everyone has read the checkpoint before anyone replaces it

    def outputs() -> np.ndarray:
        """(M,) what the model says at the validation nodes."""
        if validation_states is not None:
            return values_of_states(model, validation_states).cpu().numpy().astype(np.float64)
        values = predict(model, validation, packing=spec.packing, bf16=spec.bf16, device=device, rank=rank, world=world,
                         max_tokens=max_tokens)  # fmt: skip
        values = accelerator.reduce(values, "sum") if world > 1 else values
        return values.cpu().numpy().astype(np.float64)

    def evaluate() -> float:
        return float(np.square(outputs() * scale - targets).mean())

    def must_be_finite(what: str, loss: float, done: int) -> None:
        if not math.isfinite(loss):
            raise DataError(f"the {what} loss is {loss} at step {done}; try a smaller --lr or --no-bf16, and --rerun")

    def keep(done: int, val_loss: float, note: str = "") -> None:
        must_be_finite("validation", val_loss, done)  # the last step's update may be what broke the weights
        best = history.keep(done, val_loss)
        say(f"step {done}/{total}: {note}validation {val_loss:.4f}" + (" (best)" if best else ""))

    running, since = torch.zeros((), device=device), 0
    bar = progress(total=total, desc="value model", unit="step")
    bar.update(first)
    if history.state["best_loss"] is None and spec.head_start == "ridge":  # a start that may be the best there is
        keep(0, evaluate())
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from the global stream
        for step in range(first, total):
            torch.manual_seed(seed_of(spec.seed, step, rank))  # ... which each step keys anew
            picked = [course.units[i] for i in course.steps[step]]
            rate = spec.lr * linear_schedule(step, total, course.warmup)
            part, norm = take_step(model, optimizer, training, picked, rate, accelerator, dense=spec.targets == "dense",
                                   scale=scale, bf16=spec.bf16, device=device, max_tokens=max_tokens)  # fmt: skip
            running += part
            done, since = step + 1, since + 1
            bar.update(1)
            bar.tokens(int(course.lengths[course.steps[step]].sum()))
            if done not in course.logged:
                continue
            loss = float(accelerator.reduce(running, "sum") if world > 1 else running) / since
            must_be_finite("training", loss, done)
            running, since = torch.zeros((), device=device), 0
            row = {
                "step": done, "epoch": round(done * spec.num_epochs / total, 4),
                "nodes": sum(len(nodes) for _, nodes in picked),
                "lr": f"{rate:.4g}", "train_loss": f"{loss:.6g}", "val_loss": "",
                "grad_norm": f"{float(norm):.4g}", "seconds": round(history.seconds, 2),
            }  # fmt: skip
            history.rows.append(row)
            if done in course.evaluated:
                val_loss = evaluate()
                row |= {"val_loss": f"{val_loss:.6g}", "seconds": round(history.seconds, 2)}
                keep(done, val_loss, f"train {loss:.4f}, ")
            log(row)
    bar.close()
    if accelerator:
        accelerator.wait_for_everyone()
    history.state = history.checkpoint.load_best()  # what the first process wrote, for every one
    if accelerator:
        accelerator.wait_for_everyone()  # everyone has read it before the first one publishes the folder without it
    with torch.no_grad():
        head_weight(model).mul_(scale)
    report = validation_report(validation, outputs())
    return _metrics(training, validation, spec, course, history, report, world, device)


def take_step(
    model, optimizer, examples: Sequence[Example], units: Sequence[Unit], rate: float, accelerator, **how
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on units, which all processes share.

    Args:
        rate: the learning rate.
        how: see `add_gradients`.

    Returns:
        this process's part of the loss before the step, and the norm of the gradient before it is clipped to 1.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss = add_gradients(model, examples, share(units, rank, world), sum(len(nodes) for _, nodes in units), **how)
    if world > 1:
        add_up(accelerator, parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss, norm


def _metrics(
    training, validation, spec: TrainingSpec, course: Course, history: History, report: dict, world: int, device
) -> dict:
    """What metrics.json says of a finished training; `report` says how well the model fits."""
    state, tokens = history.state, int(course.lengths.sum()) * spec.num_epochs
    last_epoch = [float(r["train_loss"]) for r in history.rows if float(r["epoch"]) > spec.num_epochs - 1]
    return {
        "num_trees": len(training), "num_nodes": sum(len(x.nodes) for x in training),
        "num_val_trees": len(validation), "num_val_nodes": sum(len(x.nodes) for x in validation),
        "num_steps": len(course.steps), "best_step": state["best_step"], "warmup_steps": course.warmup,
        "train_loss": float(np.mean(last_epoch)) if last_epoch else math.nan, "val_loss": state["best_loss"],
        "validation": report,
        "packing": spec.packing, "bf16": spec.bf16, "tokens_read": tokens,
        "tokens_as_paths": int(sum(x.path_lengths[x.nodes].sum() for x in training)) * spec.num_epochs,
        "seconds": state["seconds"], "tokens_per_second": tokens / max(state["seconds"], 1e-9),
        "processes": world, "device": str(device), "fingerprint": state["fingerprint"],
    }  # fmt: skip


def milestones(training, validation, spec: TrainingSpec, epoch_tokens: int, total: int) -> tuple[set[int], set[int]]:
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
