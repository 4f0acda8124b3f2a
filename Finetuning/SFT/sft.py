"""Supervised fine-tuning: a LoRA adapter that makes the base model answer as a data set's responses do.

    python Finetuning/SFT/sft.py --exp_type assistant --save_directory sft_lora --wandb_name assistant
    accelerate launch Finetuning/SFT/sft.py ...        # data-parallel; each process takes --batch_size examples a step

The loss is on the response alone. Examples are the rows of the training split that pass the data set's rules: for a
dialogue, the first assistant turn of `chosen`; for a post, its reference summary. The defaults are the configuration's
(the paper's: LoRA r 64 on a 7B model, 20,000 steps of one example; about two hours on an A100).

The adapter appears in <save_directory>/<wandb_name> when it is complete, with args.yaml and training_log.csv. Killed
before, the same command goes on from its last checkpoint. Finetuning/SFT/merge_sft_lora.py makes the model of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import add_common, config_from, found, overridden, pick_one_gpu, report_dry_run, run
from utils.errors import DataError, UsageError
from utils.files import (
    command_line,
    differing,
    hold,
    is_made,
    lets_go,
    read_json,
    whole_folder,
    write_atomically,
)
from utils.places import last_checkpoint
from utils.sharding import this_process
from utils.specs import Config, DatasetSpec, SFTSpec

ARGUMENTS, LOG, SETTINGS = "args.yaml", "training_log.csv", "settings.json"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is made from what")
    group.add_argument("--exp_type", default="assistant", help="assistant or summary: data set (default: %(default)s)")
    group.add_argument("--save_directory", help="folder of the adapter (default: <workspace>/sft_lora/<data set>)")
    group.add_argument("--wandb_name", help="name of the run: a folder below --save_directory, and its name in W&B")
    group.add_argument("--base_model_name", help="model to start from: folder or Hub name (default: configuration)")
    group.add_argument(
        "--data_files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="read these jsonl, json, csv (plain or .gz) or parquet files instead of the configuration's source",
    )
    group.add_argument("--rerun", action="store_true", help="start over, and replace the adapter that is there")
    group = parser.add_argument_group("training (default of each: configuration)")
    group.add_argument("--learning_rate", "--lr", type=float, dest="lr", help="AdamW's first rate; falls linearly to 0")
    group.add_argument("--batch_size", type=int, help="examples per step and process")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches per step (default: 1)")
    group.add_argument("--max_steps", type=int, help="optimizer steps")
    group.add_argument("--num_samples", type=int, help="examples that are trained on, drawn from all that pass")
    group.add_argument("--max_length", type=int, help="tokens of prompt and response; the rest is cut")
    group.add_argument("--weight_decay", type=float, help="AdamW's weight decay")
    group.add_argument("--warmup_steps", type=int, help="steps in which the rate rises")
    group.add_argument("--bf16", action=BooleanOptionalAction, help="bfloat16 where the device has it")
    group.add_argument("--seed", type=int, help="of the examples, their order, dropout and the adapter's start")
    group.add_argument("--lora_r", type=int, help="rank of the adapter")
    group.add_argument("--lora_alpha", type=int, help="scale of the adapter, over its rank")
    group.add_argument("--lora_dropout", type=float, help="dropout before the adapter")
    group = parser.add_argument_group("running")
    group.add_argument("--save_steps", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between log rows (default: %(default)s)")
    group.add_argument(
        "--gradient_checkpointing",
        action=BooleanOptionalAction,
        help="recompute activations in the backward pass: less memory, slower (default: on a GPU)",
    )
    add_common(parser)
    return parser


def training_spec(args: Namespace, dataset: DatasetSpec) -> SFTSpec:
    """The configuration's hyperparameters with what the command line overrides.

    Raises:
        UsageError: a number that cannot be meant.
    """
    spec = overridden(dataset.sft, args)
    spec = dataclasses.replace(spec, lora=overridden(spec.lora, args, "lora_"))
    least = {"batch_size": 1, "max_steps": 1, "num_samples": 1, "max_length": 2, "warmup_steps": 0, "seed": 0}
    for name, low in (*least.items(), ("weight_decay", 0)):
        if not (math.isfinite(getattr(spec, name)) and getattr(spec, name) >= low):
            raise UsageError(f"--{name} must be at least {low}, got {getattr(spec, name)}")
    for name in ("gradient_accumulation_steps", "save_steps", "logging_steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name, value in (("learning_rate", spec.lr), ("lora_r", spec.lora.r), ("lora_alpha", spec.lora.alpha)):
        if not math.isfinite(value) or value <= 0:
            raise UsageError(f"--{name} must be a positive number, got {value}")
    if not 0 <= spec.lora.dropout < 1:
        raise UsageError(f"--lora_dropout must be at least 0 and below 1, got {spec.lora.dropout}")
    return spec


def adapter_folder(args: Namespace, config: Config, dataset: DatasetSpec) -> Path:
    """Where the adapter goes: <save_directory>, or the run's name below it."""
    if args.save_directory:
        return Path(args.save_directory).absolute() / (args.wandb_name or "")
    return config.default_path("sft_lora", args.wandb_name or dataset.name)


