"""Autoregressive reward models (GenARM, Xu et al. 2024): a language model whose log-probabilities add up to a reward.

The reward of an answer is r(x, y) = sum_t log p_arm(y_t | x, y_<t), trained on preference pairs with the Bradley-Terry
loss (eq. 6)

    -log sigmoid(beta_r (log p_arm(y_w | x) - log p_arm(y_l | x))),

so every prefix has a score, and decoding needs one forward pass of it per token, whatever the number of candidates
(`policies.RewardGuidedPolicy`). The model is a LoRA adapter on the reference, so that guiding costs one base's memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.answer_batches import AnswerBatch, answer_log_probs, answer_logits, gathered, lay_out_answers
from utils.checkpoint import Checkpoint
from utils.cli import progress
from utils.decoding import decode
from utils.errors import DataError
from utils.files import write_atomically, write_csv
from utils.optimization import add_up, linear_schedule, seed_of
from utils.policies import ReferencePolicy
from utils.specs import ArmSpec

LOG_FILE, PAIRS_FILE = "training_log.csv", "pairs.json"
HELD_OUT = 0.1  # share of the pairs, by prompt, on which the accuracy is measured


@dataclass(frozen=True)
class TokenPair:
    """A prompt, a better and a worse answer, as token ids; `group` is the prompt's number."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    group: int


# --------------------------------------------------------------------------------------------------------------- pairs


def pairs_by_reward(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], rewards: Sequence[Sequence[float]]
) -> list[TokenPair]:
    """Of each prompt's answers the best with the worst, the second best with the second worst, and so on; ties are no
    pairs.

    Args:
        prompts: (N,) token ids; answers: (N, n) token ids; rewards: (N, n).
    """
    pairs = []
    for group, (prompt, texts, values) in enumerate(zip(prompts, answers, rewards, strict=True)):
        order = np.argsort(-np.asarray(values, np.float64), kind="stable")
        for better, worse in zip(order[: len(order) // 2], order[::-1], strict=False):
            if values[better] > values[worse]:
                pairs.append(TokenPair(list(prompt), list(texts[better]), list(texts[worse]), group))
    return pairs


def sample_pairs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    score: Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float]],
    spec: ArmSpec,
    *,
    top_k: int,
    temperature: float,
    max_new_tokens: int,
    eos_token_id: Sequence[int],
    batch_size: int,
    accelerator=None,
) -> list[TokenPair]:
    """Pairs of the reference's own answers, ranked by `score` (prompts' indices, token ids) -> rewards.

    Processes share the prompts; an answer depends on its key alone.
    """
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    n = spec.answers_per_prompt
    mine = list(range(rank, len(prompts), world))
    jobs = [(i, j) for i in mine for j in range(n)]
    policy = ReferencePolicy(model, top_k=top_k, temperature=temperature)
    bar = progress(total=len(jobs), desc="answers", unit="answer")
    completions = decode(
        policy, [prompts[i] for i, _ in jobs], keys=[(spec.seed, 4, i, j) for i, j in jobs],
        max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, batch_size=batch_size,
        on_completion=lambda _: bar.update(),
    )  # fmt: skip
    bar.close()
    texts = [c.token_ids for c in completions]
    values = [float(v) for v in score([i for i, _ in jobs], texts)] if jobs else []
    own = [(texts[k : k + n], values[k : k + n]) for k in range(0, len(jobs), n)]
    whole = gathered(own, len(prompts), world)
    return pairs_by_reward(prompts, [texts for texts, _ in whole], [values for _, values in whole])


