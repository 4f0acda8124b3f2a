"""What benchmarks share: methods measured in turns, and what they were measured on."""

from __future__ import annotations

import platform
import resource
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from utils import cli
from utils.costs import Shape, cache_bytes
from utils.errors import DataError
from utils.files import write_json
from utils.places import reference_path


def in_turns(
    methods: Mapping[str, Callable[[], int]], rounds: int, device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each method's calls, one a round and all methods in every round; a round before them warms up.

    Returns:
        {method: seconds (rounds,)}, and what each method returned last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    returned: dict[str, int] = {}
    for round_ in cli.progress(range(rounds + 1), desc="rounds", unit="round"):
        for name, method in methods.items():
            synchronize(device)
            start = time.perf_counter()
            returned[name] = method()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds, returned


def add_decoding_arguments(parser: ArgumentParser, *, max_new_tokens: int) -> None:
    """What benchmarks of decoding are asked for, and their output."""
    parser.add_argument("--dataset", default="anthropic", help="whose reference and objectives")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 32], help="rows")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument(
        "--max_new_tokens", type=int, default=max_new_tokens, help="tokens of each answer, all of this length"
    )
    parser.add_argument("--topk", type=int, default=15, help="candidates per step")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each method")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    cli.add_common(parser)


def reference_row(config, dataset) -> tuple[str, str, str]:
    """What a benchmark of decoding loads, for `cli.report_dry_run`."""
    path, made_by = reference_path(config, dataset)
    return "reference", path, cli.found(path, made_by)


def random_prompts(reference, rows: int, tokens: int):
    """(rows, tokens) token ids, the same in every run; of the vocabulary's first half, behind its special tokens."""
    import torch

    half = reference.get_input_embeddings().num_embeddings // 2
    return torch.randint(10, half, (rows, tokens), generator=torch.Generator().manual_seed(0))


def answer(policy, prompts, max_new_tokens: int) -> int:
    """Answer prompts (B, L) in one batch, none ending early; returns the number of tokens."""
    from utils.decoding import decode

    keys = [(0, i) for i in range(len(prompts))]
    how = {"max_new_tokens": max_new_tokens, "eos_token_id": None, "batch_size": len(prompts)}
    tokens = sum(len(c.token_ids) for c in decode(policy, prompts.tolist(), keys=keys, **how))
    policy.open(1)  # its caches go, so that those of all methods need not fit at once
    return tokens


def random_llama(shape: Shape, kind: str, device, dtype, *, num_layers: int | None = None, seed: int = 0, **config):
    """A Llama of that shape with random weights, made on its device: "causal" or, with a scalar head, "value".

    Raises:
        DataError: the shape is no Llama's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    if shape.mlp_matrices != 3 or not shape.causal or shape.encoder_layers:
        raise DataError("--random_weights makes Llamas, and the configuration's model has another architecture")
    made = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_size,
        num_hidden_layers=shape.layers if num_layers is None else num_layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=4096, num_labels=1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, dtype=dtype, **config,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return (LlamaForCausalLM if kind == "causal" else LlamaForSequenceClassification)(made).eval()
    finally:
        torch.set_default_dtype(default)


def bandwidth(device) -> float:
    """Bytes a second that the device's memory moves, by copying: read and written ones; the best of some."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def streamed_bytes(model, context: float) -> float:
    """Bytes that one new token of one text must move: the model's matrices, its keys and values of `context` tokens.

    Of an embedding table that is no head, one row is read.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    table, head = model.get_input_embeddings().weight, getattr(model, "lm_head", None)
    if head is None or head.weight is not table:
        weights -= table.numel() * table.element_size()
    return weights + cache_bytes(model.config, context, width=table.element_size())


def keep(record: Mapping, output: Path | None) -> None:
    """Write what was measured, where a file was named."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, record)


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
