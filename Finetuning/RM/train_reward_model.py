#!/usr/bin/env python
"""Train an objective's reward model from preference pairs or labelled texts, where no published one is used.

    python Finetuning/RM/train_reward_model.py --config smollm --objective help      # 3 minutes on 2 CPU cores

Writes <workspace>/reward_models/<objective> (or --output_dir) and, last, its metrics.json: held-out accuracy with its
95 % interval, beside what a bag of words achieves on the same held-out examples.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli
from utils.config import number_problem
from utils.errors import UsageError
from utils.files import hold, is_made, lets_go, whole_folder


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Defaults are the objective's `training` entries."
    )
    cli.add_common(parser)
    group = parser.add_argument_group("reward model")
    group.add_argument("--objective", required=True, help="the objective whose reward model is made")
    group.add_argument(
        "--data_files", nargs="+", default=[], help="files of pairs or texts, instead of the configuration's"
    )
    group.add_argument(
        "--output_dir", type=Path, help="folder to write (default: the objective's path in the workspace)"
    )
    group.add_argument(
        "--head", choices=("linear", "full"), help="a linear head on a frozen trunk, or fine-tune every layer"
    )
    group.add_argument("--num_layers", type=int, help="keep the base model's first N layers")
    group.add_argument("--max_rows", type=int, help="most training examples")
    group.add_argument("--max_holdout_rows", type=int, help="most held-out examples")
    group.add_argument("--max_length", type=int, help="most tokens of a text")
    group.add_argument("--rerun", action="store_true", help="train again and replace what is there (head full)")
    fit = parser.add_argument_group("fit")
    fit.add_argument(
        "--l2", type=float, help="linear head's penalty per example; 0: chosen by cross-validation over prompts"
    )
    fit.add_argument("--lr", type=float, help="learning rate (head full)")
    fit.add_argument("--num_epochs", type=int, help="passes over the data (head full)")
    fit.add_argument("--batch_size", type=int, help="examples per step (head full)")
    fit.add_argument("--seed", type=int, help="seed of the head's start and the data's order (head full)")
    fit.add_argument(
        "--bf16", action=BooleanOptionalAction, default=False, help="run the model in bfloat16 (fast on recent CPUs)"
    )
    return parser


@lets_go
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    spec = config.objective(args.objective)
    if spec.training is None:
        raise UsageError(
            f"objectives.{spec.name} has no `training` entry in {config.path}: its reward is "
            f"{spec.path or spec.function}"
        )
    fit = cli.overridden(spec.training, args, problem=lambda n, v: "" if n == "head" else number_problem(n, v))
    spec = dataclasses.replace(spec, training=fit)
    output = args.output_dir or config.default_path(spec.path)
    if args.dry_run:
        return _dry_run(config, spec, output, args.data_files)

    from utils import models
    from utils import reward_training as training
    from utils.judge import judge_path
    from utils.tracking import Tracker

    if args.output_dir is None:
        training.check_head(config, spec)
    arguments = training.arguments_of(spec.training, args.bf16, args.data_files)
    hold(output)
    done = training.read_metrics(output)
    if spec.training.head == "full" and is_made(
        output, done.get("arguments"), arguments, rerun=args.rerun, what="reward model", option="--output_dir"
    ):
        print(f"{output} is complete (--rerun trains it again)\n{training.summary(spec.name, done)}")
        return 0

    started, device = time.monotonic(), models.pick_device(args.device)
    tokenizer = models.load_tokenizer(config.locate(config.base_model.path), made_by=config.base_model.made_by)
    source, holdout, dropped = training.read_examples(config, spec, tokenizer.eos_token or "", args.data_files)
    print(
        f"{spec.name}: {len(source)} training and {len(holdout)} held-out examples"
        + (f"; dropped {dict(dropped)}" if dropped else "")
    )
    # A linear head is two small files, which may stand beside others; all of a model appears at once.
    written = whole_folder(output) if spec.training.head == "full" else nullcontext(output)
    with Tracker(args.wandb, "train_reward_model", f"reward_{spec.name}", arguments) as tracker, written as folder:
        metrics = _train(args, config, spec, folder, source, holdout, device)
        judge, words = training.bag_of_words(source, holdout)
        metrics |= {"bag_of_words": words, "num_train": len(source)}
        tracker.summary(metrics)
        if spec.training.kind == "preference" and args.output_dir is None:
            judge.save(judge_path(config, spec.name))  # evaluation logs it beside the reward; no stage trains on it
        metrics |= {"seconds": round(time.monotonic() - started, 1), "arguments": arguments}
        training.write_metrics(folder, metrics)
    print(f"{training.summary(spec.name, metrics)}\nsaved {output}")
    return 0


def _train(args, config, spec, output: Path, source, holdout, device) -> dict:
    """Train the head that is asked for; its metrics. A trainer's curve goes into the run that --wandb has opened."""
    from utils import reward_training as training

    if spec.training.head == "linear":
        return training.train_linear(config, spec, output, source, holdout, device, args.bf16)
    report_to = "wandb" if args.wandb else "none"
    return training.train_full(config, spec, output, source, holdout, device, args.bf16, report_to)


def _dry_run(config, spec, output: Path, data_files) -> int:
    from utils.rows import describe_source

    base = config.locate(config.base_model.path)
    rows = [("base model", base, cli.found(base, config.base_model.made_by))]
    for name in ("source", "holdout"):
        part = getattr(spec.training, name)
        rows.append(
            (
                f"{name}, hash {part.hash_range[0]:g} to {part.hash_range[1]:g}",
                describe_source(part, config, data_files),
                "",
            )
        )
    cli.report_dry_run([*rows, ("output", str(output), "here" if output.exists() else "this command makes it")])
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
