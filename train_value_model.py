"""Train the value model of one objective, or of several in turn, on labelled trees (MAVIS, section 4).

    python train_value_model.py --dataset anthropic --objective help          # or help,harm or all
    accelerate launch train_value_model.py ...      # data-parallel; a step has --batch_size nodes over all processes

Reads what split_data.py made, <workspace>/data_for_training/<dataset>/iter_0. Makes
<workspace>/value_models/iter_0/<objective>: a PEFT adapter, metrics.json and training_log.csv. The folder appears when
it is complete; killed before, the same command goes on from its last evaluation. A complete one is reported and not
trained again.

Several objectives share what they can: trees are read once, and with --head_start ridge the untrained model's states
too, so that all heads take little more time than one. Each is, to the last bit, what it is alone.
"""

from __future__ import annotations

import argparse
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from utils.cli import add_common, config_from, found, objectives_of, overridden, report_dry_run, run
from utils.errors import DataError, UsageError
from utils.files import lets_go
from utils.places import check_adapter_folder, reference_path, value_model_folder
from utils.specs import Config, DatasetSpec, ObjectiveSpec, TrainingSpec


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    group = parser.add_argument_group("what is learned from what")
    group.add_argument("--dataset", default="anthropic", help="data set of the configuration (default: anthropic)")
    group.add_argument(
        "--objective", required=True, help="whose values are learned: an objective, several (help,harm) or all"
    )
    group.add_argument("--data_dir", help="labelled trees in train/ and val/ (default: <workspace>/data_for_training/"
                       "<dataset>/iter_0, or the iteration after --init_checkpoint's)")  # fmt: skip
    group.add_argument("--init_checkpoint", help="value model to continue from, e.g. value_models/iter_0/help")
    group.add_argument("--output_dir", help="default: <workspace>/value_models/iter_0/<objective>, or the iteration "
                       "after --init_checkpoint's")  # fmt: skip
    group.add_argument("--max_trees", type=int, help="train on the first N training trees only (default: all)")
    group.add_argument("--rerun", action="store_true", help="train again and replace what is there")
    group = parser.add_argument_group("targets")
    group.add_argument("--KL_penalty", type=float, default=0.0,
                       help="eta of the soft values: reward per nat of log-ratio (default: 0)")  # fmt: skip
    group.add_argument("--log_ratio", choices=("future", "whole"),
                       help="what a soft value pays for: the log-ratio from the node on, or the whole sequence's, as "
                       "published (default: what label_tree.py --soft wrote, else future)")  # fmt: skip
    group.add_argument("--deepest_fraction", type=float, help="share of each tree's deepest nodes to train on")
    group = parser.add_argument_group("training (defaults: the configuration's)")
    group.add_argument("--num_epochs", type=int, help="passes over the training nodes; 0: --head_start ridge alone")
    group.add_argument("--head_start", choices=("mean", "ridge"),
                       help="the head: a new one predicts the targets' mean, or a ridge regression")  # fmt: skip
    group.add_argument("--targets", choices=("ends", "dense"),
                       help="a node's target at its last token (published), or at each of its tokens")  # fmt: skip
    group.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=None,
                       help="train in units of the targets' standard deviation")  # fmt: skip
    group.add_argument("--batch_size", type=int, help="nodes per optimizer step, over all processes")
    group.add_argument("--lr", type=float, help="Adafactor's highest learning rate")
    group.add_argument("--weight_decay", type=float, help="decay per step, times the learning rate")
    group.add_argument("--warmup_steps", type=int, help="steps in which the rate rises (at most half of all)")
    group.add_argument("--no_warmup", action="store_true", help="no warm-up, as published for continued training")
    group.add_argument("--packing", choices=("node", "tree"),
                       help="read one path per node (published), or a tree's tokens once")  # fmt: skip
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None,
                       help="bfloat16 matrix products where the device has them")  # fmt: skip
    group.add_argument("--seed", type=int, help="of the adapter, the steps' order, dropout and the nodes' choice")
    return parser