def build_examples(
    dataset: DatasetSpec, rows, tokenizer, spec: SFTSpec, hash_range: tuple[float, float] = (0.0, 1.0)
) -> tuple[list[dict], dict[str, int]]:
    """Token ids and the mask of the response, for the rows that pass the data set's rules.

    Prompt and response are tokenized apart and joined, so the model is trained on exactly what it reads and writes in
    decoding. The response ends with EOS, unless `max_length` cuts it.

    Returns:
        `num_samples` examples {"input_ids": (L,), "completion_mask": (L,)}, drawn with the seed from all that pass (a
        source may be ordered by subset), and how many rows each rule dropped.

    Raises:
        DataError: no example is left.
    """
    import random

    from utils.data import kept_rows
    from utils.text_formats import RowDropped, format_of

    response_of_row = format_of(dataset).response_of_row
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    pairs: list[tuple[list[int], str]] = []
    for row, _, prompt_ids in kept_rows(dataset, rows, tokenizer, hash_range=hash_range, counts=counts):
        try:
            response = response_of_row(row)
        except RowDropped as reason:
            dropped[str(reason)] = dropped.get(str(reason), 0) + 1
            continue
        if len(prompt_ids) >= spec.max_length:
            reason = f"no room for a response in {spec.max_length} tokens"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        pairs.append((list(prompt_ids), response))
    kept = counts.pop("kept", 0) - sum(dropped.values())
    counts = {**counts, **dropped, "kept": kept}
    if not pairs:
        listed = "; ".join(f"{n} {reason}" for reason, n in counts.items() if reason != "kept")
        raise DataError(f"no example of {dataset.name} is left to train on ({listed}); check the data and the limits")
    if len(pairs) > spec.num_samples:
        chosen = sorted(random.Random(spec.seed).sample(range(len(pairs)), spec.num_samples))
        pairs = [pairs[i] for i in chosen]
    counts["trained on"] = len(pairs)
    responses = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
    examples = []
    for (prompt_ids, _), response_ids in zip(pairs, responses, strict=True):
        ids = (prompt_ids + list(response_ids) + [tokenizer.eos_token_id])[: spec.max_length]
        mask = [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))
        examples.append({"input_ids": ids, "completion_mask": mask})
    return examples, counts


def open_checkpoints(folder: Path, settings: dict, rerun: bool) -> None:
    """Make the folder of the checkpoints, or check that those that are there belong to these settings."""
    # A kill may leave a temporary file, of any machine, in a folder in which nothing was written yet.
    begun = folder.exists() and any(not p.match(f".{SETTINGS}.*tmp") for p in folder.iterdir())
    known = read_json(folder / SETTINGS)
    if begun and known is None:
        raise DataError(f"{folder} holds no checkpoints of this script; give another --save_directory or --wandb_name")
    if begun:
        different = differing(known, settings)
        if different and last_checkpoint(folder) and not rerun:
            raise DataError(f"{folder} is of other settings ({different}); go on with those, or --rerun to start over")
        if different or rerun:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def settings_of(
    config: Config, dataset: DatasetSpec, spec: SFTSpec, origin: str, files: list[Path], accumulation: int
) -> dict:
    """What determines the adapter, as plain data of one level, so that a difference can be named."""
    from utils.provenance import fingerprint

    plain = dataclasses.asdict(spec)
    lora = {f"lora_{name}": value for name, value in plain.pop("lora").items()}
    base, data = config.locate(config.base_model.path), ", ".join(map(config.portable, files)) or origin
    made_from = {"base_model": config.portable(base), "base_content": fingerprint(base), "data": data}
    made_from["data_content"] = [fingerprint(file) for file in files]
    settings = {"dataset": dataset.name, **made_from, "gradient_accumulation_steps": accumulation, **plain, **lora}
    return json.loads(json.dumps(settings))


def trainer_arguments(args: Namespace, spec: SFTSpec, checkpoints: Path, device):
    """TRL's arguments for these hyperparameters."""
    from trl import SFTConfig

    from utils.models import has_bfloat16

    on_cpu = device.type == "cpu"
    bf16 = spec.bf16 and has_bfloat16(device)
    if spec.bf16 and not bf16:
        print(f"bfloat16 has no instructions of its own on {device}: training in float32")
    checkpointing = args.gradient_checkpointing if args.gradient_checkpointing is not None else not on_cpu
    return SFTConfig(
        output_dir=str(checkpoints),
        completion_only_loss=True,
        max_length=None,  # build_examples has cut them
        learning_rate=spec.lr,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_steps=spec.max_steps,
        bf16=bf16,
        activation_checkpointing=checkpointing,
        seed=spec.seed,
        data_seed=spec.seed,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=2,
        logging_steps=min(args.logging_steps, spec.max_steps),
        logging_nan_inf_filter=False,  # a loss that is no number ends the run; it is not averaged away
        report_to=["wandb"] if args.wandb else [],
        run_name=args.wandb_name or checkpoints.stem,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )


