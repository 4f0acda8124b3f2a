"""A Pareto report's pages: tables as text, Markdown and one self-contained HTML file.

What is shown comes from `utils.reports`; here it is only laid out. The HTML page holds its figures, style and script
itself and asks for nothing else; a policy in its head forbids any other script, so that a text in a sample stays text.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.cli import aligned, markdown_rows
from utils.files import plain, write_atomically
from utils.report_points import WEIGHTED, Point, grouped
from utils.reports import Figure, Section, SectionReport
from utils.summaries import GENERATED, describe_weights

MARKDOWN_PROMPTS, MARKDOWN_ROWS = 3, 60  # what report.md shows of samples and of long tables of differences
TEMPLATE = Path(__file__).with_name("report_page.html")

MAIN_NOTE = (
    "Mean rewards with 95 % bootstrap intervals over prompts (2,000 resamples). KL is the mean log-ratio of an answer "
    "to the reference's full softmax, with its standard error; for best of N it is a bound. Seconds are decoding "
    "alone, in batches, and like tokens they are per prompt and trial; generated counts every candidate's tokens. log "
    "p_ref is the reference's log-probability per token. Dominated: another row is at least as good in every objective "
    "of this section and better in one. The intervals are each row's alone; rows on the same prompts are compared by "
    "the paired differences below."
)
KL_NOTE = (
    "KL is the mean log-ratio of the tokens that were taken (paper, eq. 6), which all other tables have. Exact sums "
    "the divergence of each step's whole distribution along the same answers: the same mean, less noise. To the top k "
    "is to the reference renormalised over its candidates: the cut then costs nothing, and the reference has 0. "
    "Standard errors are over prompts."
)
WORK_NOTE = (
    "Tokens that language models and value models read for one answer, all its candidates and beams counted, and the "
    "operations of these passes; the reading of the prompt, the attention to what was read before, and the reward "
    "models that choose among candidates are left out."
)
SEEDS_NOTE = (
    "Spread over seeds: the standard deviation of the seeds' means, over the prompts that all seeds of a row answered."
)
EQUAL_KL_NOTE = (
    "Weighted reward of each point less another method's at the same weights and KL, read on straight lines through "
    "the reference and the other method's points; between are the measured KLs that such a line joins. The intervals "
    "are over prompts alone: they do not know how the reward bends between measured points. Where it bends downwards, "
    "as it usually does, a line lies too low and favours the point that is compared with it, the more so the further "
    "apart the measured KLs are. So a method is ahead only where both directions say so. Best of N's KL is an upper "
    "bound, which makes a difference a bound too. * In more than 5 % of the resamples the KL lies beyond the other "
    "method's points, where its outermost line is extended."
)
PAIRS_NOTE = (
    "Differences of two methods at the same weights, paired on the prompts that both answered. Wins, ties and losses "
    "count prompts. The intervals are not corrected for how many comparisons are made."
)


# -------------------------------------------------------------------------------------------------------------- tables


def number(value, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def amount(value: float) -> str:
    """A price to three digits, however small (the tiny world's) or large it is; 0 is a price that nobody told."""
    return (
        "-"
        if not math.isfinite(value) or not value
        else f"{value:.0f}"
        if abs(value) >= 999.5
        else f"{value:#.3g}".rstrip(".")
    )


def with_error(value) -> str:
    """A mean and its standard error, or a dash."""
    return f"{value[0]:.2f} +- {number(value[1], 2)}" if value else "-"


def interval(entry: Mapping, value: str = "mean") -> str:
    text = number(entry[value])
    return text if not math.isfinite(entry["low"]) else f"{text} [{number(entry['low'])}, {number(entry['high'])}]"


def kl_text(row: Mapping) -> str:
    if not math.isfinite(row["kl"]):
        return "-"
    return ("<= " if row["kl_is_upper_bound"] else "") + f"{row['kl']:.2f} +- {number(row['kl_error'], 2)}"


@dataclass(frozen=True)
class Table:
    """A table's name, what is to be known of it, its header and its rows of text."""

    title: str
    note: str
    header: list[str]
    body: list[list[str]]


def main_table(report: SectionReport) -> Table:
    """Every point: the section's objectives, KL and price; then all other rewards and judges' scores, and fluency."""
    rows, own = report.rows, list(report.section.objectives)
    others = list(dict.fromkeys(s for r in rows for s in r["rewards"] if s not in own))

    def cells(row, scores):
        return (interval(row["rewards"][s]) if s in row["rewards"] else "-" for s in scores)

    header = ["method", "weights", "prompts", *own, "KL", "s/prompt", "tokens", "generated", "dominated", *others,
              "distinct", "log p_ref"]  # fmt: skip
    body = []
    for r in rows:
        in_series = ", in its series" if r["dominated_in_series"] else ""
        body.append(
            [
                r["series"],
                describe_weights(r["weights"]) or "-",
                str(r["prompts"]) + (f" x {len(r['seeds'])} seeds" if len(r["seeds"]) > 1 else ""),
                *cells(r, own),
                kl_text(r),
                amount(r["seconds_per_prompt"]),
                number(r["tokens"], 1),
                number(r[GENERATED], 1),
                f"yes{in_series}" if r["dominated"] else "",
                *cells(r, others),
                number(r["distinct"]),
                number(r["reference_log_prob"], 2),
            ]
        )
    return Table("Points", MAIN_NOTE, header, body)


def work_table(report: SectionReport) -> Table:
    """What decoding an answer takes, and what that is of the least that any point takes."""
    rows = [r for r in report.rows if math.isfinite(r["language_tokens"])]
    least = min((r["gflop"] for r in rows if math.isfinite(r["gflop"])), default=math.nan)
    body = [
        [
            r["series"],
            describe_weights(r["weights"]) or "-",
            number(r["language_tokens"], 0),
            number(r["value_tokens"], 0),
            amount(r["gflop"]),
            amount(r["gflop"] / least),
            amount(r["seconds_per_prompt"]),
            *(number(r["rewards"][o]["mean"]) for o in report.section.objectives),
            kl_text(r),
        ]
        for r in rows
    ]
    header = ["method", "weights", "language tokens", "value tokens", "GFLOP", "x least", "s/prompt"]
    return Table("Work of an answer", WORK_NOTE, [*header, *report.section.objectives, "KL"], body)


def seeds_table(report: SectionReport) -> Table:
    """The points of several seeds: how far each figure moves from seed to seed."""
    rows = [r for r in report.rows if len(r["seeds"]) > 1]
    scores = list(dict.fromkeys(s for r in rows for s in r["rewards"]))
    body = [
        [
            r["series"],
            describe_weights(r["weights"]) or "-",
            ", ".join(map(str, r["seeds"])),
            *(number(r["rewards"][s]["seed_sd"]) if s in r["rewards"] else "-" for s in scores),
            number(r["kl_seed_sd"], 2),
        ]
        for r in rows
    ]
    return Table("Spread over seeds", SEEDS_NOTE, ["method", "weights", "seeds", *scores, "KL"], body)


def hypervolume_note(report: SectionReport) -> str:
    point = report.hypervolume["reference_point"]
    if point is None:
        return "No prompt is shared by all points, so there is no hypervolume."
    text = ", ".join(f"{o} {x:.4f}" for o, x in zip(report.section.objectives, point, strict=True))
    prompts = report.hypervolume["prompts"]
    return (
        f"Hypervolume above the reference point ({text}), over the {prompts} prompts that all points share; the "
        "intervals resample these prompts and leave the reference point where it is. More points cover more volume: "
        "compare methods that have points at the same weights."
    )


def hypervolume_table(report: SectionReport) -> Table:
    rows = report.hypervolume["series"]
    body = [[r["series"], str(r["points"]), interval(r, "hypervolume")] for r in rows]
    return Table("Hypervolume", hypervolume_note(report), ["method", "points", "hypervolume [95 %]"], body)


def hypervolume_pairs_table(report: SectionReport) -> Table:
    rows = report.hypervolume["differences"]
    body = [[r["a"], r["b"], interval(r, "difference")] for r in rows]
    note = "The same prompts are resampled for both methods of a pair."
    return Table("Differences of hypervolumes", note, ["method", "less", "difference [95 %]"], body)


def equal_kl_table(report: SectionReport) -> Table:
    body = []
    sign = {"exact": "", "at most": "<= ", "at least": ">= ", "unknown": "bounds on both sides: "}
    for r in report.equal_kl:
        between, text = "-", f"not reached: its KL spans {r['lowest_kl']:.2f} to {r['highest_kl']:.2f}"
        if not r["prompts"]:
            text = "no prompt that all of them answered"
        if math.isfinite(r["difference"]):
            between = f"{r['left_kl']:.2f} and {r['right_kl']:.2f}"
            text = sign[r["bound"]] + interval(r, "difference") + (" *" if r["beyond"] > 0.05 else "")
        weights = describe_weights(r["weights"])
        body.append([r["a"], weights, number(r["kl"], 2), r["b"], between, text, str(r["prompts"])])
    header = ["method", "weights", "KL", "less", "between", "weighted reward at equal KL [95 %]", "prompts"]
    return Table("Rewards at equal KL", EQUAL_KL_NOTE, header, body)


def pairs_table(report: SectionReport, rows: Sequence[Mapping], title: str, note: str, brief: bool = False) -> Table:
    """Paired differences; `brief` leaves out rewards that are no objective of the section."""
    own = {*report.section.objectives, WEIGHTED, *(f"judge_{o}" for o in report.section.objectives)}
    body = [
        [
            r["a"],
            r["b"],
            describe_weights(r["weights"]) or "-",
            r["score"],
            interval(r, "difference"),
            number(r["error"]),
            f"{r['wins']} / {r['ties']} / {r['losses']}",
            str(r["prompts"]),
        ]
        for r in rows
        if not brief or r["score"] in own
    ]
    header = ["method", "less", "weights", "reward", "difference [95 %]", "s.e.", "wins / ties / losses", "prompts"]
    return Table(title, note, header, body)


def kl_table(report: SectionReport) -> Table:
    """The KL estimate beside what it estimates in each step, and beside that to the reference's top k."""
    rows = [r for r in report.rows if r["kl_exact"]]
    body = [[r["series"], describe_weights(r["weights"]) or "-", kl_text(r), with_error(r["kl_exact"]),
             with_error(r["kl_top_k"])] for r in rows]  # fmt: skip
    return Table("KL in three conventions", KL_NOTE, ["method", "weights", "KL", "exact", "to the top k"], body)


def tables_of(report: SectionReport) -> list[Table]:
    """The tables of a section in reading order; empty ones are left out, the hypervolume's says why."""
    note = "Paired on the prompts that both answered; wins, ties and losses count prompts."
    tables = [
        main_table(report),
        kl_table(report),
        work_table(report),
        seeds_table(report),
        hypervolume_table(report),
        hypervolume_pairs_table(report),
        equal_kl_table(report),
        pairs_table(report, report.differences, "Differences between methods", PAIRS_NOTE, brief=True),
        pairs_table(report, report.to_reference, "Differences to the reference", note),
    ]
    return [t for t in tables if t.body or t.title == "Hypervolume" and report.section.compared]


def shortened(table: Table, rows: int) -> Table:
    """A table of at most `rows` rows: of too many differences the weighted rewards', and of too many of those some."""
    if len(table.body) <= rows:
        return table
    body = table.body
    if "reward" in table.header:
        place = table.header.index("reward")
        body = [line for line in body if line[place] == WEIGHTED] or body
    note = f"{table.note} Shown are {len(body[:rows])} of {len(table.body)} rows; report.html and report.json have all."
    return Table(table.title, note, table.header, body[:rows])


def text_table(table: Table) -> str:
    """A table whose columns stand below each other."""
    return "\n".join(aligned([table.header, *table.body]))


def markdown_table(table: Table) -> str:
    return markdown_rows(table.header, table.body)


# ------------------------------------------------------------------------------------------------------------ Markdown


def fenced(text: str) -> str:
    """Text as it is: a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(list(run)) for char, run in itertools.groupby(text) if char == "`"), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def markdown(report: SectionReport) -> str:
    """A section as Markdown; the figures lie beside it."""
    parts = [f"## {report.section.title}\n"]
    parts += [f"Note: {note}.\n" for note in report.notes]
    for figure in report.figures:
        parts.append(f"![{figure.name}]({figure.name})\n\n*{figure.caption}*\n")
    for table in tables_of(report):
        short = table if table.title == "Points" else shortened(table, MARKDOWN_ROWS)
        parts.append(f"### {short.title}\n\n{short.note}\n")
        parts += [markdown_table(short)] if short.body else []
    parts.append(f"### Samples\n\n{samples_markdown(report.section)}")
    return "\n".join(parts)


def samples_markdown(section: Section) -> str:
    """The first prompts that all points share, each series' first answer to them, unedited: the most balanced weights.

    All weights and all answers are in report.html.
    """
    chosen = [p for p in section.points if not p.weights]
    for points in section.series.values():
        if weighted := [p for p in points if p.weights]:
            chosen.append(min(weighted, key=lambda p: max(p.weights.values())))
    parts = []
    for index in section.shared[:MARKDOWN_PROMPTS]:
        for n, point in enumerate(chosen):
            sample = point.samples[index][0]
            if n == 0:
                parts.append(f"**Prompt {index}**\n\n{fenced(sample['prompt'])}")
            scores = ", ".join(f"{k} {v:.2f}" for k, v in sample["rewards"].items())
            weights = f" ({describe_weights(point.weights)})" if point.weights else ""
            parts.append(f"{section.name(point)}{weights}: {scores}\n\n{fenced(sample['response'])}")
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------- HTML


def page(title: str, reports: Sequence[SectionReport], left_out: Sequence[str], prompts: int) -> str:
    """One HTML file with everything: figures as data URIs, tables, and the answers to the first `prompts` prompts."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template, script = TEMPLATE.read_text(encoding="utf-8").split("<!-- script -->\n")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        title=title,
        sections=[_section_data(report, prompts) for report in reports],
        left_out=left_out,
        script=Markup(script),  # the project's own text; its hash is the only script that the page's policy lets run
        script_hash=digest,
    )


