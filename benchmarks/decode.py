#!/usr/bin/env python
"""Decoding speed beside transformers' `generate()` and beside the bare model calls that a step needs.

    python benchmarks/decode.py --config smollm --batch_size 1 8 32 --output benchmarks/results/decode_smollm_cpu.json

    python benchmarks/decode.py --random_weights --batch_size 1 32 --device cuda    # the paper's shapes; no checkpoint

All methods run in turns in one process, several rounds; ratios are taken of the medians. `overhead` is a method's
seconds over the sum of the model calls that it cannot do without: the reference on B tokens after their past, each
value model on B x k tokens after theirs. Below 1 means that ours makes a call cheaper (grouped attention does).
`of_bound`, at batch 1, is the speed over that at which the memory, as fast as a copy is, could stream the weights and
caches that a token needs.
"""

from __future__ import annotations

import functools
import statistics
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import (
    add_decoding_arguments,
    answer,
    bandwidth,
    conditions,
    in_turns,
    keep,
    peak_memory,
    random_llama,
    random_prompts,
    reference_row,
    streamed_bytes,
)
from utils import cli
from utils.places import value_model_folder


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--value_model_dir", help="trained value models (default: the workspace's, fresh ones where there are none)"
    )
    parser.add_argument(
        "--random_weights", action="store_true", help="models of the configuration's shapes with random weights"
    )
    parser.add_argument(
        "--compile", action="store_true", help="norms and MLPs compiled by torch.compile, for all methods alike"
    )
    add_decoding_arguments(parser, max_new_tokens=32)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    if args.dry_run and args.random_weights:
        parts = {"reference": config.base_model.path, "value models": config.value_model.path}
        cli.report_dry_run([(what, path, "its shape, with random weights") for what, path in parts.items()])
        return 0
    if args.dry_run:
        folders = {n: value_model_folder(config, args.value_model_dir, 0, n) for n in dataset.objectives}
        rows = [
            (f"value model of {n}", str(f), "here" if f.is_dir() else "a fresh one is made") for n, f in folders.items()
        ]
        cli.report_dry_run([reference_row(config, dataset), *rows[:3]])
        return 0

    from utils.models import load_reference, pick_device, vocabulary_size

    device = pick_device(args.device)
    if args.random_weights:
        reference, values = random_models(config, device)
    else:
        reference, tokenizer = load_reference(config, dataset, device)
        values = load_values(config, dataset, args.value_model_dir, tokenizer, vocabulary_size(reference), device)
    if args.compile:
        for model in (reference, *values):
            compile_small_layers(model)
    rows, rate = [], bandwidth(device)
    for batch_size in args.batch_size:
        rows += measure(reference, values, batch_size, args, device, rate)
        record = {
            "rows": rows,
            **conditions("benchmarks/decode.py", argv, device, reference.dtype),
            "reference_parameters": sum(p.numel() for p in reference.parameters()),
            "value_model_parameters": sum(p.numel() for p in values[0].parameters()),
            "value_model_backbones": backbones(values),
            "gigabytes_per_second": round(rate / 1e9, 1),
            "peak_memory_mib": peak_memory(device),
            "settings": {k: getattr(args, k) for k in ("prompt_tokens", "max_new_tokens", "topk", "rounds")},
        }
        keep(record, args.output)  # at each batch size: a machine that is lent for minutes may go before the last one
    print_table(record)
    return 0


def random_models(config, device) -> tuple:
    """A reference and three value models, each with weights of its own, of the configuration's shapes."""
    from benchmarks.cost_model import shape_at
    from utils.models import pick_dtype

    dtype, spec = pick_dtype(config, device), config.value_model
    reference = random_llama(shape_at(config, config.base_model.path), "causal", device, dtype)
    shape = shape_at(config, spec.path)
    values = [
        random_llama(shape, "value", device, dtype, num_layers=spec.num_layers, seed=n, value_pooling=spec.pooling)
        for n in range(3)
    ]
    return reference, values


def compile_small_layers(model) -> None:
    """Have torch.compile fuse what lies between a model's matrices and needs no cache; like layers share the code."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("mlp", "input_layernorm", "post_attention_layernorm", "norm"):
            module.compile()


def load_values(config, dataset, value_model_dir, tokenizer, vocab_size, device) -> list:
    """Three value models: trained ones as far as there are any, fresh ones for the rest.

    Trained ones share a backbone where they would in use, which `mavis_3` then reads once.
    """
    from utils.models import pick_dtype
    from utils.value_models import load_value_models, new_value_model

    folders = {name: value_model_folder(config, value_model_dir, 0, name) for name in dataset.objectives}
    trained = [name for name, folder in folders.items() if (folder / "adapter_model.safetensors").is_file()][:3]
    found = load_value_models(config, value_model_dir, dict.fromkeys(trained, 0), tokenizer, vocab_size, device)
    models = list(found.values())
    while len(models) < 3:
        fresh = new_value_model(config, tokenizer, vocab_size, device, seed=len(models)).merge_and_unload()
        models.append(fresh.to(device, pick_dtype(config, device)).eval())
    return models


def backbones(values) -> int:
    """How many models a step of these value models reads: those that share a backbone are read once."""
    from utils.cached_models import backbone_of

    return len({id(backbone_of(v)) for v in values})


def candidate_heads(values, rank: int = 64) -> list:
    """A random candidate head for each value model: what it says does not matter for the time that it takes."""
    import torch

    from utils.candidates import CandidateHead

    heads = []
    for value in values:
        embeddings = value.get_input_embeddings().weight.detach().float()
        sizes = (rank, value.config.hidden_size), (rank, embeddings.shape[1])
        made = [torch.randn(*size, device=embeddings.device) / size[1] for size in sizes]
        heads.append(CandidateHead(embeddings.new_zeros(len(embeddings)), *made, embeddings=embeddings))
    return heads


def steering(reference, values, heads, k: int) -> dict:
    """The policies that are measured, {name: policy}; a policy's recordings serve all its rounds."""
    from utils.policies import CandidatePolicy, MavisPolicy, ReferencePolicy

    tilt = {"beta": 4.0, "top_k": k}
    return {
        "reference": ReferencePolicy(reference, top_k=k),
        "mavis_1": MavisPolicy(reference, values[:1], [1.0], **tilt),
        "mavis_2": MavisPolicy(reference, values[:2], [0.5, 0.5], **tilt),
        "mavis_3": MavisPolicy(reference, values, [0.4, 0.3, 0.3], **tilt),
        "candidates_1": CandidatePolicy(reference, values[:1], heads[:1], [1.0], **tilt),
        "candidates_3": CandidatePolicy(reference, values, heads, [0.4, 0.3, 0.3], **tilt),
    }


