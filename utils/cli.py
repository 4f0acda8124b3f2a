"""What the stage scripts share on the command line: common arguments, weights and iterations, exit statuses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Sequence

from utils.config import load_config
from utils.errors import ConfigError, DataError, UsageError, nearest
from utils.specs import Config

PATIENCE = 3.0  # seconds that a process other than the first waits before it says an error


def add_common(parser: ArgumentParser) -> None:
    """The arguments of every script."""
    group = parser.add_argument_group("common")
    group.add_argument(
        "--config", help="configuration: a YAML file or a name in configs/ (default: $MAVIS_CONFIG, else the paper's)"
    )
    group.add_argument("--workspace", help="folder of everything the stages make (default: the configuration's)")
    group.add_argument("--device", help="torch device, e.g. cuda:1 or cpu (default: the first GPU, else the CPU)")
    group.add_argument(
        "--wandb",
        action=BooleanOptionalAction,
        default=False,
        help="log to Weights & Biases (mode from its environment)",
    )
    group.add_argument(
        "--dry_run", action="store_true", help="print what would be loaded, and from where; load nothing"
    )


def add_graphs_argument(group) -> None:
    """The switch of recorded steps (`graphs`), for what decodes."""
    group.add_argument(
        "--cuda_graphs",
        action=BooleanOptionalAction,
        help="record a step on a GPU once and launch it whole, for few rows (default: the configuration's)",
    )


def check_graphs(asked: bool | None, device: str | None) -> None:
    """Raise a UsageError where recorded steps are asked for on a device that is named and is no NVIDIA GPU."""
    if asked and device is not None and not device.startswith("cuda"):
        raise UsageError(f"--cuda_graphs needs an NVIDIA GPU, and the device is {device}; leave it out")


def config_from(args: Namespace) -> Config:
    """The configuration that the command line names; every stage begins so, and learns here that --wandb cannot be."""
    check_wandb(getattr(args, "wandb", False))
    return load_config(args.config, args.workspace)


def check_wandb(wanted: bool) -> None:
    """Raise a DataError where --wandb was given and the package is not installed: before hours of work, not after."""
    import importlib.util

    if wanted and importlib.util.find_spec("wandb") is None:
        raise DataError("--wandb needs the package wandb: pip install wandb, or leave --wandb out")


def run(main: Callable[[], int | None]) -> int:
    """Call a script's `main`; a user's mistake becomes one line on stderr and an exit status, never a traceback."""
    try:
        return int(main() or 0)
    except (UsageError, ConfigError) as error:
        return _fail(error, 2)
    except (DataError, OSError) as error:  # a file that is not there, no space left, a hub that cannot be reached, ...
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        if (known := _no_memory(error) or _library_os_error(error)) is None:
            raise
        return _fail(known, 1)


def _no_memory(error: Exception) -> DataError | None:
    """A device's or the machine's memory that is full, as torch, numpy and Python say it."""
    said = " ".join(str(error).split())
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not full and not re.search(r"DefaultCPUAllocator|CUDA out of memory|bad_alloc", said):
        return None
    wanted = re.search(r"(?i)(?:tried|unable) to allocate \S+ ?\w*", said)
    return DataError(
        f"out of memory{f' ({wanted[0]})' if wanted else ''}: a smaller --batch_size needs less, where the command has "
        "one; what was finished is kept, and the same command goes on from there"
    )


def _library_os_error(error: Exception) -> OSError | None:
    """What a library that writes files outside Python (safetensors, tokenizers, torch) says of the system's errors."""
    if found := re.search(r"(.*?)\s*\(os error (\d+)\)", str(error), re.DOTALL):
        return OSError(int(found[2]), f"{os.strerror(int(found[2]))} (a model, adapter or tokenizer file)")
    if re.search(r"PytorchStreamWriter|inline_container.*unexpected pos|iostream error", str(error)):
        return OSError(
            f"a checkpoint's file could not be written ({' '.join(str(error).split())[:120]}); is the disk full?"
        )
    return None


def _fail(error: Exception, status: int) -> int:
    if os.environ.get("MAVIS_DEBUG"):
        raise error
    from utils.sharding import Process, this_process

    try:
        process = this_process()
    except UsageError:  # then that is the error
        process = Process()
    if not process.first:  # an error that all have is said by the first: the launcher ends the others in this time
        time.sleep(PATIENCE)
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:  # not "[Errno 17] File exists: '...'"
        text = f"{error.filename}: {error.strerror}"
    where = f" ({process})" if process.several else ""
    print(f"error{where}: " + " ".join(text.split()), file=sys.stderr, flush=True)
    return status


