"""What every algorithm of Finetuning/PPO/ppo.py shares: the models, the prompts, the rewards, what is left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import models, ppo
from utils.adapters import new_policy
from utils.cached_models import attended_length
from utils.data import encode_prompts
from utils.errors import DataError
from utils.rewards import RewardSet
from utils.specs import Config, DatasetSpec, PPOSpec
from utils.text_formats import answer_texts
from utils.tracking import Tracker
from utils.training_output import discarded_unless_begun


@dataclass(frozen=True)
class Task:
    """What is trained: `base` is a model's path, `texts` the data set's prompts, `folder` where the work goes on."""

    config: Config
    dataset: DatasetSpec
    weights: dict[str, float]
    spec: PPOSpec
    algorithm: str
    base: str
    texts: list[str]
    max_new_tokens: int
    folder: Path


def train_policy(
    task: Task,
    accelerator,
    device: torch.device,
    *,
    save_steps: int,
    gradient_checkpointing: bool | None,
    tracker: Tracker,
    base_content: str,
) -> list[dict]:
    """Train, and leave the adapter with its log and metrics.json in the task's folder; returns the log's rows."""
    config, dataset, spec = task.config, task.dataset, task.spec
    checkpointing = device.type != "cpu" if gradient_checkpointing is None else gradient_checkpointing
    # On a CPU in float32: in bfloat16 another batch moves a token's probability ratio by up to 0.1, half of the clip.
    dtype = torch.float32 if device.type == "cpu" and config.cpu_dtype != "float64" else None
    with discarded_unless_begun(task.folder, main_process=accelerator.is_main_process):
        if task.algorithm == "ppo":
            model, tokenizer = new_policy(
                config, dataset, spec.lora, device, path=task.base, dtype=dtype, seed=spec.seed
            )
        else:  # TRL puts the adapter on itself
            model, tokenizer = models.load_reference(config, dataset, device, task.base, dtype)
        room = (attended_length(model) or 1 << 30) - task.max_new_tokens
        if room < 1:
            raise DataError(f"--max_new_tokens {task.max_new_tokens} leaves no room for a prompt in the context")
        prompts = encode_prompts(dataset, tokenizer, task.texts, room)
        rewards = RewardSet(config, dataset, list(task.weights), device)

    def score(indices: Sequence[int], responses: Sequence[Sequence[int]]) -> Mapping[str, np.ndarray]:
        return rewards.score([task.texts[i] for i in indices], answer_texts(tokenizer, responses))

    record = {
        "kind": task.algorithm, "dataset": dataset.name, "label": config.label, "weights": task.weights,
        "base_model": task.base, "base_content": base_content,
    }  # fmt: skip
    if task.algorithm == "ppo":
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            model.train()
        ends = models.stop_tokens(model.get_base_model(), tokenizer)
        policy = ppo.PolicyWithValue(model, ends, temperature=config.decoding.temperature)
        rows = ppo.train(
            policy, prompts, score, task.weights, spec, task.folder,
            top_k=spec.top_k, max_new_tokens=task.max_new_tokens, decode_batch_size=config.decoding.batch_size,
            accelerator=accelerator, save_steps=save_steps, say=accelerator.print,
            log=lambda row: tracker.log(row, step=int(row["step"])),
        )  # fmt: skip
        if accelerator.is_main_process:
            ppo.save_policy(policy, task.folder, record | summary_of(rows))
    else:
        from utils.trl_trainers import train_with_trl

        rows = train_with_trl(
            task, model, tokenizer, score, device, save_steps=save_steps, checkpointing=checkpointing,
            report_to="wandb" if tracker.run else "none", record=lambda rows: record | summary_of(rows),
        )  # fmt: skip
    return rows


def summary_of(rows: Sequence[Mapping]) -> dict:
    """Figures of metrics.json: the first and the last tenth of the steps."""
    few = max(1, len(rows) // 10)
    figures = {}
    for name, part in (("first", rows[:few]), ("last", rows[-few:])):
        figures |= {f"{name}_{key}": float(np.mean([r[key] for r in part])) for key in ("reward", "kl")}
    return {"steps": int(rows[-1]["step"]), "seconds": rows[-1].get("seconds"), **figures}