def training_spec(args, dataset, objective):
    """The configuration's hyperparameters with what the command line overrides."""
    import dataclasses
    import math

    spec = dataset.training
    if args.init_checkpoint and objective.deepest_fraction_continued is not None:
        spec = dataclasses.replace(spec, deepest_fraction=objective.deepest_fraction_continued)
    spec = overridden(spec, args)
    if args.no_warmup:
        if args.warmup_steps:
            raise UsageError(f"--no_warmup and --warmup_steps {args.warmup_steps} exclude each other")
        spec = dataclasses.replace(spec, warmup_steps=0)
    for name, low, high in (
        ("num_epochs", 0, None),
        ("batch_size", 1, None),
        ("warmup_steps", 0, None),
        ("seed", 0, None),
        ("weight_decay", 0, None),
        ("deepest_fraction", 0, 1),
    ):
        value = getattr(spec, name)
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise UsageError(
                f"--{name} must be at least {low}" + (f" and at most {high}" if high else "") + f", got {value}"
            )
    if spec.num_epochs == 0 and spec.head_start != "ridge":
        raise UsageError("--num_epochs 0 trains nothing but --head_start ridge; give that, or at least 1")
    if not math.isfinite(spec.lr) or spec.lr <= 0:
        raise UsageError(f"--lr must be a positive number, got {spec.lr}")
    if not math.isfinite(args.KL_penalty) or args.KL_penalty < 0:
        raise UsageError(f"--KL_penalty must be a finite number of at least 0, got {args.KL_penalty}")
    if args.max_trees is not None and args.max_trees < 1:
        raise UsageError(f"--max_trees must be at least 1, got {args.max_trees}")
    return spec


def iteration_of(args, objective: str) -> int | None:
    """The iteration that is trained: 0, or the one after --init_checkpoint's; None where its name does not say."""
    if not args.init_checkpoint:
        return 0
    place = Path(args.init_checkpoint)
    match = re.fullmatch(r"iter_(\d+)", place.parent.name)
    return int(match[1]) + 1 if match and place.name == objective else None


def check_split(data_dir: Path, dataset: str) -> None:
    """Raise a DataError unless the folder has trees in train/ and val/."""
    if not data_dir.is_dir():
        raise DataError(
            f"no folder {data_dir}; make it with get_data_base.py, label_tree.py and "
            f"python split_data.py <trees> --dataset {dataset} --output_dir {data_dir}"
        )
    for split in ("train", "val"):
        if not any((data_dir / split).glob("prompt*_tree.json")):
            raise DataError(f"no trees in {data_dir / split}; make train/ and val/ of labelled trees with: "
                            f"python split_data.py <trees> --dataset {dataset} --output_dir {data_dir}")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one objective's training reads, by which hyperparameters, and what it makes; `init` None: from the base."""

    objective: ObjectiveSpec
    spec: TrainingSpec
    data_dir: Path
    init: Path | None
    output: Path


def plan_of(args, config: Config, dataset: DatasetSpec, objective: ObjectiveSpec) -> Plan:
    """The command line's plan for one of its objectives.

    Raises:
        UsageError: numbers that cannot be meant, or a place that has to be named.
    """
    spec = training_spec(args, dataset, objective)
    iteration = iteration_of(args, objective.name)
    for name in ("data_dir", "output_dir"):
        if iteration is None and getattr(args, name) is None:
            place = f"--init_checkpoint {args.init_checkpoint} is not .../iter_<N>/{objective.name}"
            raise UsageError(f"{place}, so --{name} is needed")
    default = ("data_for_training", dataset.name, f"iter_{iteration}")
    data_dir = config.find(args.data_dir) if args.data_dir else config.default_path(*default)
    init = config.find(args.init_checkpoint) if args.init_checkpoint else None
    output = args.output_dir or value_model_folder(config, None, iteration, objective.name)
    return Plan(objective, spec, Path(data_dir), init, Path(output))


def dry_run(config: Config, plans: list[Plan], reference: str, made_by: str) -> None:
    """Print what would be loaded and made."""
    value_base = config.locate(config.value_model.path)
    rows = [("tokenizer", reference, found(reference, made_by)),
            ("value model's base", value_base, found(value_base, config.value_model.made_by))]  # fmt: skip
    for split, what in (("train", "training trees"), ("val", "validation trees")):
        for folder in dict.fromkeys(plan.data_dir / split for plan in plans):
            rows.append((what, folder, found(folder, "split_data.py")))
    for plan in plans:
        if plan.init:
            rows.append(("continued from", plan.init, found(plan.init, "train_value_model.py")))
        state = "here" if plan.output.exists() else "made by this command"
        rows.append((f"value model of {plan.objective.name}", plan.output, state))
    report_dry_run(rows)


@lets_go
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    dataset = config.dataset(args.dataset)
    names = objectives_of(dataset, args.objective)
    if len(names) > 1:
        for flag in ("init_checkpoint", "output_dir"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} is one objective's; --objective {args.objective} names {len(names)}")
    plans = [plan_of(args, config, dataset, config.objective(name)) for name in names]
    reference, made_by = reference_path(config, dataset)
    if args.dry_run:
        dry_run(config, plans, reference, made_by)
        return 0
    for plan in plans:
        check_split(plan.data_dir, dataset.name)
        if plan.init:
            check_adapter_folder(plan.init, "--init_checkpoint")

    from accelerate import Accelerator

    from utils.models import pick_device

    accelerator = Accelerator(cpu=args.device == "cpu")
    device = accelerator.device if accelerator.num_processes > 1 else pick_device(args.device)
    for start, alike in common_starts(args, config, dataset, plans, accelerator, device):
        for plan in alike:
            train_one(args, config, dataset, plan, start, accelerator, device)
    return 0


