#!/usr/bin/env python
"""Lay labelled trees out for training: the first prompts to val/, the rest to train/.

    python split_data.py <workspace>/tree_data/anthropic/iter_0 --dataset anthropic

makes <workspace>/data_for_training/<dataset>/iter_0 with all_tokens.hdf5, train/ and val/. Run it again after labelling
again: the copies follow.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from utils import cli
from utils.errors import UsageError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data_dir", metavar="DIR", type=Path, help="folder of labelled trees")
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--num_val", type=int, help="prompts for validation (default: the configuration's)")
    parser.add_argument(
        "--output_dir", type=Path, help="where to (default: <workspace>/data_for_training/<dataset>/<name of DIR>)"
    )
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    args.data_dir = config.find(args.data_dir)
    output_dir = args.output_dir or config.default_path("data_for_training", dataset.name, args.data_dir.resolve().name)
    if args.num_val is not None and args.num_val < 1:
        raise UsageError(f"--num_val must be at least 1, got {args.num_val}")
    if output_dir.resolve() == args.data_dir.resolve():
        raise UsageError(f"--output_dir {output_dir} is the folder of the trees; give another")
    if args.dry_run:
        cli.report_dry_run(
            [
                ("trees", args.data_dir, cli.found(str(args.data_dir), "label_tree.py")),
                ("data", output_dir, "made by this stage"),
            ]
        )
        return 0
    from utils.hdf5_utils import split_folder
    from utils.tracking import Tracker

    num_val = dataset.num_val_prompts if args.num_val is None else args.num_val
    train, val = split_folder(args.data_dir, output_dir, num_val)
    with Tracker(args.wandb, "split_data", settings={"data_dir": str(args.data_dir)}) as tracker:
        tracker.summary({"train": train, "val": val})
    print(f"{train} trees in {output_dir / 'train'}, {val} in {output_dir / 'val'}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
