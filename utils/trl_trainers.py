"""RLOO and GRPO through TRL's trainers (Ahmadian et al. 2024; Shao et al. 2024), with the arguments of PPO.

Both compare several answers to one prompt instead of learning a value. A step has as many answers as one of PPO's, so
equal numbers of steps are equal numbers of samples; the KL coefficient stays as it is. TRL is imported here alone.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils import ppo
from utils.adapters import check_target_modules, lora_config
from utils.errors import DataError, UsageError
from utils.files import write_json
from utils.models import has_bfloat16
from utils.places import last_checkpoint
from utils.specs import PPOSpec
from utils.training_output import METRICS, MODEL_CARD, STATE, save_adapter


def answers_per_pass(spec: PPOSpec, world: int) -> int:
    """Answers per forward pass and process, so that a whole number of passes makes a step.

    Raises:
        UsageError: the batch is no multiple of the number of processes.
    """
    if spec.batch_size % world:
        raise UsageError(f"--batch_size {spec.batch_size} must be a multiple of the number of processes ({world})")
    return math.gcd(spec.batch_size // world, spec.micro_batch_size)


def train_with_trl(
    task,
    model,
    tokenizer,
    score: ppo.Score,
    device,
    *,
    save_steps: int,
    checkpointing: bool,
    report_to: str,
    record: Callable[[Sequence[Mapping]], dict],
) -> list[dict]:
    """Train an adapter on `model` and leave it in the task's folder; returns the log's rows.

    Raises:
        DataError: TRL is not installed, or the loss is no finite number.
    """
    try:
        import trl
    except ImportError:
        raise DataError(f"--algorithm {task.algorithm} needs the package trl: pip install trl, or use ppo") from None
    from accelerate import PartialState
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback

    class Begun(TrainerCallback):
        """Marks the folder as one to go on from, once there is a checkpoint in it."""

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                write_json(task.folder / STATE, {"step": state.global_step // task.spec.ppo_epochs})

    spec, state = task.spec, PartialState()
    per_device = answers_per_pass(spec, state.num_processes)
    if not sys.stderr.isatty():
        disable_progress_bars()
    trainer_class, config_class = {
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }[task.algorithm]
    checkpoints = task.folder / "checkpoints"
    on_cpu = device.type == "cpu"
    arguments = config_class(
        output_dir=str(checkpoints),
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=spec.max_grad_norm,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=spec.batch_size // (per_device * state.num_processes),
        num_generations=spec.num_generations,
        num_iterations=spec.ppo_epochs,
        max_steps=ppo.plan_steps(len(task.texts), spec) * spec.ppo_epochs,
        beta=spec.kl_coef,
        epsilon=spec.clip_ratio,
        max_completion_length=task.max_new_tokens,
        temperature=task.config.decoding.temperature,
        top_k=spec.top_k,
        generation_kwargs={"min_new_tokens": 1},  # the end token cannot be the first
        bf16=not on_cpu and has_bfloat16(device),
        activation_checkpointing=checkpointing,
        seed=spec.seed,
        save_strategy="steps",
        save_steps=save_steps * spec.ppo_epochs,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )

    def reward(prompts, completions, completion_ids, index, log_metric=None, **_) -> list[float]:
        rewards = score(index, completion_ids)
        for name, values in rewards.items():
            if log_metric is not None:
                log_metric(f"reward_{name}", float(np.mean(values)))
        return sum(w * np.asarray(rewards[name]) for name, w in task.weights.items()).tolist()

    tokenizer.padding_side = "left"
    shown = [{"prompt": text, "index": i} for i, text in enumerate(_shown(task, tokenizer))]
    check_target_modules(model, spec.lora)
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(shown),
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
        callbacks=[Begun()],
    )
    trainer.remove_callback(PrinterCallback)  # training_log.csv has the rows
    train_from(trainer, last_checkpoint(checkpoints))
    rows = rows_of(trainer.state.log_history, spec, list(task.weights))
    if any(not math.isfinite(v) for row in rows for v in row.values()):
        raise DataError("training diverged (the loss is no finite number); try a lower --lr, and --rerun")
    if state.is_main_process:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), task.folder)
        (task.folder / MODEL_CARD).unlink(missing_ok=True)  # the library's page about itself
        ppo.write_log(task.folder, rows)
        write_json(task.folder / METRICS, record(rows))
        shutil.rmtree(checkpoints, ignore_errors=True)
    return rows


def train_from(trainer, checkpoint: Path | None) -> None:
    """Train to `max_steps` from a checkpoint, or from the start.

    A trainer that is given the checkpoint of the last step takes one step more, so that one is only loaded.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state is None or state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return
    adapter = trainer.accelerator.unwrap_model(trainer.model)
    set_peft_model_state_dict(adapter, load_file(checkpoint / "adapter_model.safetensors"))
    trainer.state = state


def _shown(task, tokenizer) -> list[str]:
    """What the policy reads for each prompt, as texts, which TRL tokenizes by itself: so a beginning that the tokenizer
    adds is left out of them, as `tokenize_prompts` has it once."""
    from utils.data import tokenize_prompts
    from utils.text_formats import shown_to_reference

    texts = [shown_to_reference(task.dataset, text) for text in task.texts]
    if not texts or tokenizer.bos_token is None:
        return texts
    same = len(tokenizer(texts[0])["input_ids"]) == len(tokenize_prompts(tokenizer, texts[:1])[0])
    return texts if same else [text.removeprefix(tokenizer.bos_token) for text in texts]


def rows_of(history: Sequence[Mapping], spec: PPOSpec, objectives: Sequence[str]) -> list[dict]:
    """TRL's log as rows of training_log.csv: one per step, from the pass that sampled its answers."""
    rows = []
    for entry in (h for h in history if "reward" in h):
        row = {"step": len(rows) + 1, "reward": entry["reward"]}
        row["reward_error"] = entry.get("reward_std", 0.0) / math.sqrt(spec.batch_size)
        row |= {f"reward_{n}": entry[f"reward_{n}"] for n in objectives if f"reward_{n}" in entry}
        row |= {"kl": entry.get("kl", 0.0), "kl_coef": spec.kl_coef, "tokens": entry["completions/mean_length"]}
        rows.append(row | {"grad_norm": entry["grad_norm"], "loss": entry.get("loss", 0.0)})
    return rows
