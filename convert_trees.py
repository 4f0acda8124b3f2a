#!/usr/bin/env python
"""Convert published pickled trees into a folder of trees, without unpickling anything.

    python convert_trees.py trees/*.pkl --output_dir <workspace>/tree_data/anthropic/published --dataset anthropic
    python convert_trees.py all.pkl --output_dir DIR --dataset anthropic --field tokens=ids --objective help

A pickle holds one root node, a list of them, or a dictionary {prompt index: root}. A node is an object of any class or
a dictionary with its tokens and its children; log-ratios and values are taken where there are any. What a pickle asks
for beyond plain data is refused (utils/plain_pickle.py). The folder is one as get_data_base.py leaves it: label it
with label_tree.py, or go on with split_data.py.
"""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from pathlib import Path

from utils import cli
from utils.errors import DataError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("pickles", metavar="PICKLE", nargs="+", type=Path, help="files of pickled trees")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the converted trees")
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--data_split", default="train", help="whose prompts the indices mean (default: train)")
    group = parser.add_argument_group("how nodes are read")
    group.add_argument("--field", action="append", default=[], metavar="WHAT=NAME",
                       help="what a node calls its children, tokens, log_ratio, value, finished, prompt or "
                       "prompt_index (may be repeated)")  # fmt: skip
    group.add_argument("--tokens", choices=("segment", "path"), default="segment",
                       help="a node's tokens are its own, or all from the root on (default: segment)")  # fmt: skip
    group.add_argument("--objective", default="", help="whose value a node's single number is")
    group.add_argument("--recompute", action=BooleanOptionalAction, default=False,
                       help="inner nodes' values anew from the leaves'")  # fmt: skip
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    if args.objective:
        cli.objectives_of(dataset, args.objective)
    from utils import pickled_trees
    from utils.data import encode_prompts, prompts_csv, read_prompts, split_source

    split_source(dataset, args.data_split)
    names = pickled_trees.NodeMap(tokens_are=args.tokens, objective=args.objective, recompute=args.recompute)
    names = names.with_names(args.field)
    csv = prompts_csv(config, dataset, args.data_split)
    if args.dry_run:
        rows = [("pickle", str(path), cli.found(str(path))) for path in args.pickles]
        cli.report_dry_run([*rows, ("prompts", str(csv), cli.found(str(csv))), ("trees", str(args.output_dir), "")])
        return 0

    import functools

    from utils.hdf5_utils import claim_collection, consolidate, write_tree
    from utils.models import load_tokenizer
    from utils.tracking import Tracker

    texts = read_prompts(csv, config) if csv.is_file() else []

    def prompt_of(index: int) -> str | None:
        return texts[index] if index < len(texts) else None

    @functools.cache
    def tokenizer():
        """The reference's; only a root without tokens of its own needs it."""
        return load_tokenizer(config.sft_path(dataset))

    def encode(prompt: str) -> list[int]:
        return encode_prompts(dataset, tokenizer(), [prompt])[0]

    trees, origin = {}, {}
    for path in args.pickles:
        for tree in pickled_trees.read_trees_of(path, names, len(trees), prompt_of, encode):
            if tree.prompt_index in trees:
                raise DataError(
                    f"{path} and {origin[tree.prompt_index]} both hold a tree of prompt {tree.prompt_index}"
                )
            trees[tree.prompt_index], origin[tree.prompt_index] = tree, path
    made_with = {"policy": "converted", "dataset": dataset.name, "data_split": args.data_split}
    claim_collection(args.output_dir, made_with)
    for index in sorted(trees):
        write_tree(args.output_dir, trees[index])
    total = consolidate(args.output_dir)
    with Tracker(args.wandb, "convert_trees", settings=made_with) as tracker:
        tracker.summary({"trees": len(trees), "nodes": sum(map(len, trees.values()))})
    print(f"{len(trees)} trees converted, {sum(map(len, trees.values()))} nodes; {args.output_dir} holds {total} trees")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
