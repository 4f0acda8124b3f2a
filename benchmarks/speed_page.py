#!/usr/bin/env python
"""Write docs/speed.md: what the benchmarks' results say, in tables.

    python benchmarks/speed_page.py          # from benchmarks/results/*.json

The figures are those of the files; a new measurement is a new file by the command that the file names.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import markdown_rows, run
from utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
GPU = "decode_paper_gpu.json"
TRAINING_GPU = "value_training_gpu.json"
DECODING = {
    "decode_smollm_pooled_cpu.json": "three objectives on one backbone (the small world's value models)",
    "decode_smollm_cpu.json": "each objective a model of its own, 8 layers (published value models)",
    GPU: "the paper's shapes with random weights, on a GPU",
    "decode_paper_gpu_compiled.json": "the same, norms and MLPs compiled by torch.compile",
}

INTRODUCTION = """# Speed

Tables of `benchmarks/results/`, written by `python benchmarks/speed_page.py`. Everything here was measured on 2 CPU
cores with SmolLM2-135M-Instruct, but for what says another device. Ratios are of medians; methods run in turns in one
process. A GPU is measured at the paper's shapes, with no checkpoint, by `bash benchmarks/gpu.sh`, which first compares
recorded steps (`--cuda_graphs`) with plain ones there.

"""
DECODING_NOTE = """`overhead` is a method's seconds over those of the bare model calls that it cannot do without; 1 is
the bound. Below 1, the project's grouped attention makes a call cheaper than transformers'. `mavis_n` has n objectives
with 15 candidates each; `candidates_n` the same with candidate heads; `trees` grows trees of 4-2-2 children; `_graphs`
are recorded steps, on a GPU. Of the bound, at batch 1: the speed over that at which the memory, as fast as a copy is,
streams what a token needs.
"""
ADAPTERS_NOTE = """Value models that are LoRA adapters: `apart` as PEFT leaves them, `merged` into weights of their own
(the default), `stacked` on one base (`--value_adapters stacked`), which pays for few rows and in memory.
"""
TRAINING_NOTE = """One pass over a tree's unique tokens instead of one path per node; loss and gradients are equal. The
ratio of seconds should come near the ratio of tokens.
"""
LABELLING_NOTE = """Leaves of 4-2-2 trees, each text alone and in rows that read what texts share once; one leaf of each
tree has nothing to share.
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/speed.md", help="the page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    write_atomically(args.output, page(args.results))
    print(args.output)
    return 0


def page(results: Path) -> str:
    """The page of a folder of results."""
    no_gpu = "" if (results / GPU).is_file() else "No GPU has been measured yet.\n\n"
    parts = [INTRODUCTION + no_gpu + "## Decoding\n\n" + DECODING_NOTE]
    for file, what in DECODING.items():
        if not (results / file).is_file():
            continue
        record = load(results, file)
        parts.append(f"### {what[0].upper()}{what[1:]}\n\n" + decoding_table(record["rows"]) + source(record))
    record = load(results, "value_adapters_smollm_cpu.json")
    parts.append("## Adapters on one base\n\n" + ADAPTERS_NOTE + "\n" + adapters_table(record) + source(record))
    record = load(results, "value_training_smollm_cpu.json")
    parts.append("## Value training\n\n" + TRAINING_NOTE + "\n" + training_table(record))
    if (results / TRAINING_GPU).is_file():
        parts.append("### TinyLlama's shape on a GPU\n\n" + training_table(load(results, TRAINING_GPU)))
    record = load(results, "labelling_smollm_cpu.json")
    parts.append("## Labelling\n\n" + LABELLING_NOTE + "\n" + labelling_table(record["rows"]) + source(record))
    return "\n".join(parts)


def load(results: Path, file: str) -> dict:
    return json.loads((results / file).read_text())


def source(record: dict) -> str:
    """Where a table comes from."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"\n`{record['command']}`; {record['device']}, {record['dtype']}, {versions}.\n"


def decoding_table(rows: Sequence[dict]) -> str:
    """A line per method, for each batch size: tokens/s, of `generate()`, overhead."""
    sizes, methods = sorted({r["batch_size"] for r in rows}), list(dict.fromkeys(r["method"] for r in rows))
    found = {(r["method"], r["batch_size"]): r for r in rows}

    def cell(row: dict) -> str:
        figures = [row["ratio_to_generate"], row["overhead"], *([row["of_bound"]] if "of_bound" in row else [])]
        return ", ".join([f"{row['tokens_per_second']:.0f}", *("-" if x is None else f"{x:.2f}" for x in figures)])

    bound = ", of the bound" if any("of_bound" in r for r in rows) else ""
    header = [f"tokens/s, of generate(), overhead{bound}", *(f"batch {size}" for size in sizes)]
    return markdown_rows(header, [[m, *(cell(found[m, size]) for size in sizes)] for m in methods])


def adapters_table(record: dict) -> str:
    """A line per number of value models and kind: tokens/s and of merged at each batch size, and memory."""
    rows = record["rows"]
    sizes = list(dict.fromkeys(r["batch_size"] for r in rows))
    lines: dict[tuple[int, str], list[str]] = {}
    for r in rows:
        cell = f"{r['tokens_per_second']:.0f}, {r['ratio_to_merged']:.2f}"
        lines.setdefault((r["value_models"], r["kind"]), []).append(cell)
    header = ["value models", "kind", *(f"batch {size}: tokens/s, of merged" for size in sizes), "MiB"]
    memory = record["mebibytes"]
    return markdown_rows(header, [[n, kind, *cells, memory[f"{kind}_{n}"]] for (n, kind), cells in lines.items()])


def training_table(record: dict) -> str:
    """Milliseconds per node of both ways of training and of predicting."""
    rows = [
        [
            what,
            *(f"{record[f'{key}_ms_per_node_{way}']:.1f}" for way in ("node", "tree")),
            f"{record[f'{key}_ratio']:.2f}",
        ]
        for what, key in (("training", "training"), ("predicting", "forward"))
    ]
    rows.append(["tokens", record["tokens_node"], record["tokens_tree"], f"{record['tokens_ratio']:.2f}"])
    return markdown_rows(["", "a path per node, ms/node", "a tree at once, ms/node", "ratio"], rows)


def labelling_table(rows: Sequence[dict]) -> str:
    """Tokens and seconds of both ways of reading texts."""
    header = ["reward", "texts", "tokens alone", "tokens shared", "ratio", "seconds alone", "seconds shared", "ratio"]
    return markdown_rows(
        header,
        [
            [
                r["reward"], f"{r['texts']} ({r['number']})", r["tokens_alone"], r["tokens_shared"],
                f"{r['tokens_ratio']:.2f}", f"{r['seconds_alone']:.1f}", f"{r['seconds_shared']:.1f}",
                f"{r['seconds_ratio']:.2f}",
            ]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