def reference_pairs(
    config, dataset, objective: str, spec: ArmSpec, model, tokenizer, texts: Sequence[str], file: Path, accelerator
) -> list[TokenPair]:
    """`sample_pairs` of a model with its adapter off, ranked by the objective's reward; kept in `file`, so that a
    resumed run has them."""
    from utils.cached_models import attended_length
    from utils.data import encode_prompts
    from utils.models import stop_tokens
    from utils.rewards import RewardSet
    from utils.text_formats import answer_texts

    if file.is_file():
        return read_pairs(file)
    room = (attended_length(model) or 1 << 30) - dataset.max_new_tokens
    prompts = encode_prompts(dataset, tokenizer, list(texts), room)
    rewards = RewardSet(config, dataset, [objective], next(model.parameters()).device)

    def score(indices, responses):
        return rewards.score([texts[i] for i in indices], answer_texts(tokenizer, responses))[objective]

    with model.disable_adapter():
        pairs = sample_pairs(
            model, prompts, score, spec, top_k=config.decoding.top_k, temperature=config.decoding.temperature,
            max_new_tokens=dataset.max_new_tokens, eos_token_id=stop_tokens(model.get_base_model(), tokenizer),
            batch_size=config.decoding.batch_size, accelerator=accelerator,
        )  # fmt: skip
    if accelerator is None or accelerator.is_main_process:
        write_pairs(file, pairs)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return pairs


def human_pairs(config, dataset, objective, tokenizer, context: int | None) -> list[TokenPair]:
    """The preference pairs of the objective's reward model; answers are cut to the data set's length."""
    from utils import preferences

    training = objective.training
    rows = preferences.read_pairs(
        config, dataset, training.source, eos=tokenizer.eos_token or "", max_rows=training.max_rows
    )
    groups: dict[str, int] = {}
    pairs = []
    for row in rows:
        prompt = tokenizer(row.conversation.shown)["input_ids"]
        answers = tokenizer([row.chosen, row.rejected], add_special_tokens=False)["input_ids"]
        chosen, rejected = ((ids + [tokenizer.eos_token_id])[: dataset.max_new_tokens] for ids in answers)
        if chosen != rejected and (context is None or len(prompt) + max(len(chosen), len(rejected)) <= context):
            pairs.append(TokenPair(prompt, chosen, rejected, groups.setdefault(row.conversation.first, len(groups))))
    return pairs


def write_pairs(file: Path, pairs: Sequence[TokenPair]) -> None:
    write_atomically(file, json.dumps([vars(p) for p in pairs]))


def read_pairs(file: Path) -> list[TokenPair]:
    return [TokenPair(**p) for p in json.loads(file.read_text())]


def split_pairs(pairs: Sequence[TokenPair], seed: int) -> tuple[list[TokenPair], list[TokenPair]]:
    """Training and held-out pairs; no prompt has pairs in both.

    Raises:
        DataError: too few prompts to split.
    """
    groups = sorted({p.group for p in pairs})
    if len(groups) < 2:
        raise DataError(f"{len(pairs)} preference pairs of {len(groups)} prompts are too few to train on")
    order = np.random.default_rng([seed, 5]).permutation(groups)
    held = {int(g) for g in order[: max(1, int(len(groups) * HELD_OUT))]}
    return [p for p in pairs if p.group not in held], [p for p in pairs if p.group in held]


# ------------------------------------------------------------------------------------------------- loss and training


def rewards_of(model: nn.Module, texts: AnswerBatch) -> Tensor:
    """(B,) sum of log p_arm over each answer's tokens."""
    return answer_log_probs(answer_logits(model, texts), texts).sum(1)


