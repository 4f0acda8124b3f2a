#!/usr/bin/env python
"""Labelling: tokens and seconds of the leaves' rewards, each text read alone and what texts share read once.

    python benchmarks/labelling.py --config smollm --output benchmarks/results/labelling_smollm_cpu.json

Real trees are scored as `label_tree.py` does it, by the configuration's pooled rewards together (one pass over their
trunk) and by a classifier of --layers layers on the base model (a model's weights do not change its speed, so its head
is random). Beside the leaves stands one leaf of each tree: texts that have no more than a template in common. The two
ways alternate and the ratios are of their medians. Tokens are what the model is given, padding included.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import conditions, in_turns, keep
from utils import cli
from utils.errors import DataError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", default="anthropic", help="whose trees, objectives and templates")
    parser.add_argument("--data_dir", type=Path, help="trees (default: the workspace's of iteration 0)")
    parser.add_argument("--prompts", type=int, default=24, help="trees, from the first on; scored together")
    parser.add_argument("--layers", type=int, default=12, help="the classifier's, the first of the base model")
    parser.add_argument("--batch_size", type=int, default=32, help="most rows in a forward pass")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, after one that does not count")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    data_dir = args.data_dir or Path(config.default_path("tree_data", dataset.name, "iter_0"))
    if args.dry_run:
        cli.report_dry_run([("trees", str(data_dir), cli.found(str(data_dir), "get_data_base.py"))])
        return 0

    from utils.hdf5_utils import read_tree, tree_indices
    from utils.labelling import leaf_texts
    from utils.models import load_tokenizer, pick_device

    device = pick_device(args.device)
    trees = [read_tree(data_dir, i) for i in tree_indices(data_dir)[: args.prompts]]
    if not trees:
        raise DataError(f"no trees in {data_dir}; make them with get_data_base.py ... --output_dir {data_dir}")
    tokenizer = load_tokenizer(config.sft_path(dataset))
    leaves = [(tree.prompt, text) for tree in trees for text in leaf_texts(tree, tokenizer)]
    firsts = [(tree.prompt, leaf_texts(tree, tokenizer)[0]) for tree in trees]
    texts = {"leaves": leaves, "one leaf of each tree": firsts}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for reward, (with_reward, objectives) in rewards_of(config, dataset, args.layers, Path(folder)).items():
            rows += [
                {"reward": reward, "objectives": list(objectives)} | row
                for row in measure(with_reward, dataset, objectives, texts, args, device)
            ]
    print(
        f"\n{'reward':<12}{'texts':<24}{'':>6}{'tokens':>10}{'shared':>10}{'ratio':>7}{'s':>9}{'shared':>9}{'ratio':>7}"
    )
    for r in rows:
        print(
            f"{r['reward']:<12}{r['texts']:<24}{r['number']:>6}{r['tokens_alone']:>10}{r['tokens_shared']:>10}"
            f"{r['tokens_ratio']:>7.2f}{r['seconds_alone']:>9.2f}{r['seconds_shared']:>9.2f}{r['seconds_ratio']:>7.2f}"
        )
    record = {
        "rows": rows,
        "trees": len(trees),
        "layers_of_the_classifier": args.layers,
        **conditions("benchmarks/labelling.py", argv, device, "float32"),
    }
    keep(record, args.output)
    return 0


def rewards_of(config, dataset, layers: int, folder: Path) -> dict:
    """{kind: (configuration, objectives)}; the classifier is made in `folder`."""
    from utils.models import new_sequence_classifier, pick_device

    base = config.locate(config.base_model.path)
    model, tokenizer = new_sequence_classifier(
        base, pick_device("cpu"), num_layers=layers, special_tokens=config.base_model.special_tokens
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pooled = tuple(n for n in dataset.objectives if config.objective(n).kind == "pooled")
    spec = dataclasses.replace(
        config.objective(dataset.objectives[0]), name="classifier", kind="classifier", path=str(folder),
        text="{shown}{response}", training=None,
    )  # fmt: skip
    found = {"pooled": (config, pooled)} if pooled else {}
    return found | {"classifier": (dataclasses.replace(config, objectives={"classifier": spec}), ("classifier",))}


def measure(config, dataset, objectives, texts: dict, args, device) -> list[dict]:
    """A row for each kind of texts, {name: [(prompt, response)]}: tokens and seconds of both ways."""
    import torch

    from utils.rewards import RewardSet

    ways = {
        way: RewardSet(config, dataset, objectives, device, args.batch_size, **options)
        for way, options in (("alone", {"row_tokens": 0}), ("shared", {}))
    }
    read = []
    for rewards in ways.values():
        for scorer in rewards._scorers:
            model = getattr(scorer, "trunk", None) or scorer.model
            model.get_input_embeddings().register_forward_hook(lambda _, ids, out: read.append(ids[0].numel()))
    rows = []
    for name, pairs in texts.items():
        prompts, responses = zip(*pairs, strict=True)
        scores: dict = {}

        def score(way: str, prompts=prompts, responses=responses, scores=scores) -> int:
            """Tokens that a model was given."""
            read.clear()
            scores[way] = ways[way].score(prompts, responses)
            return sum(read)

        seconds, tokens = in_turns({way: functools.partial(score, way) for way in ways}, args.rounds, device)
        apart = max(abs(scores["alone"][o] - scores["shared"][o]).max() for o in objectives)
        assert apart < 1e-3, f"the two ways give rewards that differ by {apart}"
        took = {way: statistics.median(s) for way, s in seconds.items()}
        row = {"texts": name, "number": len(pairs)}
        for what, of in (("tokens", tokens), ("seconds", {way: round(s, 4) for way, s in took.items()})):
            row |= {f"{what}_{way}": of[way] for way in ways} | {f"{what}_ratio": round(of["alone"] / of["shared"], 3)}
        rows.append(row | {"largest_difference": float(f"{apart:.1e}")})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(main))