def train(model, tokenizer, examples: list[dict], spec: SFTSpec, arguments, resume: Path | None):
    """Run TRL's trainer; returns it.

    Raises:
        DataError: the loss, or a weight of the adapter, is no finite number.
    """
    import functools

    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from utils.adapters import lora_config
    from utils.trl_trainers import train_from

    if not sys.stderr.isatty():
        disable_progress_bars()
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
    )
    trainer.remove_callback(PrinterCallback)  # training_log.csv has the rows
    # An added token's embedding is not trained: only the adapter is kept, and merging adds the token again.
    trainer.model.save_pretrained = functools.partial(trainer.model.save_pretrained, save_embedding_layers=False)
    train_from(trainer, resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    adapter = (p for p in trainer.model.parameters() if p.requires_grad)
    if not all(map(math.isfinite, losses)) or not all(p.isfinite().all() for p in adapter):
        raise DataError("training diverged (the loss is no finite number); try a lower --lr or --no-bf16, and --rerun")
    return trainer


def write_adapter(folder: Path, trainer, tokenizer, settings: dict, record: dict) -> None:
    """The adapter with its tokenizer, arguments and log, in a folder that appears whole or not at all."""
    import csv

    import yaml

    with whole_folder(folder) as part:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        with (part / LOG).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "loss", "learning_rate", "grad_norm"])
            rows = [row for row in trainer.state.log_history if "loss" in row]
            writer.writerows([row["step"], row["loss"], row["learning_rate"], row.get("grad_norm", "")] for row in rows)
        (part / ARGUMENTS).write_text(yaml.safe_dump(record, sort_keys=False))
        (part / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


@lets_go
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = config_from(args)
    dataset = config.dataset(args.exp_type)
    spec = training_spec(args, dataset)
    from utils import data
    from utils.rows import describe_source, iter_rows, local_files

    if args.base_model_name:
        given = dataclasses.replace(config.base_model, path=args.base_model_name, made_by="")
        config = dataclasses.replace(config, base_model=given)
    source = data.split_source(dataset, "train")
    origin = describe_source(source, config, args.data_files)
    base = config.locate(config.base_model.path)
    folder = adapter_folder(args, config, dataset)
    if args.dry_run:
        report_dry_run(
            [
                ("base model", base, found(base, config.base_model.made_by)),
                ("rows", origin, "Hub" if origin.startswith("Hub: ") else "here"),
                ("adapter", str(folder), "here" if folder.exists() else "would be made"),
            ]
        )
        return 0
    files = local_files(source, config, args.data_files)
    settings = settings_of(config, dataset, spec, origin, files, args.gradient_accumulation_steps)
    first = this_process().first
    if first:
        hold(folder)
    checkpoints = folder.with_name(folder.name + ".checkpoints")
    option = "--save_directory, or a --wandb_name, which makes a folder below it"
    if is_made(folder, read_json(folder / SETTINGS), settings, rerun=args.rerun, what="adapter", option=option):
        if first:
            shutil.rmtree(checkpoints, ignore_errors=True)  # killed before they were removed
            print(f"the adapter is complete: {folder} (--rerun trains it again)")
        return 0

    start = time.monotonic()
    device = pick_one_gpu(args.device)
    import torch

    from utils import models, provenance
    from utils.adapters import check_target_modules
    from utils.tracking import Tracker

    arguments = trainer_arguments(args, spec, checkpoints, device)
    is_main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        if is_main:
            open_checkpoints(checkpoints, settings, args.rerun)
    resume = last_checkpoint(checkpoints)

    torch.manual_seed(spec.seed)  # for the embedding of an added token: merging draws the same one
    dtype = models.pick_dtype(config, device) if arguments.bf16 and device.type == "cuda" else torch.float32
    model, tokenizer = models.load_base(config, torch.device("cpu"), dtype)
    check_target_modules(model, spec.lora)
    rows = iter_rows(source, config, args.data_files)
    examples, counts = build_examples(dataset, rows, tokenizer, spec, source.hash_range)
    if is_main:
        print(f"{dataset.name} train, from {origin}")
        for reason, count in counts.items():
            print(f"{count:>9,}  {reason}")
        print(f"resuming from {resume}" if resume else f"training; checkpoints in {checkpoints}", flush=True)
    with Tracker(args.wandb and is_main, "sft", folder.name, settings) as tracker:
        tracker.summary({"rows": counts})
        trainer = train(model, tokenizer, examples, spec, arguments, resume)  # its callback logs into this run

    if is_main:
        record = {"settings": settings, "rows": counts, "command": command_line(), "versions": provenance.versions()}
        write_adapter(folder, trainer, tokenizer, settings, {**record, "commit": provenance.git_commit()})
        shutil.rmtree(checkpoints)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        change = f"loss per response token {losses[0]:.3f} to {losses[-1]:.3f}, " if losses else ""
        print(f"{trainer.state.global_step} steps, {change}{time.monotonic() - start:.0f} s")
        print(f"adapter: {folder}")
        merge = f"python Finetuning/SFT/merge_sft_lora.py {config.flags} --exp_type {dataset.exp_type}"
        print(f"next: {merge} --lora_name {shlex.quote(str(folder))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
