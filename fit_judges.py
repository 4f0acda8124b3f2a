#!/usr/bin/env python
"""Fit independent judges: bag-of-words Bradley-Terry models on the preference pairs, which no stage trains on.

    python fit_judges.py --config smollm --dataset anthropic

Evaluations that find them in <workspace>/judges log their scores as further columns; they never choose an answer.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from utils import cli


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    folder = config.default_path("judges")
    if args.dry_run:
        cli.report_dry_run([("judges", str(folder), "made by this stage")])
        return 0
    from utils.judge import fit_judges
    from utils.tracking import Tracker

    judges = fit_judges(config, dataset)
    with Tracker(args.wandb, "fit_judges", dataset.name) as tracker:
        for name, judge in judges.items():
            ranked = sorted(zip(judge.weight.tolist(), judge.vocabulary, strict=True))
            tracker.summary({f"{name}/words": len(ranked)})
            tracker.table(f"{name}/heaviest words", ["weight", "word"], [*ranked[:20], *ranked[-20:]])
    print(f"judges of {', '.join(judges) or 'no objective'} in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
