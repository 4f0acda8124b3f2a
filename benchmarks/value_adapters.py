#!/usr/bin/env python
"""MAVIS with 1, 2 and 3 value models that are LoRA adapters: apart, merged, and stacked on one base.

    python benchmarks/value_adapters.py --config smollm --batch_size 1 8 32 \\
        --output benchmarks/results/value_adapters_smollm_cpu.json

`apart`: each value model is a base with its adapter as PEFT leaves it. `merged`: each is a base with the adapter added
into its weights. `stacked`: one base reads a copy of every text for each adapter (`shared_base.AdapterStack`). The
adapters are random, of the configuration's rank: what they say does not matter for the time that it takes. All kinds
run in turns in one process; ratios are of the medians.
"""

from __future__ import annotations

import copy
import statistics
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import (
    add_decoding_arguments,
    answer,
    conditions,
    in_turns,
    keep,
    random_prompts,
    reference_row,
)
from utils import cli

KINDS = ("apart", "merged", "stacked")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add_decoding_arguments(parser, max_new_tokens=16)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    if args.dry_run:
        base = config.locate(config.value_model.path)
        what = ("base of the value models", base, cli.found(base, config.value_model.made_by))
        cli.report_dry_run([reference_row(config, dataset), what])
        return 0

    from utils.models import load_reference, pick_device, vocabulary_size

    device = pick_device(args.device)
    reference, tokenizer = load_reference(config, dataset, device)
    models = value_models(config, tokenizer, vocabulary_size(reference), device)
    rows: list[dict] = []
    for batch_size in args.batch_size:
        rows += measure(reference, models, batch_size, args, device)
    record = {
        "rows": rows,
        **conditions("benchmarks/value_adapters.py", argv, device, reference.dtype),
        "lora_rank": config.value_model.lora.r,
        "mebibytes": {f"{kind}_{n}": mebibytes(models[kind][:n]) for kind in KINDS for n in (1, 2, 3)},
        "settings": {k: getattr(args, k) for k in ("prompt_tokens", "max_new_tokens", "topk", "rounds")},
    }
    print(f"{record['device']}, {record['dtype']}")
    print("\n".join(cli.aligned([list(rows[0]), *([str(v) for v in row.values()] for row in rows)])))
    keep(record, args.output)
    return 0


def value_models(config, tokenizer, vocab_size: int, device) -> dict[str, list]:
    """Three value models of each kind, the same ones."""
    import torch

    from utils.models import pick_dtype
    from utils.shared_base import AdapterStack
    from utils.value_models import new_value_model

    dtype, stack = pick_dtype(config, device), AdapterStack()
    found: dict[str, list] = {kind: [] for kind in KINDS}
    for seed in range(3):
        model = new_value_model(config, tokenizer, vocab_size, torch.device("cpu"), seed=seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name or "score" in name:
                    p.normal_(0.0, 0.02)
        found["apart"].append(copy.deepcopy(model).to(device, dtype).eval())
        found["merged"].append(copy.deepcopy(model).merge_and_unload().to(device, dtype).eval())
        found["stacked"].append(stack.add(model, device, dtype))
    return found


def measure(reference, models, batch_size: int, args, device) -> list[dict]:
    """One row per number of value models and kind."""
    from utils.policies import MavisPolicy, ReferencePolicy

    prompts = random_prompts(reference, batch_size, args.prompt_tokens)

    def run(policy) -> int:
        return answer(policy, prompts, args.max_new_tokens)

    def steered(kind: str, n: int) -> int:
        return run(MavisPolicy(reference, models[kind][:n], [1.0 / n] * n, beta=4.0, top_k=args.topk))

    methods = {"reference": lambda: run(ReferencePolicy(reference, top_k=args.topk))}
    for n in (1, 2, 3):
        methods |= {f"{kind}_{n}": lambda kind=kind, n=n: steered(kind, n) for kind in KINDS}
    seconds, generated = in_turns(methods, args.rounds, device)
    speeds = {name: [generated[name] / s for s in times] for name, times in seconds.items()}
    median = {name: statistics.median(s) for name, s in speeds.items()}
    return [
        {
            "kind": kind,
            "value_models": n,
            "batch_size": batch_size,
            "tokens_per_second": round(median[f"{kind}_{n}"], 2),
            "range": [round(min(speeds[f"{kind}_{n}"]), 2), round(max(speeds[f"{kind}_{n}"]), 2)],
            "ratio_to_merged": round(median[f"{kind}_{n}"] / median[f"merged_{n}"], 3),
            "ratio_to_reference": round(median[f"{kind}_{n}"] / median["reference"], 3),
        }
        for n in (1, 2, 3)
        for kind in KINDS
    ]


def mebibytes(models) -> int:
    """Memory of the models' weights, those that they share counted once; stacked, as if they were the stack's only
    members and read together."""
    from utils.shared_base import StackedLinear

    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    for model in models:
        for layer in (m for m in model.modules() if isinstance(m, StackedLinear)):
            layer.use(tuple(range(len(models))))  # and not what another number of members used last
            tensors += [t for update in layer.updates[: len(models)] if update is not None for t in update]
            tensors += [] if layer.active is None else layer.active
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(kept.values()) // 2**20


if __name__ == "__main__":
    sys.exit(cli.run(main))