def check_beta(beta: float) -> float:
    """A beta that can tilt: finite and not negative."""
    if not math.isfinite(beta) or beta < 0:
        raise UsageError(f"--beta must be a finite number of at least 0, got {beta}")
    return beta


def parse_weights(text: str, objectives: Sequence[str]) -> dict[str, float]:
    """`0.2,,0.8` to {objective: weight} in the data set's order; an empty place is 0, and zeros are left out.

    Raises:
        UsageError: not numbers, negative, nan, another count than the objectives, or a sum other than 1.
    """
    order = ",".join(objectives)
    cells = [c.strip() for c in text.split(",")]
    if not any(cells):
        raise UsageError(f"--obj_weights {text!r} has no weight; give numbers that sum to 1, in the order {order}")
    if len(cells) > len(objectives):
        raise UsageError(
            f"--obj_weights {text!r} has {len(cells)} weights for the {len(objectives)} objectives {order}"
        )
    try:
        weights = [float(c) if c else 0.0 for c in cells]
    except ValueError:
        raise UsageError(
            f"--obj_weights {text!r}: each weight must be a number or empty, in the order {order}"
        ) from None
    if any(not math.isfinite(w) or w < 0 for w in weights):
        raise UsageError(f"--obj_weights {text!r}: weights must be finite and not negative")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise UsageError(f"--obj_weights {text!r} sum to {sum(weights):g}; they must sum to 1 (order: {order})")
    return {name: w for name, w in zip(objectives, weights, strict=False) if w > 0}


def overridden(spec, args: Namespace, prefix: str = "", problem: Callable[[str, float], str] | None = None):
    """A dataclass of hyperparameters with what the command line gives of its fields, each as `prefix` + its name.

    Args:
        problem: what is wrong with a number of that name, or ""; such a number is a UsageError.
    """
    names = [f.name for f in dataclasses.fields(spec)]
    given = {n: getattr(args, prefix + n) for n in names if getattr(args, prefix + n, None) is not None}
    for name, value in given.items() if problem else ():
        if text := problem(name, value):
            raise UsageError(f"--{prefix}{name} {text}")
    return dataclasses.replace(spec, **given)


def parse_front(text: str, points: int, objectives: Sequence[str]) -> list[dict[str, float]]:
    """`help,harm` to weights that are evenly spaced between the two, the first one's from 0 to 1; zeros are left out.

    `all` is every pair of the objectives, one after the other; a point that two pairs share is named once.

    Raises:
        UsageError: not two objectives of the data set, or fewer than two points.
    """
    if points < 2:
        raise UsageError(f"--points must be at least 2, the ends of the front, got {points}")
    if text.strip() == "all":
        pairs = [f"{a},{b}" for a, b in itertools.combinations(objectives, 2)]
        found = [point for pair in pairs for point in parse_front(pair, points, objectives)]
        return [point for i, point in enumerate(found) if point not in found[:i]]
    names = [n.strip() for n in text.split(",")]
    for name in names:
        if name not in objectives:
            raise UsageError(f"--front {text!r}: unknown objective {name!r}; {nearest(name, ['all', *objectives])}")
    if len(names) != 2 or names[0] == names[1]:
        raise UsageError(f"--front {text!r} must name two different objectives of {','.join(objectives)}, or all")
    steps = points - 1
    pairs = [dict(zip(names, (i / steps, (steps - i) / steps), strict=True)) for i in range(points)]
    return [{name: pair[name] for name in objectives if pair.get(name)} for pair in pairs]


def parse_iterations(text: str, weights: dict[str, float], objectives: Sequence[str]) -> dict[str, int]:
    """`1,,0` to {objective: iteration of its value model}; one number alone stands for all weighted objectives.

    Raises:
        UsageError: an iteration is missing for a weighted objective, or is no whole number of at least 0.
    """
    cells = [c.strip() for c in str(text).split(",")]
    if len(cells) == 1 and cells[0]:
        cells = cells * len(objectives)
    if len(cells) > len(objectives):
        raise UsageError(
            f"--value_model_iter {text!r} has {len(cells)} places for the objectives {','.join(objectives)}"
        )
    cells += [""] * (len(objectives) - len(cells))
    iterations = {}
    for name, cell in zip(objectives, cells, strict=True):
        if name not in weights:
            continue
        if not cell.isdecimal():
            raise UsageError(
                f"--value_model_iter {text!r}: {name} has a weight and needs an iteration (0, 1, ...), got {cell!r}"
            )
        iterations[name] = int(cell)
    return iterations


