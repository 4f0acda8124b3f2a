#!/usr/bin/env python
"""Iteration 0's data: trees of responses under the reference policy.

    python get_data_base.py START NUM --dataset anthropic

grows the trees of prompts START .. START + NUM - 1 of the train split into <workspace>/tree_data/<dataset>/iter_0.
Killed, the same command goes on where it stopped; several processes may fill one folder with disjoint ranges.
"""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

from utils import cli


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("start", metavar="START", type=int, help="index of the first prompt")
    parser.add_argument("num", metavar="NUM", type=int, help="number of prompts")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="anthropic", help="a data set of the configuration")
    group.add_argument("--data_split", default="train", help="which split's prompts")
    group.add_argument("--output_dir", type=Path, help="folder of the trees (default: <workspace>/tree_data/<dataset>/iter_0)")
    group = parser.add_argument_group("trees (None: the configuration's)")
    group.add_argument("--root_children", type=int, help="children of the root")
    group.add_argument("--non_root_children", type=int, help="children of every other inner node")
    group.add_argument("--num_layers", type=int, help="layers below the root")
    group.add_argument("--max_new_tokens", type=int, help="tokens from the prompt's end to a leaf")
    group = parser.add_argument_group("decoding (None: the configuration's)")
    group.add_argument("--temperature", type=float, help="divides the logits")
    group.add_argument("--topk", type=int, help="candidates per step")
    group.add_argument("--seed", type=int, default=0, help="base seed")
    group.add_argument("--seed_increment", type=int, default=0, help="added to the seed, for another set of trees")
    group.add_argument("--batch_size", type=int, help="segments that grow at a time")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    output_dir = args.output_dir or config.default_path("tree_data", dataset.name, "iter_0")
    from utils.data import prompts_csv

    if args.dry_run:
        csv = prompts_csv(config, dataset, args.data_split)
        cli.report_dry_run(
            [
                ("reference", config.sft_path(dataset), cli.found(config.sft_path(dataset), "Finetuning/SFT/sft.py")),
                ("prompts", csv, cli.found(str(csv), f"dataset_preprocess.py {dataset.name} --split {args.data_split}")),
                ("trees", output_dir, "made by this stage"),
            ]
        )
        return 0
    if args.start < 0 or args.num < 1:
        raise cli.UsageError(f"START must be at least 0 and NUM at least 1, got {args.start} {args.num}")

    from utils.collection import Collection

    return Collection.under_reference(config, dataset, args, output_dir).run()


if __name__ == "__main__":
    sys.exit(cli.run(main))
