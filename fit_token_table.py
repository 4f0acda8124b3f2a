#!/usr/bin/env python
"""Fit token tables: a context-free value of each token, the control that stands beside the value models.

    python fit_token_table.py DATA_DIR <objective|all> --dataset anthropic

Needs labelled trees (label_tree.py); writes <workspace>/token_tables/<objective>.safetensors and prints how much of
each reward a bag of tokens explains within a prompt, on trees that it was not fitted on. baseline_eval.py --token_table
steers by it. Seconds for some hundred trees.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from utils import cli
from utils.errors import UsageError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "data_dir", metavar="DATA_DIR", type=Path, help="folder of labelled trees, as label_tree.py leaves it"
    )
    parser.add_argument("objective", help="an objective of the data set, several with commas, or all")
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--output_dir", type=Path, help="folder to write (default: <workspace>/token_tables)")
    parser.add_argument("--l2", type=float, help="ridge penalty (default: chosen by held-out prompts)")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    objectives = cli.objectives_of(dataset, args.objective)
    args.data_dir = config.find(args.data_dir)
    output = args.output_dir or config.default_path("token_tables")
    if args.l2 is not None and not args.l2 > 0:
        raise UsageError(f"--l2 must be above 0, got {args.l2}")
    if args.dry_run:
        rows = [("trees", str(args.data_dir), cli.found(str(args.data_dir), "get_data_base.py, then label_tree.py"))]
        cli.report_dry_run(
            [*rows, *((f"table of {n}", str(output / f"{n}.safetensors"), "this command makes it") for n in objectives)]
        )
        return 0

    from utils import models
    from utils.token_table import fit_and_report, save_token_table, split_trees
    from utils.tracking import Tracker

    path, _ = models.reference_path(config, dataset)
    vocab_size = models.resolved_config(path).vocab_size
    train, val = split_trees(args.data_dir)
    with Tracker(args.wandb, "fit_token_table", settings={"data_dir": str(args.data_dir)}) as tracker:
        for name in objectives:
            table, report = fit_and_report(train, val, name, vocab_size, args.l2)
            path = output / f"{name}.safetensors"
            save_token_table(path, table, report)
            tracker.summary({name: report})
            leaves = report["leaves"]
            print(
                f"{name}: within a prompt, tokens explain {leaves['explained_variance_within_prompt']:.2f} of the "
                f"reward's variance on {report['val_trees']} held-out trees (correlation "
                f"{leaves['correlation_within_prompt']:.2f}, s.e. {leaves['correlation_within_prompt_error']:.2f}; "
                f"{report['train_trees']} trees fitted, l2 {report['l2']:g}); saved {path}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