def same_iteration(text: str) -> str:
    """`--value_model_iter` as it is put on record: one number where all that are given are one, however it was said."""
    cells = [c.strip() for c in str(text).split(",")]
    given = {int(c) for c in cells if c}
    return str(given.pop()) if len(given) == 1 else ",".join(str(int(c)) if c else "" for c in cells)


def pin_gpu(device: str | None) -> None:
    """Show this process the one GPU that --device names (else the first), unless a launcher shares them out.

    The trainer would otherwise spread a batch over every GPU that it sees. To be called before CUDA starts.
    """
    if "LOCAL_RANK" in os.environ or (device and not device.startswith("cuda")):
        return
    index = (device or "cuda").partition(":")[2] or "0"
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    if visible and index.isdigit() and int(index) >= len(visible):
        raise UsageError(f"--device {device}: this process sees {len(visible)} CUDA devices")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(index)] if visible and index.isdigit() else index


def pick_one_gpu(name: str | None):
    """The device of this process, for a library's trainer: GPUs that --device does not name are out of its sight."""
    pin_gpu(name)
    from utils import models

    on_gpu = name is not None and name.startswith("cuda")
    device = models.pick_device(None if on_gpu else name)
    if on_gpu and device.type != "cuda":
        raise UsageError(f"--device {name}: there is no such CUDA device here")
    return device


def report_dry_run(rows: Iterable[tuple[str, str, str]]) -> None:
    """Print what a stage would load or make: (what, path or name, where it is found or what makes it)."""
    from utils.sharding import this_process

    if this_process().first:
        print("\n".join(aligned([("what", "path", "found"), *rows])))


def aligned(rows: Sequence[Sequence]) -> list[str]:
    """Rows of equally many cells as lines whose columns stand below each other."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown_rows(header: Sequence, rows: Sequence[Sequence]) -> str:
    """A Markdown table of cells of any kind."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in lines)


def found(path: str, made_by: str = "") -> str:
    """Where a model or folder would come from, for `report_dry_run`."""
    if os.path.exists(path):
        return "here"
    if made_by:
        return f"missing; made by: {made_by}"
    return "Hub" if str(path).count("/") == 1 and not str(path).startswith((".", "/")) else "missing"


def progress(iterable=None, *, total: int | None = None, desc: str = "", unit: str = "it"):
    """A tqdm bar on stderr with what is done and the time left; quiet when stderr is no terminal, and in all processes
    but the first.

    `bar.tokens(n)` counts n more tokens, and shows how many there are per second.
    """
    from tqdm import tqdm

    from utils.sharding import this_process

    class Bar(tqdm):
        seen, began, shown = 0, time.monotonic(), 0.0

        def tokens(self, count: int) -> None:
            self.seen += count
            now = time.monotonic()
            if self.disable or now - self.shown < 0.5:
                return
            self.shown = now
            self.set_postfix_str(f"{self.seen / max(now - self.began, 1e-9):,.0f} tokens/s")

    quiet = not sys.stderr.isatty() or not this_process().first
    return Bar(iterable, total=total, desc=desc, unit=unit, disable=quiet, leave=False)


def quiet_libraries() -> None:
    """Keep libraries' load reports, progress bars and notes about retries out of a stage's output."""
    import logging as standard_logging
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.getLogger("huggingface_hub").setLevel(standard_logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def objectives_of(dataset, name: str) -> list[str]:
    """`all`, one name or several with commas, to objectives of a data set."""
    if name == "all":
        return list(dataset.objectives)
    names = [n.strip() for n in name.split(",") if n.strip()]
    for n in names:
        if n not in dataset.objectives:
            raise UsageError(f"unknown objective {n!r} of {dataset.name}; {nearest(n, (*dataset.objectives, 'all'))}")
    if not names:
        raise UsageError("no objective was named")
    return names
