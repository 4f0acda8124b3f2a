"""Collecting trees into a data folder: what is there is skipped, what is missing is grown, nothing is half-written."""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils import cli
from utils.config import Config, DatasetSpec
from utils.trees import Tree

CHUNK = 64  # prompts whose trees grow together: what a process takes at a time, and may lose when it is killed


def add_collection_arguments(parser: ArgumentParser) -> None:
    """The arguments that all data collection shares."""
    parser.add_argument("start", metavar="START", type=int, help="index of the first prompt")
    parser.add_argument("num", metavar="NUM", type=int, help="number of prompts")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    group.add_argument("--data_split", default="train", help="which split's prompts (default: train)")
    group.add_argument(
        "--output_dir", type=Path, help="folder of the trees (default: below <workspace>/tree_data/<dataset>)"
    )
    group = parser.add_argument_group("trees")
    group.add_argument("--root_children", type=int, help="children of the root")
    group.add_argument("--non_root_children", type=int, help="children of every other inner node")
    group.add_argument("--num_layers", type=int, help="layers below the root")
    group.add_argument(
        "--max_new_tokens", type=int, help="tokens from the prompt's end to a leaf (default: the data set's)"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=float, help="divides the logits (default: the configuration's)")
    group.add_argument("--topk", type=int, help="candidates per step (default: the configuration's)")
    group.add_argument("--seed", type=int, default=0, help="base seed (default: 0)")
    group.add_argument(
        "--seed_increment", type=int, default=0, help="added to the seed, for another set of trees (default: 0)"
    )
    group.add_argument("--batch_size", type=int, help="segments that grow at a time (default: the configuration's)")
    group.add_argument(
        "--chunk",
        type=int,
        default=CHUNK,
        help=f"prompts whose trees grow together, and what one of several processes takes at a time (default: {CHUNK})",
    )
    cli.add_common(parser)


def dry_run(config: Config, dataset: DatasetSpec, args: Namespace, output_dir: Path, more=()) -> int:
    """Print what the collection would load."""
    from utils.data import prompts_csv
    from utils.places import reference_path

    check_arguments(dataset, args)
    csv = prompts_csv(config, dataset, args.data_split)
    reference, made_by = reference_path(config, dataset)
    cli.report_dry_run(
        [
            ("reference", reference, cli.found(reference, made_by)),
            (
                "prompts",
                str(csv),
                cli.found(str(csv), f"dataset_preprocess.py {dataset.name} --split {args.data_split}"),
            ),
            *more,
            ("trees", str(output_dir), "made by this stage"),
        ]
    )
    return 0


