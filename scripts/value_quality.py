#!/usr/bin/env python
"""What each iteration's value model explains on the held-out trees of each iteration's policy, beside the token table.

    python scripts/value_quality.py --objectives help,relevance --iterations 2 --config smollm

Reads <workspace>/value_models/iter_<N>/<objective> and the val/ trees of <workspace>/data_for_training/<dataset>/iter_0
and iter_<N>/<objective>; writes a table and <workspace>/value_quality.json. Where there is a token table of the
objective, it is measured at the same nodes, and the two correlations are compared, paired by prompt.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--objectives", default="all", help="objectives, e.g. help,relevance, or all (default: all)")
    parser.add_argument("--iterations", type=int, default=1, help="the last iteration (default: 1)")
    parser.add_argument("--output", type=Path, help="default: <workspace>/value_quality.json")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    objectives = cli.objectives_of(dataset, args.objectives)
    folders = {
        (objective, n): Path(
            config.default_path("data_for_training", dataset.name, f"iter_{n}", *([objective] * (n > 0)))
        )
        for objective in objectives
        for n in range(args.iterations + 1)
    }
    if args.dry_run:
        rows = [
            (f"trees of {o}, policy {n}", str(f), cli.found(str(f), "split_data.py")) for (o, n), f in folders.items()
        ]
        cli.report_dry_run(rows)
        return 0

    from utils.files import write_json
    from utils.models import load_tokenizer, pick_device, resolved_config
    from utils.token_table import load_token_table
    from utils.value_models import load_value_models

    device = pick_device(args.device)
    reference = config.sft_path(dataset)
    tokenizer, vocab_size = load_tokenizer(reference), resolved_config(reference).get_text_config().vocab_size
    rows, tables = [], {}
    for objective in objectives:
        file = Path(config.default_path("token_tables", f"{objective}.safetensors"))
        if file.is_file():
            tables[objective] = load_token_table(file, vocab_size)
        for model in range(args.iterations + 1):
            loaded = load_value_models(config, None, {objective: model}, tokenizer, vocab_size, device)[objective]
            for policy in range(args.iterations + 1):
                report = measure(loaded, folders[objective, policy], objective, device, tables.get(objective))
                rows.append({"objective": objective, "value_model": model, "policy": policy, **report})
                print(f"{objective}: value model {model} on trees of policy {policy}: {describe(report)}")
                if "token_table" in report:
                    gain = report["correlation_gain"]
                    print(
                        f"  token table: {describe(report['token_table'])}; the value model's correlation is higher by "
                        f"{gain['difference']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
                    )
    write_json(args.output or Path(config.default_path("value_quality.json")), {"label": config.label, "rows": rows})
    return 0


def describe(fit: dict) -> str:
    """What is explained within a prompt, with standard errors over prompts."""
    parts = (("explained within a prompt", "explained_variance"), ("correlation", "correlation"))
    return ", ".join(
        f"{said} {fit[f'{what}_within_prompt']:.3f} (s.e. {fit[f'{what}_within_prompt_error']:.3f})"
        for said, what in parts
    )


def measure(model, data_dir: Path, objective: str, device, table=None) -> dict:
    """A value model's fit to the held-out inner nodes of a folder of trees, and a token table's (V,) beside it."""
    import numpy as np

    from utils.fit_measures import correlation_gain, fit_report, validation_report
    from utils.hdf5_utils import read_trees
    from utils.node_values import predict
    from utils.token_table import collect_leaves
    from utils.tree_examples import make_examples, validation_nodes

    examples = make_examples(read_trees(data_dir, "val"), objective, validation_nodes, data_dir=data_dir)
    said = predict(model, examples, device=device).cpu().numpy()
    report = validation_report(examples, said)
    if table is not None:
        order = {id(x.tree): x.nodes for x in examples}  # of the predictions
        nodes = collect_leaves((x.tree for x in examples), objective, len(table), lambda tree: order[id(tree)])
        lexical = nodes.counts @ table.astype(np.float64)
        report["token_table"] = fit_report(nodes.rewards, lexical, nodes.tree)
        report["correlation_gain"] = correlation_gain(nodes.rewards, said, lexical, nodes.tree)
    return report


if __name__ == "__main__":
    sys.exit(cli.run(main))
