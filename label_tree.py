#!/usr/bin/env python
"""Label trees: score every leaf with the objectives' reward models and back the values up to every node.

    python label_tree.py DIR <objective|all> --dataset anthropic
    python label_tree.py DIR <objective|all> --dataset anthropic --soft    # for soft values, iterations above 0

Trees that have the values already are skipped, so that a killed run is completed by the same command. Several
processes (accelerate launch) share the trees; --soft values are then written by the first of them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction
from functools import cache
from pathlib import Path

from utils import cli
from utils.errors import DataError, UsageError
from utils.places import reward_rows
from utils.sharding import claims_of, forget, refuse_several, this_process


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data_dir", metavar="DIR", type=Path, help="folder of trees, as get_data_base.py makes it")
    parser.add_argument("objective", help="an objective of the data set, several with commas between, or all")
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--check_trees", action="store_true", help="only check that every tree is sound and labelled")
    group = parser.add_argument_group(
        "soft values: value - eta * expected log-ratio (train_value_model.py --KL_penalty)"
    )
    group.add_argument(
        "--soft", action="store_true", help="write each node's expected log-ratio too (label_tree_soft.py)"
    )
    group.add_argument(
        "--log_ratio",
        choices=("future", "whole"),
        default="future",
        help="from the node on, as a soft value is defined, or the whole sequence's, as published (default: future)",
    )
    parser.add_argument("--relabel", action="store_true", help="score again what has values already")
    parser.add_argument("--batch_size", type=int, default=32, help="texts per reward model's batch (default: 32)")
    parser.add_argument(
        "--chunk",
        type=int,
        default=32,
        help="prompts whose trees are scored together, and what one of several processes takes at a time (default: 32)",
    )
    parser.add_argument("--bf16", action=BooleanOptionalAction, default=False, help="run the reward models in bfloat16")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    objectives = cli.objectives_of(dataset, args.objective)
    args.data_dir = config.find(args.data_dir)
    for flag in ("batch_size", "chunk"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    process = this_process()
    if args.relabel:
        refuse_several("--relabel", "what has new values already cannot be told from what has old ones")
    if args.dry_run:
        trees = ("trees", args.data_dir, cli.found(str(args.data_dir), "get_data_base.py"))
        cli.report_dry_run([trees, *reward_rows(config, objectives)])
        return 0
    from utils.hdf5_utils import read_trees, tree_indices

    if not tree_indices(args.data_dir):
        raise DataError(
            f"no trees in {args.data_dir}; make them with get_data_base.py ... --output_dir {args.data_dir}"
        )
    if args.check_trees:
        return 0 if not process.first else _check(args.data_dir, objectives, read_trees)

    from utils.labelling import label_softly, label_trees, variance_within
    from utils.models import load_tokenizer, pick_device
    from utils.rewards import RewardSet
    from utils.tracking import Tracker

    device, options = pick_device(args.device), {"batch_size": args.batch_size, "autocast": args.bf16}
    rewards = cache(lambda: RewardSet(config, dataset, objectives, device=device, **options))
    tokenizer = load_tokenizer(config.sft_path(dataset))
    claimed = args.data_dir / "claims" / f"labels-{'-'.join(objectives)}-{args.chunk}"
    with Tracker(args.wandb and process.first, "label_tree", settings={"data_dir": str(args.data_dir)}) as tracker:
        with claims_of(process, claimed) as claims:
            sharing = {"chunk": args.chunk, "claims": claims, "wait": process.first}
            own = label_trees(args.data_dir, objectives, rewards, tokenizer, args.relabel, **sharing)
            labelled = sum(1 for _ in own)
        if not process.first:
            return 0
        forget(claimed)
        trees = list(read_trees(args.data_dir))
        if args.soft:
            _report_soft(label_softly(args.data_dir, trees, args.log_ratio), args.log_ratio)
        spread = {name: variance_within(trees, name) for name in objectives}
        tracker.summary({"trees": len(trees), "labelled": labelled, "leaves": sum(len(t.leaves) for t in trees)})
        for name, (total, within) in spread.items():
            tracker.summary({name: {"standard_deviation": total**0.5, "share_within_prompt": within}})
    others = "had their values or got them from other processes" if process.several else "had their values"
    print(f"{labelled} trees labelled, {len(trees) - labelled} {others}; {sum(len(t.leaves) for t in trees)} leaves")
    for name, (total, within) in spread.items():
        print(
            f"  {name}: standard deviation of the leaves {total**0.5:.3f}, "
            f"share of the variance within a prompt {within:.2f}"
        )
    return 0


def _report_soft(expected, mode: str) -> None:
    """What soft values pay for, at the roots and over all other nodes."""
    import numpy as np

    below = np.concatenate([e[1:] for e in expected])
    print(
        f"expected log-ratio ({mode}): {np.mean([e[0] for e in expected]):.3f} nats at the roots, "
        f"{below.mean():.3f} (standard deviation {below.std():.3f}) below them"
    )


def _check(data_dir: Path, objectives, read_trees) -> int:
    """Read every tree, which checks it, and see that it has the objectives' values."""
    count = nodes = 0
    for tree in read_trees(data_dir):
        missing = [o for o in objectives if o not in tree.values]
        if missing:
            raise DataError(
                f"prompt {tree.prompt_index} in {data_dir} has no values of {', '.join(missing)}; "
                f"label it with label_tree.py {data_dir} {missing[0]}"
            )
        count, nodes = count + 1, nodes + len(tree)
    print(f"{count} trees, {nodes} nodes: all sound and labelled with {', '.join(objectives)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