def check_arguments(dataset: DatasetSpec, args: Namespace) -> None:
    """Raise a UsageError (or a ConfigError for the split) unless every number can be meant."""
    from utils.data import split_source

    split_source(dataset, args.data_split)
    if args.start < 0 or args.num < 1:
        raise cli.UsageError(f"START must be at least 0 and NUM at least 1, got {args.start} {args.num}")
    for name in ("root_children", "non_root_children", "num_layers", "max_new_tokens", "topk", "batch_size", "chunk"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise cli.UsageError(f"--{name} must be at least 1, got {value}")
    if args.temperature is not None and not (math.isfinite(args.temperature) and args.temperature > 0):
        raise cli.UsageError(f"--temperature must be a finite number above 0, got {args.temperature}")


def rounded(tree: Tree) -> Tree:
    """The tree as it is kept: log-ratios as far as they do not depend on which trees grew beside it."""
    from utils.decoding import LOG_RATIO_DECIMALS

    return replace(tree, log_ratio=np.round(tree.log_ratio, LOG_RATIO_DECIMALS))


def collect(
    config: Config,
    dataset: DatasetSpec,
    args: Namespace,
    output_dir: Path,
    *,
    shape: Mapping,
    policy: Mapping,
    build: Callable,
) -> int:
    """Grow the trees of prompts START .. START + NUM - 1 that a folder does not have yet.

    Several processes share the range, `--chunk` prompts at a time; the first of them brings the tokens together.

    Args:
        shape: TreeShape's fields; arguments that were given override them.
        policy: what the folder records of the policy; another policy's folder is refused.
        build: (reference, tokenizer, device, top_k, temperature) -> policy.

    Raises:
        UsageError, DataError: a range without prompts, a folder made with other arguments, a prompt without room.
    """
    from utils.data import encode_prompts, prompts_csv, read_prompts
    from utils.growth import TreeShape, grow_trees
    from utils.hdf5_utils import (
        claim_collection,
        consolidate,
        stored_indices,
        tree_path,
        write_discarded,
        write_tree,
    )
    from utils.models import load_reference, pick_device
    from utils.runs import fingerprint
    from utils.sharding import Alone, chunks, claims_of, forget, share, this_process
    from utils.tracking import Tracker

    process = this_process()
    check_arguments(dataset, args)
    fields = {"max_new_tokens": dataset.max_new_tokens, **shape}
    fields |= {
        k: getattr(args, k)
        for k in ("root_children", "non_root_children", "num_layers", "max_new_tokens")
        if getattr(args, k) is not None
    }
    tree_shape = TreeShape(**fields)
    temperature = config.decoding.temperature if args.temperature is None else args.temperature
    top_k = config.decoding.top_k if args.topk is None else args.topk
    seed = args.seed + args.seed_increment
    texts = read_prompts(prompts_csv(config, dataset, args.data_split), config)
    if args.start >= len(texts):
        raise cli.DataError(
            f"START {args.start} is behind the last of the {len(texts)} prompts of {dataset.name} {args.data_split}"
        )
    made_with = {
        **policy,
        "reference": fingerprint(config.sft_path(dataset)),
        "dataset": dataset.name,
        "data_split": args.data_split,
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
        **{name: value for name, value in vars(tree_shape).items() if value is not False},
    }
    claim_collection(output_dir, made_with, only_check=True)
    if output_dir.is_dir() and process.first:
        consolidate(output_dir)  # a damaged store is found now, not behind hours of growth
    known = set(stored_indices(output_dir))
    wanted = list(range(args.start, min(args.start + args.num, len(texts))))
    missing = [i for i in wanted if i not in known]
    began, tokens, grown, discarded = time.time(), 0, 0, 0
    bar = cli.progress(total=len(missing), desc="trees", unit="prompt")

    def count(n: int) -> None:
        nonlocal tokens
        tokens += n
        bar.tokens(n)

    tracker = Tracker(False, "")
    if missing:
        device = pick_device(args.device)
        reference, tokenizer = load_reference(config, dataset, device)
        decoder = build(reference, tokenizer, device, top_k, temperature)
        room = None if decoder.context is None else decoder.context - tree_shape.max_new_tokens
        if room is not None and room < 1:
            raise cli.DataError(
                f"--max_new_tokens {tree_shape.max_new_tokens} leaves no room for a prompt: the models attend to "
                f"{decoder.context} tokens"
            )
        encoded = dict(zip(missing, encode_prompts(dataset, tokenizer, [texts[i] for i in missing], room), strict=True))
        wandb, name = args.wandb and process.first, f"trees_{output_dir.name}"
        tracker = Tracker(wandb, f"trees_{policy['policy']}", name, made_with)
        claim_collection(output_dir, made_with)  # not before everything is loaded: a failure leaves no folder

    def lacking(unit: list[int]) -> list[int]:
        """The prompts of a unit that no process has done."""
        return [i for i in unit if i not in known and tree_path(output_dir, i) is None]

    def grow(unit: list[int]) -> None:
        nonlocal grown, discarded
        for tree in grow_trees(
            decoder,
            {i: encoded[i] for i in lacking(unit)},
            dict(enumerate(texts)),
            tree_shape,
            seed=seed,
            eos_token_id=tokenizer.eos_token_id,
            batch_size=config.decoding.batch_size if args.batch_size is None else args.batch_size,
            on_tokens=count,
        ):
            if tree.depth.max() < min(2, tree_shape.num_layers):
                discarded += 1
                write_discarded(output_dir, tree.prompt_index, tree.prompt, "no segment reached a second layer")
            else:
                grown += 1
                write_tree(output_dir, rounded(tree))
            bar.update(1)

    claimed = output_dir / "claims" / f"{args.start}-{args.num}-{args.chunk}"
    try:
        with claims_of(process, claimed) if missing else Alone() as claims:
            for unit in share(
                chunks(wanted, args.chunk), done=lambda unit: not lacking(unit), claims=claims, wait=process.first
            ):
                grow(unit)
                rate = tokens / max(time.time() - began, 1e-9)
                tracker.log({"trees": grown, "discarded": discarded, "tokens": tokens, "tokens_per_second": rate})
        if process.first:
            forget(claimed)
    finally:
        bar.close()
        total = consolidate(output_dir) if process.first else 0
        tracker.summary({"trees_in_folder": total})
        tracker.finish()
    if not process.first:
        return 0
    seconds = time.time() - began
    which = f"{process}: " if process.several else ""
    print(
        f"{which}{grown} trees grown, {discarded} discarded (no second layer), {tokens} tokens in {seconds:.0f} s "
        f"({tokens / max(seconds, 1e-9):.0f} tokens/s); {output_dir} holds {total} trees"
    )
    return 0
