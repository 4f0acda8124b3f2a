"""Compare runs: fronts, hypervolume, rewards at equal KL, paired differences, samples beside each other.

    python pareto_report.py mavis_logs baseline_logs baseline_bon_logs --output_dir report
    python pareto_report.py mavis_logs baseline_logs --compare mavis "token table"

Reads run folders alone (args.yaml, rewards.csv, samples.jsonl); no model is needed. Writes, for every pair of
objectives that the runs' weights span, report.html (one file with figures, tables and unedited answers by weight, to be
opened in any browser, offline), report.md with its figures beside it, and report.json with the same numbers. Runs that
differ in their seed alone, and parts of one evaluation (--start_index), are one point.
"""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter

from utils.cli import check_wandb, run
from utils.errors import UsageError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that are searched for them")
    parser.add_argument(
        "--output_dir", default="report", help="folder of the report, made if it is not there (default: report)"
    )
    parser.add_argument("--objectives", help="one section of these, e.g. help,harm (default: all that weights span)")
    parser.add_argument(
        "--reference_point",
        help="of the hypervolume, a number per objective, e.g. --reference_point=-1,0 (default: the worst mean of each "
        "objective among the runs, less a tenth of the range)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="differences A - B of two methods or series, as the table names them, at the same weights; may be "
        "repeated (default: all pairs)",
    )
    parser.add_argument("--prompts", type=int, default=50, help="prompts whose answers report.html shows (default: 50)")
    parser.add_argument(
        "--wandb", action=BooleanOptionalAction, default=False, help="log tables and figures to Weights & Biases"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    objectives = [o.strip() for o in args.objectives.split(",")] if args.objectives else None
    if objectives is not None and (len(set(objectives)) != len(objectives) or len(objectives) < 2):
        raise UsageError(f"--objectives {args.objectives!r}: give at least two different objectives, e.g. help,harm")
    point = _numbers(args.reference_point, objectives)
    if args.prompts < 0:
        raise UsageError(f"--prompts must be at least 0, got {args.prompts}")

    from pathlib import Path

    from utils import report_pages, report_points, reports, tracking

    check_wandb(args.wandb)
    points, left_out = report_points.load_points(args.runs)
    sections = reports.sections_of(points, objectives)
    _check_names(args.compare or [], sections)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    made = [
        reports.report_section(s, stem, point, args.compare) for s, stem in zip(sections, _stems(sections), strict=True)
    ]

    labels = list(dict.fromkeys(filter(None, (s.label for s in sections))))
    title = "Pareto report" + (f": {'; '.join(labels)}" if labels else "")
    report_pages.write(output_dir, title, made, left_out, args.prompts)
    for report in made:
        print(report_pages.terminal(report))
    for text in left_out:
        print(f"left out: {text}")
    print(f"report: {output_dir / 'report.md'} (numbers: report.json)\npage: {output_dir / 'report.html'}")
    with tracking.Tracker(args.wandb, "pareto_report", settings={"runs": args.runs}) as tracker:
        for report, stem in zip(made, _stems(sections), strict=True):
            tracker.images({f.name.removesuffix(".png"): output_dir / f.name for f in report.figures})
            for table in report_pages.tables_of(report):
                tracker.table(f"{stem}/{table.title}", table.header, table.body)
    return 0


def _stems(sections) -> list[str]:
    """What each section's files are called."""
    import re

    labels = list(dict.fromkeys(s.label for s in sections))
    splits = {s.split for s in sections}
    stems = []
    for s in sections:
        parts = [s.dataset, *s.objectives]
        if len(splits) > 1:
            parts.insert(1, s.split)
        if len(labels) > 1:
            parts.insert(0, f"{labels.index(s.label) + 1}")
        stems.append(re.sub(r"[^\w-]+", "-", "_".join(parts)))
    return stems


def _check_names(pairs, sections) -> None:
    """Raise a UsageError for a name of --compare that means no method here."""
    from utils.errors import nearest

    known = list(dict.fromkeys(s.name(p) for s in sections for p in s.points))
    for name in (name for pair in pairs for name in pair):
        if not any(s.matches(p, name) for s in sections for p in s.points):
            raise UsageError(f"--compare {name!r} names no method or series; {nearest(name, known)}")


def _numbers(text: str | None, objectives: list[str] | None) -> list[float] | None:
    """The reference point; it has a meaning for named objectives alone."""
    import math

    if text is None:
        return None
    if objectives is None:
        raise UsageError("--reference_point needs --objectives, whose order it follows")
    try:
        point = [float(x) for x in text.split(",")]
    except ValueError:
        point = [math.nan]
    if len(point) != len(objectives) or not all(map(math.isfinite, point)):
        raise UsageError(f"--reference_point {text!r} must be {len(objectives)} numbers, for {','.join(objectives)}")
    return point


if __name__ == "__main__":
    raise SystemExit(run(main))