def bradley_terry(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(B,) -log sigmoid(beta (chosen - rejected)) (Xu et al. 2024, eq. 6)."""
    return -nn.functional.logsigmoid(beta * (chosen - rejected))


def margins(model: nn.Module, pairs: Sequence[TokenPair], device) -> Tensor:
    """(B, 2) rewards of the chosen and the rejected answers."""
    answers = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    batch = lay_out_answers([p.prompt for p in pairs] * 2, answers, device)
    return rewards_of(model, batch).view(2, -1).T


@torch.no_grad()
def measure(model: nn.Module, pairs: Sequence[TokenPair], beta: float, device, batch_size: int = 16) -> dict:
    """Accuracy and loss on pairs, and the accuracy of preferring the longer answer."""
    training = model.training
    model.eval()
    rows = torch.cat([margins(model, pairs[i : i + batch_size], device) for i in range(0, len(pairs), batch_size)])
    model.train(training)
    longer = [len(p.chosen) > len(p.rejected) for p in pairs]
    return {
        "pairs": len(pairs),
        "accuracy": float((rows[:, 0] > rows[:, 1]).double().mean()),
        "loss": float(bradley_terry(rows[:, 0], rows[:, 1], beta).mean()),
        "accuracy_of_longer": float(np.mean(longer)),
    }


def train(
    model: nn.Module,
    pairs: Sequence[TokenPair],
    held_out: Sequence[TokenPair],
    spec: ArmSpec,
    folder: Path,
    *,
    device,
    micro_batch_size: int = 8,
    accelerator=None,
    save_steps: int = 50,
    say: Callable[[str], None] = lambda line: None,
    log: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Fit the adapter in place; returns the figures of metrics.json.

    A step has `batch_size` pairs over all processes, so that their number does not change what is learned but for
    dropout. A checkpoint in the folder is gone on from.

    Raises:
        DataError: the loss, in training or on the held-out pairs, is no finite number.
    """
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=spec.lr, weight_decay=0.0)
    checkpoint = Checkpoint(folder, parameters, optimizer)
    state = checkpoint.load() or {"step": 0, "seconds": 0.0, "rows": []}
    if accelerator:
        accelerator.wait_for_everyone()  # everyone has read the checkpoint before anyone replaces it
    passes = (np.random.default_rng([spec.seed, 6, e]).permutation(len(pairs)) for e in range(spec.num_epochs))
    order = [i for one in passes for i in one]
    total, rows = math.ceil(len(order) / spec.batch_size), list(state["rows"])
    if state["step"]:
        say(f"going on from step {state['step']} of {total}")
    began = time.perf_counter() - state["seconds"]
    bar = progress(total=total, desc="reward model", unit="step")
    bar.update(state["step"])
    model.train()
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        for step in range(state["step"], total):
            torch.manual_seed(seed_of(spec.seed, step, rank))  # of the dropout
            batch = [pairs[i] for i in order[step * spec.batch_size : (step + 1) * spec.batch_size]]
            mine, loss = batch[rank::world], torch.zeros((), device=device)
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, len(mine), micro_batch_size):
                scores = margins(model, mine[start : start + micro_batch_size], device)
                part = bradley_terry(scores[:, 0], scores[:, 1], spec.reward_beta).sum() / len(batch)
                part.backward()
                loss += part.detach()
            if world > 1:
                add_up(accelerator, list(parameters.values()))
                loss = accelerator.reduce(loss, "sum")
            norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), spec.max_grad_norm))
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * linear_schedule(step, total, spec.warmup_steps)
            optimizer.step()
            seconds = round(time.perf_counter() - began, 2)
            row = {"step": step + 1, "loss": float(loss), "grad_norm": norm, "seconds": seconds}
            if not math.isfinite(row["loss"]):
                raise DataError(f"training diverged at step {step + 1}; try a lower --lr, and --rerun")
            rows.append(row)
            log(row)
            bar.update(1)
            if rank == 0 and ((step + 1) % save_steps == 0 or step + 1 == total):
                write_csv(Path(folder) / LOG_FILE, rows)
                checkpoint.save({"step": step + 1, "seconds": row["seconds"], "rows": rows})
    bar.close()
    if accelerator:
        accelerator.wait_for_everyone()
    held = measure(model, held_out, spec.reward_beta, device)
    if not math.isfinite(held["loss"]):  # the last step's update may be what broke the weights
        raise DataError(
            f"training diverged: the loss of held-out pairs is {held['loss']}; try a lower --lr, and --rerun"
        )
    return {"num_pairs": len(pairs), "steps": total, "seconds": rows[-1]["seconds"], "held_out": held}