def with_graphs(policies: dict) -> dict:
    """The same, with recorded steps."""
    from utils.graphs import graphs_for

    for policy in policies.values():
        policy.graphs = graphs_for(policy.device, True, True)
    return policies


def measure(reference, values, batch_size: int, args, device, rate: float) -> list[dict]:
    """One row per method at a batch size; `rate` is the memory's, bytes a second."""
    import torch

    from utils.growth import TreeShape, grow_trees
    from utils.policies import ReferencePolicy

    tokens, k = args.max_new_tokens, args.topk
    prompts = random_prompts(reference, batch_size, args.prompt_tokens)
    inputs = prompts.to(device)
    models = reference, values, candidate_heads(values), k
    policies = steering(*models)
    if device.type == "cuda":
        policies |= {f"{name}_graphs": policy for name, policy in with_graphs(steering(*models)).items()}

    def plain() -> int:
        with torch.inference_mode():
            reference.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=k,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )
        return batch_size * tokens

    def trees() -> int:
        count = max(1, round(2 * batch_size / 4))
        texts = {i: "" for i in range(count)}
        grown = grow_trees(
            ReferencePolicy(reference, top_k=k),
            {i: prompts[i % batch_size].tolist() for i in range(count)},
            texts,
            TreeShape(4, 2, 3, tokens),
            seed=0,
            eos_token_id=None,
            batch_size=batch_size,
        )
        return sum(len(t) for tree in grown for t in tree.tokens[1:])

    methods: dict[str, Callable[[], int]] = {
        "generate": plain,
        **{name: functools.partial(answer, policy, prompts, tokens) for name, policy in policies.items()},
        "trees": trees,
        "bare reference": lambda: bare(reference, inputs, 1, tokens - 1),
        "bare value model": lambda: bare(values[0].model, inputs, k, tokens),
        "bare value model, 1 token": lambda: bare(values[0].model, inputs, 1, tokens),
    }
    seconds, generated = in_turns(methods, args.rounds, device)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    # Of each method that answers, the value models that a step reads.
    read = {"generate": 0} | {name: len(policy.value_readers) for name, policy in policies.items()}

    def needed(name: str) -> float:
        queries = "bare value model, 1 token" if name.startswith("candidates") else "bare value model"
        return median["bare reference"] + read[name] * median[queries]

    speed = {name: generated[name] / median[name] for name in methods}
    context = args.prompt_tokens + tokens / 2
    streamed = [streamed_bytes(reference, context), streamed_bytes(values[0], context)]

    def of_bound(name: str) -> float | None:
        if batch_size > 1 or name not in read:
            return None
        return round(speed[name] * (streamed[0] + read[name] * streamed[1]) / rate, 3)

    return [
        {
            "method": name,
            "batch_size": batch_size,
            "tokens_per_second": round(speed[name], 2),
            "tokens_per_second_range": [
                round(generated[name] / s, 2) for s in (max(seconds[name]), min(seconds[name]))
            ],
            "ratio_to_generate": round(speed[name] / speed["generate"], 3),
            "ratio_to_reference": round(speed[name] / speed["reference"], 3),
            "overhead": round(median[name] / needed(name), 3) if name in read else None,
            "of_bound": of_bound(name),
        }
        for name in (*read, "trees")
    ]


def bare(model, inputs, queries: int, steps: int) -> int:
    """The model calls alone: the prompt once, then `steps` calls on `queries` tokens, one of which is kept."""
    import torch
    from transformers import DynamicCache

    step = inputs[:, :1].expand(-1, queries).contiguous()
    head = {"logits_to_keep": 1} if hasattr(model, "lm_head") else {}
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(input_ids=inputs, past_key_values=cache, use_cache=True, **head)
        for _ in range(steps):
            model(input_ids=step, past_key_values=cache, use_cache=True, **head)
            if queries > 1:
                cache.crop(-(queries - 1))
    return inputs.shape[0] * steps


def print_table(record: dict) -> None:
    """The rows, and what they were measured on."""
    print(f"{record['device']}, {record['dtype']}, peak memory {record['peak_memory_mib']} MiB")
    print(
        f"{'method':<12} {'batch':>5} {'tokens/s':>10} {'range':>17} "
        f"{'/ generate':>11} {'/ reference':>12} {'overhead':>9} {'/ bound':>8}"
    )
    for row in record["rows"]:
        low, high = row["tokens_per_second_range"]
        overhead, bound = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("overhead", "of_bound"))
        print(
            f"{row['method']:<12} {row['batch_size']:>5} {row['tokens_per_second']:>10.1f} "
            f"{f'{low:.1f} - {high:.1f}':>17} "
            f"{row['ratio_to_generate']:>11.2f} {row['ratio_to_reference']:>12.2f} {overhead:>9} {bound:>8}"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
