"""Proximal policy optimization of a language model against a weighted sum of rewards, under a KL penalty.

One step: answer a batch of prompts with the policy (the project's own decoder), score the answers, make advantages of
the scores, and pass over the answers a few times with clipped losses. The policy is a LoRA adapter, the reference the
same model with the adapter off, the value a linear head on the policy's last hidden state.

Implementation details, and where each comes from:

 1. The reward of a token is -coef * (log p - log p_ref); the last token's adds the answer's score (Ziegler et al. 2019,
    eq. 2). `token_rewards`
 2. The coefficient follows the measured KL with a proportional controller, its error clipped to 0.2 (Ziegler et al.
    2019, sec. 2.2). `AdaptiveKL`
 3. Generalized advantage estimation (Schulman et al. 2016, eq. 16), the end of an answer being the end of the episode,
    also where the length limit cut it. `advantages`
 4. Advantages are whitened over a step's answers: mean 0, variance 1 (Huang et al. 2022, detail 7). `whiten`
 5. The clipped surrogate objective (Schulman et al. 2017, eq. 7). `policy_loss`
 6. The value's change is clipped as the ratio is (Huang et al. 2022, detail 9). `value_loss`
 7. Both losses are added without an entropy bonus (Schulman et al. 2017, eq. 9, c2 = 0).
 8. The gradient's norm over all parameters is clipped (Huang et al. 2022, detail 11).
 9. Answers are sampled from the k likeliest tokens as in evaluation; log-probabilities are those of the whole softmax,
    as in the published implementations, so the KL here is that of the uncut policy.
10. The end token is no answer: it is forbidden as an answer's first token, in sampling and in log-probabilities alike.
11. No dropout in any pass, so that the first pass's ratio is 1 (Huang et al. 2024, on lm-human-preferences).
12. The value head starts at zero: the first advantages are those of no baseline at all.

Ziegler et al.: Fine-tuning language models from human preferences. Schulman et al.: High-dimensional continuous control
using generalized advantage estimation (2016); Proximal policy optimization algorithms (2017). Huang et al.: The 37
implementation details of PPO (2022); The N+ implementation details of RLHF with PPO (2024).

All randomness is keyed by (seed, step), so a killed run goes on to the same adapter, and processes that share the
batch do what one would do.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from utils import tilting
from utils.answer_batches import AnswerBatch, answer_log_probs, answer_logits, gathered, lay_out_answers
from utils.checkpoint import Checkpoint
from utils.cli import progress
from utils.decoding import decode
from utils.errors import DataError
from utils.files import write_atomically, write_csv, write_json
from utils.optimization import add_up
from utils.policies import ReferencePolicy
from utils.specs import PPOSpec
from utils.training_output import METRICS, save_adapter

LOG_FILE, PLOT_FILE, HEAD_FILE = "training_log.csv", "training_log.png", "value_head.safetensors"
CONTROLLER_CLIP = 0.2  # of the relative error of the KL
LOSS_PARTS = ("policy_loss", "value_loss", "clip_fraction", "approximate_kl")

# (prompts' indices, responses as token ids) -> {objective: (N,) rewards}
Score = Callable[[Sequence[int], Sequence[Sequence[int]]], Mapping[str, np.ndarray]]


# ------------------------------------------------------------------------------------------------- the mathematics
# Tensors are (B, R): B answers, R tokens of the longest; `mask` is 1 on an answer's tokens and 0 behind its end.


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries; the others become 0."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def token_rewards(scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-coef * (log p - log p_ref) at each token, plus the answer's score (B,) at its last (Ziegler et al. 2019, eq. 2).

    Their sum is the objective whose optimum is p_ref(y) exp(score(y) / coef) / Z.
    """
    rewards = -kl_coef * (log_probs - reference) * mask
    last = mask.sum(1).long() - 1  # (B,)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): A_t = sum_l (gamma lam)^l delta_{t+l} with
    delta_t = r_t + gamma V_{t+1} - V_t, and V = 0 behind the end."""
    result, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    value_after = torch.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        result[:, t] = following
        value_after = values[:, t] * mask[:, t]
    return result


def policy_loss(log_probs: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Per token: the clipped surrogate to be minimised (Schulman et al. 2017, eq. 7), and whether the clip had effect.

    max(-ratio A, -clip(ratio, 1 - clip, 1 + clip) A) with ratio = p / p_old.
    """
    ratio = (log_probs - old).exp()
    plain, clipped = -ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage
    return torch.maximum(plain, clipped), (clipped > plain).to(ratio.dtype)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Per token: half the larger squared error of the value and of the value kept within `clip` of the old one (Huang
    et al. 2022, detail 9)."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