def data_uri(figure: Figure, theme: str) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.png[theme]).decode()


def _section_data(report: SectionReport, prompts: int) -> dict:
    section = report.section
    figures = [
        {"caption": f.caption, "name": f.name, "light": data_uri(f, "light"), "dark": data_uri(f, "dark")}
        for f in report.figures
    ]
    known = section.shared or sorted(set().union(*(p.table.index for p in section.points)))
    return {
        "title": section.title,
        "label": section.label,
        "notes": report.notes,
        "figures": figures,
        "tables": tables_of(report),
        "prompts": _prompt_data(section, known[:prompts]),
        "all_prompts": len(known),
    }


def _prompt_data(section: Section, indices: Sequence[int]) -> list[dict]:
    """Of each prompt its text and a grid of answers: a row for each series, a column for each weights.

    Columns go from all weight on the first objective to all on the last, so that a row shows what weights do; methods
    that take no weights share the first row.
    """
    weighted = sorted(
        (p for p in section.points if p.weights), key=lambda p: [-p.weights.get(o, 0.0) for o in section.objectives]
    )
    column = {text: n for n, text in enumerate(dict.fromkeys(describe_weights(p.weights) for p in weighted), start=1)}
    free = [p for p in section.points if not p.weights]
    places = [("without weights", p, n) for n, p in enumerate(free, start=1)]
    places += [(section.name(p), p, column[describe_weights(p.weights)]) for p in section.points if p.weights]
    answers = {p.key: p.samples for p in section.points}
    found = []
    for index in indices:
        cells = [
            (row, _card(section, p, answers[p.key][index]) | {"column": at})
            for row, p, at in places
            if index in answers[p.key]
        ]
        prompt = next(a[index][0]["prompt"] for a in answers.values() if index in a)
        rows = [{"name": name, "cards": [c for _, c in group]} for name, group in grouped(cells, lambda c: c[0])]
        short = " ".join(prompt.split())
        found.append(
            {"index": index, "text": prompt.strip(), "short": short[:90] + ("…" if len(short) > 90 else ""),
             "columns": max([len(column), len(free)]), "rows": rows}
        )  # fmt: skip
    return found


