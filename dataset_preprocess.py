"""Prompts of a data set: rows from local files or the Hub, through the data set's rules, to one CSV of prompts.

    python dataset_preprocess.py anthropic --split=train
    python dataset_preprocess.py summary --split=test --data_files posts.csv.gz

Writes <workspace>/datasets/<data set>/<data set>_<split>_deduped.csv with the one column `prompt`, and prints how many
rows each rule dropped. Local files of the configuration are looked for below $DATA_DIR, then below the workspace; where
there are none the Hub is asked. Cost: a minute or two for the 161,000 rows of the full training split.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from utils.cli import add_common, config_from, found, report_dry_run, run


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a data set of the configuration (or its exp_type), e.g. anthropic or summary")
    group = parser.add_argument_group("data")
    group.add_argument("--split", default="train", help="a split of the data set: train or test (default: %(default)s)")
    group.add_argument(
        "--data_files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="read these jsonl, json, csv (plain or .gz) or parquet files instead of the configuration's source",
    )
    group.add_argument("--tokenizer", help="what counts tokens: a folder or Hub name (default: the base model's)")
    group.add_argument("--output_dir", help="folder of the CSV (default: <workspace>/datasets/<data set>)")
    add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    from utils import data
    from utils.rows import describe_source, iter_rows

    spec = config.dataset(args.dataset)
    source = data.split_source(spec, args.split)
    output = data.prompts_csv(config, spec, args.split)
    if args.output_dir:
        output = Path(args.output_dir) / output.name
    base = config.base_model
    tokenizer_path = args.tokenizer or config.locate(base.path)
    origin = describe_source(source, config, args.data_files)
    if args.dry_run:
        made_by = "" if args.tokenizer else base.made_by
        report_dry_run(
            [
                ("rows", origin, "Hub" if origin.startswith("Hub: ") else "here"),
                ("tokenizer", tokenizer_path, found(tokenizer_path, made_by)),
                ("prompts", str(output), "here, would be replaced" if output.exists() else "would be made"),
            ]
        )
        return 0

    from utils.models import load_tokenizer
    from utils.tracking import Tracker

    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = load_tokenizer(tokenizer_path, base.special_tokens, base.made_by)
    rows = iter_rows(source, config, args.data_files)
    prompts, counts = data.build_prompts(spec, rows, tokenizer, hash_range=source.hash_range)
    data.write_prompts(output, prompts)

    with Tracker(args.wandb, "dataset_preprocess", f"{spec.name}_{args.split}", {"rows from": origin}) as tracker:
        tracker.summary(counts)
        tracker.table("prompts", ["prompt"], [[prompt] for prompt in prompts[:100]])
    print(f"{spec.name} {args.split}, from {origin}")
    for reason, count in counts.items():
        print(f"{count:>9,}  {reason}")
    print(f"prompts: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