@dataclass
class AdaptiveKL:
    """The coefficient of the KL penalty (Ziegler et al. 2019, sec. 2.2).

    e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e * answers / horizon. No target keeps it as it is.
    """

    coef: float
    target: float | None
    horizon: float

    def update(self, kl: float, answers: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -CONTROLLER_CLIP), CONTROLLER_CLIP)
            self.coef *= 1.0 + error * answers / self.horizon


# ------------------------------------------------------------------------------------------------------- the policy


def without_tokens(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits (..., V) in which these tokens have no probability."""
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.int64, device=logits.device), -math.inf)


class PolicyWithValue(nn.Module):
    """A causal language model with one LoRA adapter (PEFT), and a linear value head on its last hidden states."""

    def __init__(self, model: nn.Module, eos_token_ids: Sequence[int], *, temperature: float = 1.0):
        super().__init__()
        self.model, self.eos_token_ids, self.temperature = model, list(eos_token_ids), temperature
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # detail 11; the adapter's configuration keeps its number
        weight = model.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=tilting.wide_dtype(weight.dtype))
        nn.init.zeros_(self.head.weight)  # detail 12
        nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, texts: AnswerBatch) -> tuple[Tensor, Tensor]:
        """(log-probabilities, values), (B, R) each: of each answer's tokens, and of the states before them."""
        length, hidden = texts.mask.shape[1], []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        try:
            logits = answer_logits(self.model, texts) / self.temperature
        finally:
            hook.remove()
        logits = torch.cat([without_tokens(logits[:, :1], self.eos_token_ids), logits[:, 1:]], dim=1)
        log_probs = answer_log_probs(logits, texts)
        values = self.head(hidden[0][:, -length - 1 : -1].to(self.head.weight.dtype)).squeeze(2)
        return log_probs, values * texts.mask

    @torch.no_grad()
    def reference_log_probs(self, texts: AnswerBatch) -> Tensor:
        """`forward`'s log-probabilities with the adapter off."""
        with self.model.disable_adapter():
            return self(texts)[0]


# ------------------------------------------------------------------------------------------------------------- a step


@dataclass
class Answer:
    """One sampled answer and what PPO knows of it; the last three are lists over its tokens."""

    prompt: list[int]
    response: list[int]
    rewards: dict[str, float]
    score: float
    log_probs: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def sample_answers(
    policy: PolicyWithValue,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, ...]],
    *,
    top_k: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """The policy's answers as token ids (details 9 and 10)."""
    training = policy.model.training
    sampler = ReferencePolicy(policy.model, top_k=top_k, temperature=policy.temperature)
    completions = decode(
        sampler, prompts, keys=keys, max_new_tokens=max_new_tokens, eos_token_id=policy.eos_token_ids,
        batch_size=batch_size, suppress_first_eos=True,
    )  # fmt: skip
    policy.model.train(training)
    return [c.token_ids for c in completions]


def length_of(answer: Answer) -> tuple[int, int]:
    """What passes are sorted by, so that they have little padding; sums over tokens do not depend on the order."""
    return len(answer.prompt), len(answer.response)