def common_starts(args, config: Config, dataset: DatasetSpec, plans: list[Plan], accelerator, device):
    """Yield (what plans that learn from the same share, these plans), in the plans' order."""
    from utils.common_start import CommonStart, Source

    def source(plan: Plan) -> Source:
        return Source(plan.spec, plan.data_dir, plan.init, args.max_trees, args.KL_penalty, args.log_ratio)

    for same, alike in itertools.groupby(plans, source):
        alike = list(alike)
        outputs = {plan.objective.name: plan.output for plan in alike}
        yield CommonStart(config, dataset, same, outputs, rerun=args.rerun, accelerator=accelerator, device=device,
                          say=accelerator.print), alike  # fmt: skip


def train_one(args, config: Config, dataset: DatasetSpec, plan: Plan, start, accelerator, device) -> None:
    """Train one objective's value model from a `CommonStart`, unless it is there."""
    import dataclasses

    from utils import provenance, training_output
    from utils.files import write_json
    from utils.tracking import Tracker
    from utils.value_models import vocabulary_hash
    from utils.value_training import train

    name = plan.objective.name
    settings = {
        "dataset": dataset.name, "objective": name, "data_dir": config.portable(plan.data_dir),
        "init_checkpoint": config.portable(plan.init) if plan.init else None, "KL_penalty": args.KL_penalty,
        "log_ratio": args.log_ratio, "max_trees": args.max_trees,
        "training": dataclasses.asdict(plan.spec), "value_model": dataclasses.asdict(config.value_model),
    }  # fmt: skip
    record = provenance.of_training(device, accelerator.num_processes, config)
    main_process = accelerator.is_main_process
    with accelerator.main_process_first():
        folder = training_output.open_output(plan.output, settings, record, rerun=args.rerun, main_process=main_process)
    if folder is None:
        accelerator.print(f"{plan.output} is complete (--rerun trains it again)")
        return
    accelerator.print(f"value model of {name}: {folder} until it is complete, then {plan.output}")
    with training_output.discarded_unless_begun(folder, main_process=main_process):
        training, validation = start.examples(name)
        nodes = [sum(len(x.nodes) for x in split) for split in (training, validation)]
        accelerator.print(
            f"training: {len(training)} trees, {nodes[0]} nodes; validation: {len(validation)}, {nodes[1]}"
        )
        model = start.model()
        begun = (folder / training_output.STATE).is_file()
        start_seconds = 0.0 if begun else round(start.give_head(model, name), 2)
        states = start.validation_states(model, name)

    title = f"value_{plan.output.parent.name}_{name}"
    with Tracker(args.wandb and main_process, "train_value_model", title, settings) as tracker:
        metrics = train(model, training, validation, start.spec, folder, accelerator=accelerator, device=device,
                        validation_states=states, say=accelerator.print, log=tracker.log)  # fmt: skip
        if main_process:
            known = {"size": len(start.tokenizer), "hash": vocabulary_hash(start.tokenizer)}
            record = {"objective": name, "label": config.label, "vocabulary": known,
                      "pooling": config.value_model.pooling, "start_seconds": start_seconds, **metrics}  # fmt: skip
            training_output.save_adapter(model, folder)
            write_json(folder / training_output.METRICS, record)
            training_output.publish(folder, plan.output)
        tracker.summary(metrics)
    fit = metrics["validation"]
    accelerator.print(
        f"{plan.output}: validation MSE {fit['mse']:.4f}, explained variance {fit['explained_variance']:.3f}, "
        f"within a prompt {fit['explained_variance_within_prompt']:.3f} (correlation "
        f"{fit['correlation_within_prompt']:.3f}, s.e. {fit['correlation_within_prompt_error']:.3f}), "
        f"{metrics['seconds']:.0f} s, "
        f"{metrics['tokens_per_second']:.0f} tokens/s"
    )
    if not fit["correlation_within_prompt"] >= 2 * fit["correlation_within_prompt_error"]:  # nan too
        accelerator.print(
            "note: within a prompt it explains nothing that can be told from chance, so it cannot steer; what helps: "
            "more trees, or value_model.pooling: mean with training.head_start: ridge"
        )


if __name__ == "__main__":
    raise SystemExit(run(main))
