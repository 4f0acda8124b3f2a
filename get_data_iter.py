#!/usr/bin/env python
"""A later iteration's data: trees under the MAVIS policy of one objective, values unnormalised.

    python get_data_iter.py START NUM OBJECTIVE --dataset anthropic --value_model_iter 0 --beta 4 --dynamic_splitting

grows trees into <workspace>/tree_data/<dataset>/iter_<N+1>/<objective>, log-ratios stored per node; resumes like
get_data_base.py. With --dynamic_splitting no child of the root is a leaf.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from pathlib import Path

from utils import cli
from utils.collection import add_collection_arguments, collect, dry_run
from utils.errors import UsageError
from utils.places import check_adapter_folder, value_model_command, value_model_folder

SHAPE = {"root_children": 2, "non_root_children": 3, "num_layers": 4}  # published for iterations above 0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_collection_arguments(parser)
    # The objective stands third on the command line, behind START and NUM.
    parser.add_argument("objective", metavar="OBJECTIVE", help="whose value model steers")
    group = parser.add_argument_group("steering")
    group.add_argument(
        "--value_model_dir", help="folder of iter_<N>/<objective> (default: value_models in the workspace)"
    )
    group.add_argument("--value_model_iter", type=int, default=0, help="iteration of the value model (default: 0)")
    group.add_argument("--beta", type=float, required=True, help="strength of the tilt, at least 0")
    group.add_argument(
        "--dynamic_splitting",
        action=BooleanOptionalAction,
        default=True,
        help="cut children of the root that ended by themselves, so that none is a leaf (default: on)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    objective, *more = cli.objectives_of(dataset, args.objective)
    if more:
        raise UsageError(f"OBJECTIVE {args.objective}: one value model steers; valid: {', '.join(dataset.objectives)}")
    beta = cli.check_beta(args.beta)
    if args.value_model_iter < 0:
        raise UsageError(f"--value_model_iter must be at least 0, got {args.value_model_iter}")
    iteration = args.value_model_iter
    output_dir = args.output_dir or config.default_path("tree_data", dataset.name, f"iter_{iteration + 1}", objective)
    folder = str(value_model_folder(config, args.value_model_dir, iteration, objective))
    made_by = value_model_command(config, objective, folder)
    if args.dry_run:
        return dry_run(
            config, dataset, args, output_dir, [(f"value model of {objective}", folder, cli.found(folder, made_by))]
        )

    from utils.provenance import fingerprint

    check_adapter_folder(Path(folder), f"value model of {objective}", made_by)

    def build(reference, tokenizer, device, top_k, temperature):
        from utils.models import vocabulary_size
        from utils.policies import MavisPolicy
        from utils.value_models import load_value_models

        models = load_value_models(
            config, args.value_model_dir, {objective: iteration}, tokenizer, vocabulary_size(reference), device
        )
        weights = {objective: 1.0}
        return MavisPolicy(
            reference, models, weights, beta=beta, top_k=top_k, temperature=temperature, normalization="none"
        )

    policy = {
        "policy": "mavis",
        "objective": objective,
        "beta": beta,
        "iteration": iteration,
        "value_model": fingerprint(folder),
    }
    shape = {**SHAPE, "dynamic_splitting": args.dynamic_splitting}
    return collect(config, dataset, args, output_dir, shape=shape, policy=policy, build=build)


if __name__ == "__main__":
    sys.exit(cli.run(main))