@torch.no_grad()
def read_answers(policy: PolicyWithValue, answers: Sequence[Answer], batch_size: int) -> None:
    """Fill in log-probabilities, the reference's, and values, as they are before the update."""
    answers = sorted(answers, key=length_of)
    for start in range(0, len(answers), batch_size):
        part = answers[start : start + batch_size]
        texts = lay_out_answers([a.prompt for a in part], [a.response for a in part], policy.device)
        log_probs, values = policy(texts)
        reference = policy.reference_log_probs(texts)
        for a, *rows in zip(part, log_probs.tolist(), reference.tolist(), values.tolist(), strict=True):
            a.log_probs, a.reference, a.values = (row[: len(a.response)] for row in rows)


def padded(rows: Sequence[Sequence[float]], width: int, device, dtype) -> Tensor:
    """Lists of several lengths as (B, width), zeros behind their ends."""
    array = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return torch.as_tensor(array, dtype=dtype, device=device)


@dataclass
class Targets:
    """What the losses compare with; (B, R) each, fixed while a step's answers are passed over."""

    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def make_targets(answers: Sequence[Answer], spec: PPOSpec, kl_coef: float, device, dtype) -> tuple[Targets, float]:
    """Targets of a step's answers (details 1, 3 and 4), and the KL estimate: mean over answers of sum log p / p_ref."""
    width = max(len(a.response) for a in answers)
    mask = padded([[1.0] * len(a.response) for a in answers], width, device, dtype)
    log_probs, reference, values = (
        padded([getattr(a, name) for a in answers], width, device, dtype)
        for name in ("log_probs", "reference", "values")
    )
    scores = torch.tensor([a.score for a in answers], dtype=dtype, device=device)
    rewards = token_rewards(scores, log_probs, reference, mask, kl_coef)
    gains = advantages(rewards, values, mask, spec.gamma, spec.gae_lambda)
    targets = Targets(mask, log_probs, values, whiten(gains, mask), (gains + values) * mask)
    return targets, float(((log_probs - reference) * mask).sum(1).mean())


def add_gradients(
    policy: PolicyWithValue,
    answers: Sequence[Answer],
    targets: Targets,
    rows: Sequence[int],
    tokens: float,
    spec: PPOSpec,
) -> dict[str, float]:
    """Add the gradients of the losses over some answers, each token counting 1 / tokens.

    Returns:
        the sums of `LOSS_PARTS` over the passes, and the largest ratio's error; the device is waited for once.
    """
    sums = torch.zeros(len(LOSS_PARTS), dtype=torch.float64, device=policy.device)
    error = torch.zeros((), dtype=torch.float64, device=policy.device)
    rows = sorted(rows, key=lambda i: length_of(answers[i]))
    for start in range(0, len(rows), spec.micro_batch_size):
        part = rows[start : start + spec.micro_batch_size]
        texts = lay_out_answers([answers[i].prompt for i in part], [answers[i].response for i in part], policy.device)
        log_probs, values = policy(texts)
        width = texts.mask.shape[1]
        index = torch.tensor(part, device=policy.device)
        mask, old, old_values, gains, returns = (
            x[index, :width]
            for x in (targets.mask, targets.log_probs, targets.values, targets.advantages, targets.returns)
        )
        by_token, clipped = policy_loss(log_probs, old, gains, spec.clip_ratio)
        p = (by_token * mask).sum() / tokens
        v = (value_loss(values, old_values, returns, spec.clip_value) * mask).sum() / tokens
        (p + spec.value_coef * v).backward()
        with torch.no_grad():
            change = (log_probs - old) * mask
            kl = (change.exp() - 1 - change).sum() / tokens  # Schulman's k3 estimator
            sums += torch.stack([p, v, (clipped * mask).sum() / tokens, kl])
            error = torch.maximum(error, (change.exp() - 1).abs().max().double())
    return dict(zip((*LOSS_PARTS, "ratio_error"), torch.cat([sums, error[None]]).tolist(), strict=True))


# ----------------------------------------------------------------------------------------------------------- training


