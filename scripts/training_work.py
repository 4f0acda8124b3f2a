#!/usr/bin/env python
"""What the trainings of value models and policies took: generated tokens, tokens read in training, operations, seconds.

    python scripts/training_work.py --config tiny --output workspaces/tiny/training_work.json

Reads what the stages left in the workspace (trees, value models, policies of PPO); no model is loaded. Autoregressive
reward models and policies of RLOO and GRPO are not counted. Operations are those of utils/costs.py: the matrix products
of every pass. The reward models' reading of leaves and answers is left out. The states that a ridge start reads are
counted for each value model, as if it were trained alone; objectives of one command read them together. Seconds are
those that the stages measured, on the device and under the load that there was.
"""

from __future__ import annotations

import functools
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.errors import DataError
from utils.places import reference_path


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    if args.dry_run:
        folders = {"value models": ("value_models",), "policies": ("morlhf", dataset.name)}
        paths = {what: str(config.default_path(*parts)) for what, parts in folders.items()}
        cli.report_dry_run([(what, path, cli.found(path)) for what, path in paths.items()])
        return 0

    from utils.files import write_json
    from utils.models import resolved_config

    reference = resolved_config(reference_path(config, dataset)[0])
    value = resolved_config(config.locate(config.value_model.path))
    rows = [*value_rows(config, dataset, reference, value), *policy_rows(config, dataset, reference)]
    if not rows:
        raise DataError(f"{config.workspace} has no value model and no policy of {dataset.name}")
    header = ["what", "generated tokens", "tokens trained on", "TFLOP", "seconds"]
    cells = [[r["what"], f"{r['generated']:.0f}", f"{r['trained']:.0f}", f"{r['tflop']:.3g}",
              "-" if r["seconds"] is None else f"{r['seconds']:.0f}"] for r in rows]  # fmt: skip
    print("\n".join(cli.aligned([header, *cells])))
    if args.output:
        write_json(args.output, {"label": config.label, "dataset": dataset.name, "rows": rows})
    return 0


def value_rows(config, dataset, reference, value) -> list[dict]:
    """Trees and value models of every iteration; what several value models were trained on is counted once."""
    import json

    import yaml

    from utils.costs import forward_flops, matrix_parameters, training_flops
    from utils.hdf5_utils import read_trees

    rows, known = [], {}
    layers, rank = config.value_model.num_layers, config.value_model.lora.r
    for folder in sorted(Path(config.default_path("value_models")).glob("iter_*/*")):
        if folder.name not in dataset.objectives or not (folder / "metrics.json").is_file():
            continue
        metrics = json.loads((folder / "metrics.json").read_text())
        settings = yaml.safe_load((folder / "args.yaml").read_text())["settings"]
        name, data_dir = f"{folder.parent.name}/{folder.name}", settings["data_dir"]
        if data_dir not in known:
            trees = known[data_dir] = {split: list(read_trees(data_dir, split)) for split in ("train", "val")}
            both = trees["train"] + trees["val"]
            generated = sum(len(x) for t in both for x in t.tokens[1:])
            flops = generated * forward_flops(reference, 1, head_tokens=1)
            flops += sum(forward_flops(reference, len(t.tokens[0])) for t in both)
            if settings["init_checkpoint"]:  # grown under a value model, which read every candidate
                flops += generated * forward_flops(value, config.decoding.top_k, num_layers=layers)
            what = f"trees of {name if settings['init_checkpoint'] else folder.parent.name}"
            rows.append(row(what, generated, 0, flops, None))
        ridge = settings["training"].get("head_start") == "ridge"
        read = sum(len(x) for t in known[data_dir]["train"] for x in t.tokens) if ridge else 0
        flops = 2 * matrix_parameters(value, num_layers=layers) * read  # a tree is no text whose attention is known
        per_token = training_flops(value, 1, num_layers=layers, rank=rank)
        flops += metrics["tokens_read"] * per_token
        seconds = metrics["seconds"] + metrics.get("start_seconds", 0)
        rows.append(row(f"value model {name}", 0, read + metrics["tokens_read"], flops, seconds))
    return rows


def policy_rows(config, dataset, reference) -> list[dict]:
    """Policies of PPO."""
    import csv
    import json

    import yaml

    from utils.costs import forward_flops, training_flops
    from utils.data import encode_prompts, prompts_csv, read_prompts
    from utils.models import load_tokenizer

    rows, folder = [], Path(config.default_path("morlhf", dataset.name))
    found = [f.parent for f in sorted(folder.glob("*/*/metrics.json")) if (f.parent / "training_log.csv").is_file()]
    if not found:
        return rows
    tokenizer = load_tokenizer(reference_path(config, dataset)[0])
    texts = read_prompts(prompts_csv(config, dataset, "train"), config)

    @functools.cache
    def mean_length(prompts: int) -> float:
        lengths = [len(p) for p in encode_prompts(dataset, tokenizer, texts[:prompts])]
        return sum(lengths) / len(lengths)

    for policy in found:
        if json.loads((policy / "metrics.json").read_text())["kind"] != "ppo":
            continue
        spec = yaml.safe_load((policy / "args.yaml").read_text())["settings"]["training"]
        prompt, generated, trained, flops = mean_length(spec["num_prompts"]), 0.0, 0.0, 0.0
        with open(policy / "training_log.csv", newline="") as file:
            steps = list(csv.DictReader(file))
        for step in steps:
            answer = float(step["tokens"])
            text = prompt + answer
            generated += spec["batch_size"] * answer
            trained += spec["batch_size"] * text * spec["ppo_epochs"]
            decoding = forward_flops(reference, prompt) + answer * forward_flops(reference, 1, head_tokens=1)
            reading = 2 * forward_flops(reference, text, head_tokens=answer)  # the policy and the reference
            head = 2 * 2 * reference.get_text_config().hidden_size * reference.get_text_config().vocab_size * answer
            training = training_flops(reference, text, rank=spec["lora"]["r"]) + head
            flops += spec["batch_size"] * (decoding + reading + spec["ppo_epochs"] * training)
        what = f"policy {policy.parent.name}/{policy.name}, {len(steps)} steps"
        rows.append(row(what, generated, trained, flops, float(steps[-1]["seconds"])))
    return rows


def row(what: str, generated: float, trained: float, flops: float, seconds: float | None) -> dict:
    return {"what": what, "generated": round(generated), "trained": round(trained), "tflop": flops / 1e12,
            "seconds": seconds}  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main))
