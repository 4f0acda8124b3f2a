#!/usr/bin/env python
"""Iteration 0's data: trees of responses under the reference policy.

    python get_data_base.py START NUM --dataset anthropic

grows the trees of prompts START .. START + NUM - 1 of the train split into <workspace>/tree_data/<dataset>/iter_0.
Killed, the same command goes on where it stopped. Several processes (accelerate launch) share a range, and others may
fill the folder with other ranges: docs/scale.md. The shape of the trees is the configuration's unless it is given.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from utils import cli
from utils.collection import add_collection_arguments, collect, dry_run
from utils.errors import UsageError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_collection_arguments(parser, num_default="all of the configuration's trees.num_prompts from START on")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    if args.num is None:
        wanted = dataset.trees.num_prompts
        args.num = wanted - args.start
        if args.num < 1:
            raise UsageError(f"START {args.start} leaves none of trees.num_prompts: {wanted}; give NUM")
    output_dir = args.output_dir or config.default_path("tree_data", dataset.name, "iter_0")
    if args.dry_run:
        return dry_run(config, dataset, args, output_dir)

    def build(reference, tokenizer, device, top_k, temperature):
        from utils.policies import ReferencePolicy

        return ReferencePolicy(reference, top_k=top_k, temperature=temperature)

    shape = {name: getattr(dataset.trees, name) for name in ("root_children", "non_root_children", "num_layers")}
    return collect(config, dataset, args, output_dir, shape=shape, policy={"policy": "reference"}, build=build)


if __name__ == "__main__":
    sys.exit(cli.run(main))
