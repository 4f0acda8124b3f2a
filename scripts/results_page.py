#!/usr/bin/env python
"""Compose a results page from what a workspace holds: accuracies, explained variances, the report, the minutes.

    python scripts/results_page.py --config smollm --report workspaces/smollm/report \
        --notes docs/results/smollm_notes.md --output docs/results/smollm.md

Every figure on the page is read from a file that a stage wrote; the notes are the only prose that is put in.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.errors import DataError
from utils.files import write_atomically


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, nargs="+", required=True, help="folders that pareto_report.py wrote")
    parser.add_argument("--notes", type=Path, required=True, help="Markdown that stands first on the page")
    parser.add_argument("--output", type=Path, required=True, help="the page; figures go to figures/ beside it")
    parser.add_argument("--iteration", type=int, default=0, help="of the value models (default: 0)")
    cli.add_common(parser)
    return parser


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def table_report(path: Path) -> dict:
    """What fit_token_table.py wrote into a table's header."""
    from safetensors import safe_open

    if not path.is_file():
        return {}
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["report"])


def reward_section(config) -> str:
    rows = []
    for name, spec in config.objectives.items():
        metrics = read(config.default_path("reward_models", name, "metrics.json"))
        if spec.training and metrics:
            low, high = metrics["interval"]
            crossed = metrics.get("cross_validated", {}).get("accuracy")
            rows.append(
                [
                    name,
                    spec.training.kind,
                    metrics["num_train"],
                    f"{metrics['accuracy']:.1%} [{low:.1%}, {high:.1%}], n {metrics['n']}",
                    "" if crossed is None else f"{crossed:.1%}",
                    f"{metrics['bag_of_words']:.1%}",
                ]
            )
    head = [
        "reward",
        "trained on",
        "examples",
        "held-out accuracy [95 %]",
        "cross-validated",
        "bag of words, same examples",
    ]
    return cli.markdown_rows(head, rows)


def value_section(config, iteration: int) -> str:
    rows = []
    for name in config.objectives:
        metrics = read(config.default_path("value_models", f"iter_{iteration}", name, "metrics.json"))
        lexical = table_report(config.default_path("token_tables", f"{name}.safetensors"))
        if metrics:
            v, t = metrics["validation"], lexical.get("inner_nodes", {})
            rows.append(
                [
                    name,
                    f"{metrics['num_trees']} / {metrics['num_val_trees']}",
                    v["nodes"],
                    f"{v['explained_variance']:.2f}",
                    *(with_error(fit, what) for fit in (v, t) for what in ("explained_variance", "correlation")),
                    minutes_of(metrics),
                ]
            )
    head = [
        "objective", "trees: training / validation", "validation nodes", "explained variance", "within a prompt",
        "correlation within a prompt", "token table, same nodes: within a prompt", "its correlation", "minutes",
    ]  # fmt: skip
    return cli.markdown_rows(head, rows)


def with_error(fit: dict, what: str) -> str:
    """A measure within a prompt with its standard error over prompts; empty where there is none."""
    value, error = (fit.get(f"{what}_within_prompt{end}") for end in ("", "_error"))
    return "" if value is None else f"{value:.2f}" + ("" if error is None else f" +- {error:.2f}")


def minutes_of(metrics: dict) -> str:
    """A value model's training in minutes, its head's start included; empty where that was not recorded."""
    if "start_seconds" not in metrics and not metrics["num_steps"]:
        return ""
    return f"{(metrics['seconds'] + metrics.get('start_seconds', 0)) / 60:.1f}"


def minutes_section(log: Path) -> str:
    """Minutes of each kind of stage; of a stage that ran several times (resumed, repeated) the longest counts."""
    longest: dict[str, int] = {}
    for line in log.read_text().splitlines():
        _, name, seconds = line.split("\t")
        longest[name] = max(longest.get(name, 0), int(seconds))
    groups: dict[str, list[int]] = defaultdict(list)
    for name, seconds in longest.items():
        groups[name.split(",")[0]].append(seconds)
    rows = [[name, len(s), f"{sum(s) / 60:.1f}"] for name, s in groups.items()]
    rows.append(["all", "", f"{sum(map(sum, groups.values())) / 60:.0f}"])
    return cli.markdown_rows(["stage", "runs", "minutes"], rows)


def report_section(folder: Path, figures: Path, prefix: str) -> str:
    """A report's Markdown one level down, its figures copied beside the page."""
    text = (folder / "report.md").read_text()
    shown = (image for image in sorted(folder.glob("*.png")) if f"]({image.name})" in text)  # not an earlier report's
    for image in shown:
        shutil.copyfile(image, figures / (prefix + image.name))
        text = text.replace(f"]({image.name})", f"](figures/{prefix}{image.name})")
        text = text.replace(f"![{image.name}]", f"![{image.stem}]")
    return re.sub(r"^#", "##", text, flags=re.MULTILINE).rstrip() + "\n"


def rounded(record):
    """Plain data with its numbers to six digits: what a page's figures have is far less, and the file half as long."""
    if isinstance(record, dict):
        return {name: rounded(value) for name, value in record.items()}
    if isinstance(record, list):
        return [rounded(value) for value in record]
    return float(f"{record:.6g}") if isinstance(record, float) else record


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    if args.dry_run:
        inputs = [("notes", args.notes), *(("report", folder / "report.md") for folder in args.report)]
        rows = [(what, str(path), cli.found(str(path))) for what, path in inputs]
        cli.report_dry_run([*rows, ("page", str(args.output), "made by this command")])
        return 0
    for path in (args.notes, *(folder / "report.md" for folder in args.report)):
        if not path.is_file():
            raise DataError(f"no {path}; the notes are yours to write, the report is pareto_report.py's")
    figures = args.output.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    # Two reports may have figures of one name: the folder's name behind "report" tells them apart.
    prefixes = [
        "_".join(filter(None, [args.output.stem, f.name.removeprefix("report").strip("_")])) for f in args.report
    ]
    reports = [report_section(f, figures, prefix + "_") for f, prefix in zip(args.report, prefixes, strict=True)]
    records = [read(folder / "report.json") for folder in args.report]
    for section in (section for record in records for section in record["sections"]):
        section.pop("differences", None)  # of every two rows, most of the file: the report has them
    write_atomically(args.output.with_suffix(".json"), json.dumps(rounded(records), separators=(",", ":")) + "\n")
    parts = [
        args.notes.read_text().rstrip() + "\n",
        "## Reward models\n",
        reward_section(config),
        "## Value models\n",
        value_section(config, args.iteration),
    ]
    log = config.default_path("run.log")
    if log.is_file():
        parts += ["## Minutes\n", minutes_section(log)]
    write_atomically(args.output, "\n".join([*parts, *reports]))
    print(f"{args.output} ({len(args.output.read_text().splitlines())} lines)")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
