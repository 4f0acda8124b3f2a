"""Fine-tune the reference with reinforcement learning on a weighted sum of rewards: PPO, or RLOO or GRPO through TRL.

    python Finetuning/PPO/ppo.py --exp_type assistant --alpha 0.4                     # MORLHF: help 0.4, harm 0.6
    python Finetuning/PPO/ppo.py --exp_type assistant --alpha 1                       # the single policy of help
    python Finetuning/PPO/ppo.py --exp_type assistant --reward_models help humor --reward_weights 0.3 0.7
    accelerate launch Finetuning/PPO/ppo.py ...                                       # processes share each batch

A LoRA adapter on the reference is trained, with a KL penalty against the reference itself (utils/ppo.py names every
detail). --alpha is the weight of the pair's first objective (lambda_1). The defaults are the configuration's `ppo`: the
paper's are sized for a GPU of 80 GB; the tiny world's take about half a minute on 2 CPU cores.

The adapter appears in <workspace>/morlhf/<data set>/single/<objective> or morlhf/<data set>/<pair>/morlhf_<alpha>, with
args.yaml, training_log.csv, training_log.png and metrics.json. Killed before, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import rivals
from utils.cli import add_common, config_from, found, objectives_of, overridden, pick_one_gpu, report_dry_run, run
from utils.config import number_problem
from utils.errors import UsageError
from utils.files import lets_go
from utils.places import prompts_command, reference_path, reward_rows
from utils.specs import Config, DatasetSpec, PPOSpec

ALGORITHMS = ("ppo", "rloo", "grpo")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is trained for what")
    group.add_argument("--exp_type", default="assistant", help="assistant or summary: data set (default: %(default)s)")
    group.add_argument(
        "--base_model", help="start, and reference: folder or Hub name (default: the data set's reference)"
    )
    group.add_argument(
        "--reward_models", nargs="+", default=[], metavar="NAME", help="objectives (default: the data set's first two)"
    )
    group.add_argument("--alpha", type=float, help="weight of the first of two objectives, lambda_1")
    group.add_argument("--reward_weights", nargs="+", type=float, metavar="W", help="a weight for each instead")
    group.add_argument(
        "--algorithm", choices=ALGORITHMS, default="ppo", help="rloo, grpo: TRL's (default: %(default)s)"
    )
    group.add_argument("--output_dir", help="folder of the adapter (default: in the workspace's morlhf)")
    group.add_argument("--rerun", action="store_true", help="train again, and replace the adapter that is there")
    group = parser.add_argument_group("training (default of each: configuration)")
    group.add_argument("--learning_rate", "--lr", type=float, dest="lr", help="AdamW's rate, constant")
    group.add_argument("--batch_size", type=int, help="answers per step, over all processes")
    group.add_argument("--num_epochs", type=int, help="passes over the prompts")
    group.add_argument("--num_prompts", type=int, help="first prompts of the training split that are used")
    group.add_argument("--max_steps", type=int, help="most steps")
    group.add_argument("--ppo_epochs", type=int, help="passes over each step's answers")
    group.add_argument("--mini_batch_size", type=int, help="answers per optimizer step")
    group.add_argument("--micro_batch_size", type=int, help="answers per forward pass and process (memory alone)")
    group.add_argument("--kl_coef", type=float, help="coefficient of the KL penalty at the start")
    group.add_argument("--kl_target", type=float, help="KL per answer, in nats, that the coefficient steers to")
    group.add_argument("--kl_horizon", type=float, help="answers over which the coefficient adapts")
    group.add_argument("--clip_ratio", type=float, help="clip of the probability ratio")
    group.add_argument("--clip_value", type=float, help="clip of the value's change")
    group.add_argument("--value_coef", type=float, help="weight of the value's loss")
    group.add_argument("--gamma", type=float, help="discount per token")
    group.add_argument("--gae_lambda", type=float, help="lambda of the advantage estimation")
    group.add_argument("--max_grad_norm", type=float, help="the gradient's norm is at most this")
    group.add_argument("--top_k", "--topk", type=int, dest="top_k", help="candidates kept in sampling")
    group.add_argument("--num_generations", type=int, help="rloo, grpo: answers per prompt that are compared")
    group.add_argument("--seed", type=int, help="of the adapter's start, the prompts' order and the sampling")
    group.add_argument("--lora_r", type=int, help="rank of the adapter")
    group.add_argument("--lora_alpha", type=int, help="scale of the adapter, over its rank")
    group.add_argument("--lora_dropout", type=float, help="dropout before the adapter (rloo, grpo; ppo runs without)")
    group = parser.add_argument_group("running")
    group.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default: the data set's)")
    group.add_argument("--save_steps", type=int, default=10, help="steps between checkpoints (default: %(default)s)")
    group.add_argument(
        "--gradient_checkpointing",
        action=BooleanOptionalAction,
        help="recompute activations in the backward pass: less memory, slower (default: on a GPU)",
    )
    add_common(parser)
    return parser


def reward_weights(args: Namespace, dataset: DatasetSpec) -> dict[str, float]:
    """{objective: weight} in the data set's order, zeros left out.

    Raises:
        UsageError: weights that do not fit the objectives, are negative or do not sum to 1.
    """
    names = objectives_of(dataset, ",".join(args.reward_models)) if args.reward_models else list(dataset.objectives[:2])
    if len(set(names)) < len(names):
        raise UsageError(f"--reward_models names one of {', '.join(names)} twice")
    if args.alpha is not None and args.reward_weights is not None:
        raise UsageError("give either --alpha or --reward_weights")
    if args.reward_weights is not None:
        weights = args.reward_weights
    elif args.alpha is not None:
        if len(names) != 2:
            raise UsageError(f"--alpha is for two objectives, got {', '.join(names)}; give --reward_weights")
        weights = [args.alpha, 1.0 - args.alpha]
    elif len(names) == 1:
        weights = [1.0]
    else:
        raise UsageError(f"give --alpha (the weight of {names[0]}) or --reward_weights for {', '.join(names)}")
    if len(weights) != len(names):
        raise UsageError(f"--reward_weights has {len(weights)} numbers for {len(names)} objectives, {', '.join(names)}")
    if any(not math.isfinite(w) or w < 0 for w in weights):
        what = "--alpha must lie between 0 and 1" if args.alpha is not None else "--reward_weights must not be negative"
        raise UsageError(f"{what}, got {', '.join(f'{w:g}' for w in weights)}")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise UsageError(f"--reward_weights sum to {sum(weights):g}; they must sum to 1")
    given = dict(zip(names, weights, strict=True))
    return {n: given[n] for n in dataset.objectives if given.get(n, 0.0) > 0}


def training_spec(args: Namespace, dataset: DatasetSpec, config: Config) -> PPOSpec:
    """The configuration's hyperparameters with what the command line overrides.

    Raises:
        UsageError: a number that cannot be meant.
    """
    spec = overridden(dataset.ppo, args, problem=number_problem)
    lora = overridden(spec.lora, args, "lora_", number_problem)
    spec = dataclasses.replace(spec, lora=lora, top_k=spec.top_k or config.decoding.top_k)
    if args.algorithm != "ppo" and spec.batch_size % spec.num_generations:
        raise UsageError(
            f"--batch_size {spec.batch_size} must be a multiple of --num_generations ({spec.num_generations})"
        )
    for name, value in (("save_steps", args.save_steps), ("num_epochs", spec.num_epochs)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens must be at least 1, got {args.max_new_tokens}")
    return spec


@lets_go
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    dataset = config.dataset(args.exp_type)
    weights = reward_weights(args, dataset)
    spec = training_spec(args, dataset, config)
    base, made_by = (args.base_model, "") if args.base_model else reference_path(config, dataset)
    folder = Path(args.output_dir) if args.output_dir else rivals.morlhf_folder(config, dataset, weights)
    max_new_tokens = args.max_new_tokens or dataset.max_new_tokens

    from utils.data import prompts_csv, read_prompts

    file = prompts_csv(config, dataset, "train")
    if args.dry_run:
        made = prompts_command(dataset.name, "train", config)
        rows = [("reference", base, found(base, made_by)), ("prompts", str(file), found(str(file), made))]
        rows += reward_rows(config, list(weights))
        report_dry_run([*rows, ("adapter", str(folder), "here" if folder.exists() else "would be made")])
        return 0
    texts = read_prompts(file, config)[: spec.num_prompts]

    from accelerate import Accelerator

    from utils import provenance, training_output
    from utils.models import pick_device
    from utils.summaries import describe_weights

    pick = pick_device if args.algorithm == "ppo" else pick_one_gpu
    alone = None if "LOCAL_RANK" in os.environ else pick(args.device)  # before anything else looks for devices
    accelerator = Accelerator(cpu=args.device == "cpu")
    device = alone or accelerator.device
    settings = {
        "algorithm": args.algorithm, "dataset": dataset.name, "weights": weights,
        "base_model": config.portable(base),
        "base_content": provenance.fingerprint(base), "prompts": provenance.hash_of(texts)[:16],
        "rewards": {n: dataclasses.asdict(config.objective(n)) for n in weights}, "max_new_tokens": max_new_tokens,
        "temperature": config.decoding.temperature, "training": dataclasses.asdict(spec),
    }  # fmt: skip
    record = provenance.of_training(device, accelerator.num_processes, config)
    with accelerator.main_process_first():
        partial = training_output.open_output(
            folder, settings, record, rerun=args.rerun, main_process=accelerator.is_main_process, what="trained policy"
        )
    if partial is None:
        accelerator.print(f"the adapter is complete: {folder} (--rerun trains it again)")
        return 0
    accelerator.print(
        f"{args.algorithm} for {describe_weights(weights)}: {partial} until it is complete, then {folder}"
    )
    from utils.policy_training import Task, train_policy
    from utils.ppo import PLOT_FILE
    from utils.tracking import Tracker

    task = Task(config, dataset, weights, spec, args.algorithm, base, texts, max_new_tokens, partial)
    name = f"{args.algorithm}_{folder.parent.name}_{folder.name}"
    with Tracker(args.wandb and accelerator.is_main_process, "ppo", name, settings) as tracker:
        rows = train_policy(
            task, accelerator, device, save_steps=args.save_steps, gradient_checkpointing=args.gradient_checkpointing,
            tracker=tracker, base_content=settings["base_content"],
        )  # fmt: skip
        tracker.images({"training": partial / PLOT_FILE})
    if accelerator.is_main_process:
        training_output.publish(partial, folder)
    accelerator.wait_for_everyone()
    first, last = rows[0], rows[-1]
    accelerator.print(
        f"{last['step']:.0f} steps, reward {first['reward']:.3f} to {last['reward']:.3f}, KL {last['kl']:.2f} nats\n"
        f"adapter: {folder}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
