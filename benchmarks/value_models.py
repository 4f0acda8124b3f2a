#!/usr/bin/env python
"""How well values can be told within a prompt: by layers, by pooling, and by the number of training trees.

    python benchmarks/value_models.py --config smollm --layers 8 12 16 20 --trees 50 100 200 400 \
        --output benchmarks/results/value_models_smollm.json
    python benchmarks/value_models.py --config smollm --layers 12 --shapes trees/wide trees/deep --tokens 20000 40000 \
        --output benchmarks/results/tree_shapes_smollm.json

One pass over labelled trees reads every node with the untrained base; each row is then a ridge regression of the node
values on the states of one layer, of the last token or averaged over the response, as `--head_start ridge` fits it.
Reported on the inner nodes of the validation trees: correlation and explained variance within a prompt, over all depths
and at the root's children, where most is decided. The last row of each objective is the context-free token table.

--shapes compares trees of other shapes as training data, at equal numbers of generated tokens: each folder's first
trees until it has --tokens, but for the validation trees' prompts; all are judged on the same validation trees.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import keep
from utils import cli


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="anthropic", help="data set of the configuration (default: anthropic)")
    parser.add_argument("--data_dir", type=Path, help="labelled trees, split (default: the workspace's iteration 0)")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 12, 16], help="first N layers of the base")
    parser.add_argument("--trees", type=int, nargs="+", default=[50, 100, 200], help="numbers of training trees")
    parser.add_argument("--shapes", type=Path, nargs="+", default=[], help="folders of labelled trees of other shapes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20000, 40000], help="generated tokens of each shape")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    data_dir = args.data_dir or Path(config.default_path("data_for_training", dataset.name, "iter_0"))
    if args.dry_run:
        cli.report_dry_run([("trees", str(data_dir), cli.found(str(data_dir), "split_data.py"))])
        return 0

    import numpy as np

    from utils.hdf5_utils import read_trees
    from utils.models import pick_device

    trees = {split: list(read_trees(data_dir, split)) for split in ("train", "val")}
    device = pick_device(args.device)
    if args.shapes:
        rows = shape_rows(config, dataset, trees, args.shapes, args.tokens, args.layers[0], device)
    else:
        states = read_states(config, dataset, [*trees["train"], *trees["val"]], args.layers, device)
        split = np.repeat([False, True], [sum(len(t) - 1 for t in trees[s]) for s in ("train", "val")])
        rows = []
        for objective in dataset.objectives:
            for layers in args.layers:
                for pooling in ("last", "mean"):
                    x, what = states[layers, pooling], {"layers": layers, "pooling": pooling}
                    rows += curve(states, x, objective, split, args.trees, **what)
            rows += table_rows(trees, objective, args.trees)
    record = {
        "rows": rows,
        "label": config.label,
        "training_trees": len(trees["train"]),
        "validation_trees": len(trees["val"]),
        "command": "python benchmarks/value_models.py " + " ".join(sys.argv[1:] if argv is None else argv),
    }
    print_rows(rows)
    keep(record, args.output)
    return 0


def shape_of(tree) -> str:
    """`4-2-2`: the most children of a node at each depth."""
    import numpy as np

    children = np.bincount(tree.parent[1:], minlength=len(tree))
    return "-".join(str(children[tree.depth == d].max()) for d in range(tree.depth.max()))


def shape_rows(config, dataset, trees, folders: list[Path], budgets: list[int], layers: int, device) -> list[dict]:
    """A row per objective, folder and budget; the data set's own training trees are the first folder."""
    import numpy as np

    from utils.hdf5_utils import read_trees

    held_out = {t.prompt_index for t in trees["val"]}
    sources = {"": trees["train"]} | {str(f): list(read_trees(f)) for f in folders}
    rows = []
    for source, found in sources.items():
        found = [t for t in found if t.prompt_index not in held_out]
        tokens = np.cumsum([sum(len(x) for x in t.tokens[1:]) for t in found])
        numbers = {int(np.searchsorted(tokens, budget)) + 1: budget for budget in budgets if tokens[-1] >= budget}
        if not numbers:
            print(f"{source or 'training trees'}: only {tokens[-1]} tokens; left out")
            continue
        found = found[: max(numbers)]
        shape = max((shape_of(t) for t in found), key=[shape_of(t) for t in found].count)
        states = read_states(config, dataset, [*found, *trees["val"]], [layers], device)
        split = np.repeat([False, True], [sum(len(t) - 1 for t in s) for s in (found, trees["val"])])
        for objective in dataset.objectives:
            for row in curve(states, states[layers, "mean"], objective, split, list(numbers), layers=layers,
                             pooling="mean"):  # fmt: skip
                rows.append(row | {"shape": shape, "tokens": numbers[row["trees"]]})
    return sorted(rows, key=lambda r: (dataset.objectives.index(r["objective"]), r["tokens"], r["shape"]))