def plan_steps(num_prompts: int, spec: PPOSpec) -> int:
    """Number of steps: `num_epochs` passes over the prompts, at most `max_steps`, at least one."""
    steps = max(1, spec.num_epochs * num_prompts // spec.batch_size)
    return min(steps, spec.max_steps or steps)


def prompts_of_step(step: int, num_prompts: int, spec: PPOSpec) -> list[int]:
    """The prompts of a step: places in an endless sequence of shuffled passes."""
    places = range(step * spec.batch_size, (step + 1) * spec.batch_size)
    passes = {p // num_prompts for p in places}
    orders = {e: np.random.default_rng([spec.seed, 1, e]).permutation(num_prompts) for e in passes}
    return [int(orders[p // num_prompts][p % num_prompts]) for p in places]


def train(
    policy: PolicyWithValue,
    prompts: Sequence[Sequence[int]],
    score: Score,
    weights: Mapping[str, float],
    spec: PPOSpec,
    folder: Path,
    *,
    top_k: int,
    max_new_tokens: int,
    decode_batch_size: int,
    accelerator=None,
    save_steps: int = 10,
    say: Callable[[str], None] = lambda line: None,
    log: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Train the policy's adapter and value head in place; returns the log's rows, which are also in training_log.csv.

    Args:
        prompts: token ids of each prompt.
        score: rewards of answers.
        weights: {objective: weight} of the rewards that are maximised.
        folder: where the log and the checkpoint are; a checkpoint there is gone on from.
        accelerator: an `accelerate.Accelerator` where several processes share each batch.
        save_steps: steps between two checkpoints.

    Raises:
        DataError: a loss, or another figure of the log, is no finite number.
    """
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    parameters = policy.trained()
    optimizer = torch.optim.AdamW(parameters.values(), lr=spec.lr, weight_decay=0.0)
    checkpoint = Checkpoint(folder, parameters, optimizer)
    state = checkpoint.load() or {"step": 0, "kl_coef": spec.kl_coef, "seconds": 0.0, "rows": []}
    controller = AdaptiveKL(state["kl_coef"], spec.kl_target, spec.kl_horizon)
    rows, total, first = list(state["rows"]), plan_steps(len(prompts), spec), state["step"]
    if first:
        say(f"going on from step {first} of {total}")
    if accelerator:
        accelerator.wait_for_everyone()  # everyone has read the checkpoint before anyone replaces it
    began = time.perf_counter() - state["seconds"]
    dtype = policy.head.weight.dtype
    bar = progress(total=total, desc="ppo", unit="step")
    bar.update(first)
    for step in range(first, total):
        picked = prompts_of_step(step, len(prompts), spec)
        keys = [(spec.seed, 2, step, i) for i in range(len(picked))]
        mine = range(rank, len(picked), world)
        asked = [list(prompts[picked[i]]) for i in mine]
        responses = sample_answers(
            policy, asked, [keys[i] for i in mine], top_k=top_k, max_new_tokens=max_new_tokens,
            batch_size=decode_batch_size,
        )  # fmt: skip
        rewards = score([picked[i] for i in mine], responses) if responses else {}
        answers = []
        for j, (prompt, response) in enumerate(zip(asked, responses, strict=True)):
            own = {name: float(values[j]) for name, values in rewards.items()}
            answers.append(Answer(prompt, response, own, sum(w * own[name] for name, w in weights.items())))
        read_answers(policy, answers, spec.micro_batch_size)
        answers = gathered(answers, len(picked), world)

        targets, kl = make_targets(answers, spec, controller.coef, policy.device, dtype)
        measured, norm = _update(policy, answers, targets, optimizer, parameters, spec, step, accelerator)
        row = _row(step + 1, answers, kl, controller.coef, measured, norm, time.perf_counter() - began)
        controller.update(kl, len(answers))
        if not all(math.isfinite(v) for v in row.values()):
            bad = ", ".join(name for name, v in row.items() if not math.isfinite(v))
            raise DataError(
                f"training diverged at step {step + 1} ({bad} is no finite number); try a lower --lr, --rerun"
            )
        rows.append(row)
        bar.update(1)
        bar.set_postfix_str(f"reward {row['reward']:.3f}, KL {kl:.2f}", refresh=False)
        log(row)
        if rank == 0 and ((step + 1) % save_steps == 0 or step + 1 == total):
            write_log(folder, rows)
            state = {"step": step + 1, "kl_coef": controller.coef, "seconds": row["seconds"], "rows": rows}
            checkpoint.save(state)
    bar.close()
    if accelerator:
        accelerator.wait_for_everyone()
    return rows


def _update(
    policy, answers, targets, optimizer, parameters, spec: PPOSpec, step: int, accelerator
) -> tuple[dict, float]:
    """Pass over a step's answers `ppo_epochs` times; ({part: mean}, the last gradient norm).

    `ratio_error` is the first minibatch's: 0 up to rounding. Over processes it is the sum of theirs.
    """
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    sums: dict[str, float] = {}
    count, norm, first_error = 0, 0.0, 0.0
    lengths = targets.mask.sum(1)
    for epoch in range(spec.ppo_epochs):
        order = np.random.default_rng([spec.seed, 3, step, epoch]).permutation(len(answers))
        for start in range(0, len(order), spec.mini_batch_size):
            rows = order[start : start + spec.mini_batch_size]
            tokens = float(lengths[torch.as_tensor(rows, device=lengths.device)].sum())
            optimizer.zero_grad(set_to_none=True)
            parts = add_gradients(policy, answers, targets, [int(i) for i in rows[rank::world]], tokens, spec)
            if world > 1:
                add_up(accelerator, list(parameters.values()))
                values = torch.tensor([parts[n] for n in sorted(parts)], device=policy.device)
                parts = dict(zip(sorted(parts), accelerator.reduce(values, "sum").tolist(), strict=True))
            norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), spec.max_grad_norm))  # detail 8
            optimizer.step()
            first_error = parts["ratio_error"] if count == 0 else first_error
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
            count += 1
    means = {name: value / count for name, value in sums.items()}
    return means | {"ratio_error": first_error}, norm


def _row(
    step, answers: Sequence[Answer], kl, kl_coef, measured: Mapping[str, float], norm, seconds
) -> dict[str, float]:
    """One row of training_log.csv."""
    scores = np.array([a.score for a in answers])
    error = scores.std(ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    row = {"step": step, "reward": float(scores.mean()), "reward_error": float(error)}
    row |= {f"reward_{name}": float(np.mean([a.rewards[name] for a in answers])) for name in answers[0].rewards}
    row |= {"kl": kl, "kl_coef": kl_coef, "tokens": float(np.mean([len(a.response) for a in answers]))}
    return row | dict(measured) | {"grad_norm": norm, "seconds": round(seconds, 2)}


def write_log(folder: Path, rows: Sequence[Mapping]) -> None:
    """training_log.csv, and training_log.png: reward and KL per step."""
    write_csv(Path(folder) / LOG_FILE, rows)
    write_atomically(Path(folder) / PLOT_FILE, plot_log(rows))


def plot_log(rows: Sequence[Mapping]) -> bytes:
    """A PNG of reward (with its standard error) and KL per step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    steps, reward = [r["step"] for r in rows], np.array([r["reward"] for r in rows])
    error = np.array([r.get("reward_error", 0.0) for r in rows])
    above.plot(steps, reward, label="weighted reward")
    above.fill_between(steps, reward - error, reward + error, alpha=0.3, label="standard error")
    above.set_ylabel("reward")
    above.legend()
    below.plot(steps, [r["kl"] for r in rows], color="tab:red")
    below.set_ylabel("KL from the reference (nats)")
    below.set_xlabel("step")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def save_policy(policy: PolicyWithValue, folder: Path, record: dict) -> None:
    """The ordinary PEFT adapter, the value head beside it, then metrics.json, which says that it is whole."""
    save_adapter(policy.model, Path(folder))
    write_atomically(Path(folder) / HEAD_FILE, save({n: p.detach().cpu() for n, p in policy.head.named_parameters()}))
    write_json(Path(folder) / METRICS, record)