def _card(section: Section, point: Point, samples: Sequence[Mapping]) -> dict:
    """A point's answers to one prompt, the first of them shown at once."""
    several = len(point.by_seed) > 1
    answers = []
    for s in samples:
        figures = [(name, f"{value:.2f}") for name, value in (s["rewards"] | s.get("extra", {})).items()]
        figures += [("log-ratio", f"{s['log_ratio']:.1f}")] if "log_ratio" in s else []
        figures += [("tokens", str(s["tokens"]))]
        name = (f"seed {s['seed']}, " if several else "") + f"trial {s['trial']}"
        answers.append({"name": name, "text": s["response"], "figures": figures, "finished": s["finished"]})
    weights = describe_weights(point.weights)
    name = section.name(point)
    return {"name": name if weights else "", "title": weights or name, "answers": answers, "weights": point.weights}


# --------------------------------------------------------------------------------------------------------------- files


def write(
    output_dir: Path, title: str, reports: Sequence[SectionReport], left_out: Sequence[str], prompts: int
) -> None:
    """report.md with its figures, report.json and report.html in a folder that is there."""
    for figure in (f for r in reports for f in r.figures):
        write_atomically(output_dir / figure.name, figure.png["light"])
    parts = [f"# {title}\n", *map(markdown, reports)]
    if left_out:
        parts.append("## Left out\n\n" + "".join(f"- {text}\n" for text in left_out))
    write_atomically(output_dir / "report.md", "\n".join(parts))
    data = {"sections": [r.as_dict() for r in reports], "left_out": list(left_out)}
    write_atomically(output_dir / "report.json", json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")
    write_atomically(output_dir / "report.html", page(title, reports, left_out, prompts))


def terminal(report: SectionReport) -> str:
    """What the command prints of a section."""
    section = report.section
    lines = [section.title + (f"  [{section.label}]" if section.label else ""), text_table(main_table(report))]
    lines.append(hypervolume_note(report))
    for row in report.hypervolume["series"]:
        lines.append(f"  {row['series']}: {row['hypervolume']:.4f} ({row['points']} points)")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)]) + "\n"