def read_states(config, dataset, trees, layers: list[int], device) -> dict:
    """What every node but the root is: {(layers, pooling): (N, H) states}, targets, group, depth, leaf."""
    import numpy as np
    import torch

    from utils.cached_models import backbone_of
    from utils.models import load_causal_lm, pick_dtype
    from utils.node_values import backbone_inputs
    from utils.tree_examples import Example, preorder
    from utils.tree_layouts import collate, lay_out, response_mean

    path = str(config.sft_path(dataset))
    model = load_causal_lm(path, device, pick_dtype(config, device), num_layers=max(layers))
    backbone = backbone_of(model)
    found = {(n, pooling): [] for n in layers for pooling in ("last", "mean")}
    more = {"group": [], "depth": [], "leaf": []} | {("target", o): [] for o in dataset.objectives}
    bar = cli.progress(total=len(trees), desc="states", unit="tree")
    for number, tree in enumerate(trees):
        nodes = np.array([n for n in preorder(tree.parent) if n], np.int64)
        batch = collate([lay_out(Example(tree, nodes, tree.values[dataset.objectives[0]]), nodes)], device)
        inputs = backbone_inputs(batch, model.dtype)
        with torch.inference_mode():
            hidden = backbone(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            for n in layers:  # the last is normed already
                state = (hidden[n] if n == len(hidden) - 1 else backbone.norm(hidden[n]))[0].float()
                found[n, "last"].append(state[batch.places].half().cpu())
                found[n, "mean"].append((response_mean(batch, torch.float32) @ state).half().cpu())
        more["group"].append(np.full(len(nodes), number))
        more["depth"].append(tree.depth[nodes])
        more["leaf"].append(np.isin(nodes, tree.leaves))
        for o in dataset.objectives:
            more["target", o].append(tree.values[o][nodes])
        bar.update(1)
    bar.close()
    return {k: torch.cat(v) for k, v in found.items()} | {k: np.concatenate(v) for k, v in more.items()}


def curve(states, x, objective: str, validation, numbers: list[int], **what) -> list[dict]:
    """Rows of one regression, as `fit_ridges` fits it, at several numbers of training trees."""
    import torch

    from utils.head_starts import add_moments, choose_ridge

    x, group = x.double(), states["group"]
    target = torch.from_numpy(states["target", objective])
    gram = torch.zeros(2, 5, x.shape[1], x.shape[1], dtype=torch.float64)
    cross, read, rows = torch.zeros(1, 2, 5, x.shape[1], dtype=torch.float64), 0, []
    for number in sorted(n for n in numbers if n <= group[~validation].max() + 1):
        for tree in range(read, number):
            mine = torch.from_numpy(group == tree)
            add_moments(gram, cross, tree % 5, x[mine], target[None, mine], x.new_ones(int(mine.sum())))
        read = number
        ridge, weight = choose_ridge(gram, cross[0])
        predicted = (x @ weight).numpy()
        inner = validation & ~states["leaf"]
        rows.append(
            {"objective": objective, **what, "trees": number, "ridge": ridge}
            | quality(target.numpy(), predicted, group, inner, states["depth"])
        )
    return rows


def quality(target, predicted, group, inner, depth) -> dict[str, float]:
    """Correlation and explained variance within a prompt on inner nodes, and the correlation at depth 1."""
    from utils.fit_measures import correlation, explained_variance

    first = inner & (depth == 1)
    return {
        "correlation": round(correlation(target[inner], predicted[inner], group[inner]), 4),
        "explained": round(explained_variance(target[inner], predicted[inner], group[inner]), 4),
        "correlation_depth_1": round(correlation(target[first], predicted[first], group[first]), 4),
    }


def table_rows(trees, objective: str, numbers: list[int]) -> list[dict]:
    """The token table's rows: a node is worth the mean of its tokens' values."""
    import numpy as np

    from utils.token_table import fit_token_table

    vocabulary = 1 + max(int(t.max()) for split in trees.values() for tree in split for t in tree.tokens if len(t))
    nodes = [(tree, n) for tree in trees["val"] for n in range(1, len(tree))]
    target = np.array([tree.values[objective][n] for tree, n in nodes])
    group = np.array([tree.prompt_index for tree, _ in nodes])
    depth = np.concatenate([tree.depth[1:] for tree in trees["val"]])
    leaves = [set(tree.leaves.tolist()) for tree in trees["val"]]
    inner = np.concatenate(
        [[n not in own for n in range(1, len(t))] for t, own in zip(trees["val"], leaves, strict=True)]
    )
    rows = []
    for number in numbers:
        if number > len(trees["train"]):
            continue
        table, _ = fit_token_table(trees["train"][:number], objective, vocabulary)
        predicted = np.array([table[tree.response_tokens(n)].mean() for tree, n in nodes])
        row = {"objective": objective, "layers": 0, "pooling": "token table", "trees": number, "ridge": None}
        rows.append(row | quality(target, predicted, group, inner, depth))
    return rows


def print_rows(rows: list[dict]) -> None:
    head = f"{'objective':<14} {'layers':>6} {'pooling':<12} {'trees':>5}"
    print(f"{head} {'corr.':>7} {'explained':>9} {'depth 1':>8}  shape")
    for r in rows:
        print(
            f"{r['objective']:<14} {r['layers'] or '':>6} {r['pooling']:<12} {r['trees']:>5} "
            f"{r['correlation']:>7.3f} {r['explained']:>9.3f} {r['correlation_depth_1']:>8.3f}  "
            + (f"{r['shape']}, {r['tokens']} tokens" if "shape" in r else "")
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
