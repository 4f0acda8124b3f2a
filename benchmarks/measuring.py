"""What benchmarks share: methods measured in turns, and what they were measured on."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def in_turns(
    methods: Mapping[str, Callable[[], int]], rounds: int, device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each method's calls, one a round and all methods in every round; a round before them warms up.

    Returns:
        {method: seconds (rounds,)}, and what each method returned last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    returned: dict[str, int] = {}
    for round_ in range(rounds + 1):
        for name, method in methods.items():
            synchronize(device)
            start = time.perf_counter()
            returned[name] = method()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds, returned


def conditions(script: str, argv: Sequence[str] | None, device, dtype) -> dict:
    """The command, the device, the precision (a torch.dtype or its name) and the versions of a measurement."""
    import torch
    import transformers

    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    return {
        "command": " ".join(["python", script, *(sys.argv[1:] if argv is None else argv)]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def synchronize(device) -> None:
    """Wait for what a device has been given to do."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device) -> int:
    """Peak memory of the process on its device, MiB."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
