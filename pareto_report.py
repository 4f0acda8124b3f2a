"""Compare runs: fronts, hypervolume, rewards at equal KL, differences to the reference, samples.

    python pareto_report.py mavis_logs baseline_logs baseline_bon_logs --output_dir report

Reads run folders alone (args.yaml, rewards.csv, samples.jsonl); no model is needed. Writes report.md with its tables
and figures, and report.json with the same numbers, for every pair of objectives that the runs' weights span.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from utils.cli import UsageError, run


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
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    objectives = [o.strip() for o in args.objectives.split(",")] if args.objectives else None
    if objectives is not None and (len(set(objectives)) != len(objectives) or len(objectives) < 2):
        raise UsageError(f"--objectives {args.objectives!r}: give at least two different objectives, e.g. help,harm")
    point = _numbers(args.reference_point, objectives)

    import json
    import re
    from pathlib import Path

    from utils.reports import load_runs, main_table, plain, report_section, sections_of, text_table
    from utils.runs import write_atomically

    runs, left_out = load_runs(args.runs)
    sections = sections_of(runs, objectives)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = list(dict.fromkeys(s.label for s in sections))
    reports = []
    for section in sections:
        parts = [section.dataset, *section.objectives]
        if len(labels) > 1:
            parts.insert(0, f"{labels.index(section.label) + 1}")
        stem = re.sub(r"[^\w-]+", "-", "_".join(parts))
        reports.append(report_section(section, output_dir, stem, point))

    title = "# Pareto report" + (f": {'; '.join(filter(None, labels))}" if any(labels) else "")
    parts = [title + "\n", *(r.markdown() for r in reports)]
    if left_out:
        parts.append("## Left out\n\n" + "".join(f"- {text}\n" for text in left_out))
    write_atomically(output_dir / "report.md", "\n".join(parts))
    data = {"sections": [r.as_dict() for r in reports], "left_out": left_out}
    write_atomically(output_dir / "report.json", json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")

    for report in reports:
        print(f"{report.section.title}" + (f"  [{report.section.label}]" if report.section.label else ""))
        print(text_table(main_table(report.section, report.rows)))
        print(report.hypervolume_text())
        for row in report.hypervolume["series"]:
            print(f"  {row['series']}: {row['hypervolume']:.4f} ({row['points']} points)")
        print("".join(f"note: {note}\n" for note in report.notes))
    for text in left_out:
        print(f"left out: {text}")
    print(f"report: {output_dir / 'report.md'}")
    return 0


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
