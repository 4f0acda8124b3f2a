"""Train an objective's autoregressive reward model (GenARM): a LoRA whose log-probabilities add up to the reward.

    python Finetuning/ARM/train_arm.py --dataset anthropic --objective help
    accelerate launch Finetuning/ARM/train_arm.py ...                     # processes share each batch of pairs

The pairs are the reference's own answers to training prompts, ranked by the objective's reward (--pairs reward), or the
human preferences that its reward model is trained on (--pairs preference). The defaults are the configuration's `arm`.

The adapter appears in <workspace>/arm/<data set>/<objective> with args.yaml, training_log.csv and metrics.json (its
accuracy on held-out prompts). baseline_eval.py --arm decodes with it. Killed before, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import rivals
from utils.cli import add_common, config_from, found, objectives_of, overridden, report_dry_run, run
from utils.config import number_problem
from utils.errors import UsageError
from utils.files import lets_go
from utils.places import prompts_command, reference_path, reward_rows
from utils.specs import ArmSpec, Config, DatasetSpec, ObjectiveSpec

PAIRS = ("reward", "preference")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is trained for what")
    group.add_argument("--dataset", required=True, help="data set of the configuration, e.g. anthropic")
    group.add_argument("--objective", required=True, help="the objective whose reward is learned")
    group.add_argument("--pairs", choices=PAIRS, default="reward", help="where pairs come from (default: %(default)s)")
    group.add_argument("--output_dir", help="folder of the adapter (default: in the workspace's arm)")
    group.add_argument("--rerun", action="store_true", help="train again, and replace the adapter that is there")
    group = parser.add_argument_group("training (default of each: configuration)")
    group.add_argument("--learning_rate", "--lr", type=float, dest="lr", help="AdamW's first rate; falls linearly to 0")
    group.add_argument("--batch_size", type=int, help="pairs per step, over all processes")
    group.add_argument("--num_epochs", type=int, help="passes over the pairs")
    group.add_argument("--reward_beta", type=float, help="factor of the log-probabilities in the loss")
    group.add_argument("--num_prompts", type=int, help="prompts whose sampled answers are compared (--pairs reward)")
    group.add_argument("--answers_per_prompt", type=int, help="answers sampled for each (--pairs reward)")
    group.add_argument("--warmup_steps", type=int, help="steps in which the rate rises")
    group.add_argument("--max_grad_norm", type=float, help="the gradient's norm is at most this")
    group.add_argument("--seed", type=int, help="of the adapter's start, the sampling and the pairs' order")
    group.add_argument("--lora_r", type=int, help="rank of the adapter")
    group.add_argument("--lora_alpha", type=int, help="scale of the adapter, over its rank")
    group.add_argument("--lora_dropout", type=float, help="dropout before the adapter")
    group = parser.add_argument_group("running")
    group.add_argument("--micro_batch_size", type=int, default=8, help="pairs per forward pass (default: %(default)s)")
    group.add_argument("--save_steps", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    add_common(parser)
    return parser


def training_spec(args: Namespace, dataset: DatasetSpec) -> ArmSpec:
    """The configuration's hyperparameters with what the command line overrides.

    Raises:
        UsageError: a number that cannot be meant.
    """
    spec = overridden(dataset.arm, args, problem=number_problem)
    for name, value in (
        ("micro_batch_size", args.micro_batch_size), ("save_steps", args.save_steps), ("num_epochs", spec.num_epochs)
    ):  # fmt: skip
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    return dataclasses.replace(spec, lora=overridden(spec.lora, args, "lora_", number_problem))


def objective_of(args: Namespace, config: Config, dataset: DatasetSpec) -> ObjectiveSpec:
    """The objective that is learned.

    Raises:
        UsageError: several, or one without the pairs that are asked for.
    """
    names = objectives_of(dataset, args.objective)
    if len(names) > 1:
        raise UsageError(f"--objective {args.objective}: one at a time; valid: {', '.join(dataset.objectives)}")
    objective = config.objective(names[0])
    if args.pairs == "preference" and (objective.training is None or objective.training.kind != "preference"):
        raise UsageError(f"--pairs preference: {config.path} names no preference pairs for {objective.name}")
    return objective


def dry_run(args: Namespace, config: Config, dataset: DatasetSpec, objective: str, prompts: Path, folder: Path) -> None:
    """Print what would be loaded and made."""
    base, made_by = reference_path(config, dataset)
    rows = [("reference", base, found(base, made_by))]
    if args.pairs == "reward":
        made = prompts_command(dataset.name, "train", config)
        rows += [("prompts", str(prompts), found(str(prompts), made)), *reward_rows(config, [objective])]
    report_dry_run([*rows, ("adapter", str(folder), "here" if folder.exists() else "would be made")])


def settings_of(
    args: Namespace, config: Config, dataset: DatasetSpec, objective: ObjectiveSpec, spec: ArmSpec, texts: list[str]
) -> dict:
    """What determines the adapter, as plain data."""
    from utils import provenance

    base, _ = reference_path(config, dataset)
    return {
        "dataset": dataset.name, "objective": objective.name, "pairs": args.pairs,
        "base_model": config.portable(base),
        "base_content": provenance.fingerprint(base), "prompts": provenance.hash_of(texts)[:16],
        "reward": dataclasses.asdict(objective), "max_new_tokens": dataset.max_new_tokens,
        "top_k": config.decoding.top_k, "temperature": config.decoding.temperature,
        "training": dataclasses.asdict(spec),
    }  # fmt: skip


@lets_go
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    dataset = config.dataset(args.dataset)
    objective = objective_of(args, config, dataset)
    spec = training_spec(args, dataset)
    folder = Path(args.output_dir) if args.output_dir else rivals.arm_folder(config, dataset, objective.name)

    from utils.data import prompts_csv, read_prompts

    file = prompts_csv(config, dataset, "train")
    if args.dry_run:
        dry_run(args, config, dataset, objective.name, file, folder)
        return 0
    texts = read_prompts(file, config)[: spec.num_prompts] if args.pairs == "reward" else []

    from accelerate import Accelerator

    from utils import arm, models, provenance, training_output
    from utils.adapters import new_policy
    from utils.cached_models import context_length
    from utils.tracking import Tracker

    accelerator = Accelerator(cpu=args.device == "cpu")
    device = accelerator.device if accelerator.num_processes > 1 else models.pick_device(args.device)
    settings = settings_of(args, config, dataset, objective, spec, texts)
    record = provenance.of_training(device, accelerator.num_processes, config)
    with accelerator.main_process_first():
        partial = training_output.open_output(
            folder, settings, record, rerun=args.rerun, main_process=accelerator.is_main_process,
            what="autoregressive reward model",
        )  # fmt: skip
    if partial is None:
        accelerator.print(f"the adapter is complete: {folder} (--rerun trains it again)")
        return 0
    accelerator.print(f"autoregressive reward model of {objective.name}: {partial} until it is complete, then {folder}")
    with training_output.discarded_unless_begun(partial, main_process=accelerator.is_main_process):
        model, tokenizer = new_policy(config, dataset, spec.lora, device, seed=spec.seed)
        if args.pairs == "preference":
            pairs = arm.human_pairs(config, dataset, objective, tokenizer, context_length(model))
        else:
            pairs = arm.reference_pairs(
                config, dataset, objective.name, spec, model, tokenizer, texts, partial / arm.PAIRS_FILE, accelerator
            )
        training, held_out = arm.split_pairs(pairs, spec.seed)
    accelerator.print(f"{len(training)} pairs to train on, {len(held_out)} held out")
    with Tracker(args.wandb and accelerator.is_main_process, "train_arm", f"arm_{objective.name}", settings) as tracker:
        metrics = arm.train(
            model, training, held_out, spec, partial, device=device, micro_batch_size=args.micro_batch_size,
            accelerator=accelerator, save_steps=args.save_steps, say=accelerator.print,
            log=lambda row: tracker.log(row, step=row["step"]),
        )  # fmt: skip
        tracker.summary(metrics["held_out"])
    if accelerator.is_main_process:
        known = {"kind": "arm", "dataset": dataset.name, "objective": objective.name, "label": config.label}
        known |= {name: settings[name] for name in ("base_model", "base_content")}
        publish(model, partial, folder, known | metrics)
    accelerator.wait_for_everyone()
    held = metrics["held_out"]
    accelerator.print(
        f"accuracy on {held['pairs']} held-out pairs {held['accuracy']:.3f} (the longer answer: "
        f"{held['accuracy_of_longer']:.3f}), {metrics['seconds']:.0f} s\nadapter: {folder}"
    )
    return 0


def publish(model, partial: Path, folder: Path, record: dict) -> None:
    """Put the trained adapter and its record in their place; the sampled pairs are needed no more."""
    from utils import arm, training_output
    from utils.files import write_json

    (partial / arm.PAIRS_FILE).unlink(missing_ok=True)
    training_output.save_adapter(model, partial)
    write_json(partial / rivals.RECORD, record)
    training_output.publish(partial, folder)


if __name__ == "__main__":
    raise SystemExit(run(main))
