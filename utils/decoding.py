"""One batched loop over any policy: rows are refilled as they finish, and a token depends on its key alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils import tilting
from utils.beams import beam_search
from utils.completions import Completion, check_prompts, eos_tensor, not_finite, prompt_of, steps_between_looks
from utils.policies import model_of
from utils.policy_base import Policy, Snapshot, Step

__all__ = ["Completion", "Job", "Prefix", "beam_search", "decode", "run_jobs", "score_texts"]

PREFILL_TOKENS = 8192  # padded tokens of one prefill at most


@dataclass
class Prefix:
    """Tokens that are read once and then serve every job that starts from them.

    `response_start` is where the response begins; without it, all of them are the prompt.
    """

    tokens: Sequence[int]
    snapshot: Snapshot | None = None
    response_start: int | None = None


@dataclass
class Job:
    """Generate up to `budget` tokens from a prefix (or a saved state) with the randomness of `key`.

    `keep_state` asks for the state behind the last token, unless the text ended. `prompt_index` is for messages.
    """

    key: tuple[int, ...]
    start: Prefix | Snapshot
    budget: int
    keep_state: bool = False
    tag: Any = None
    prompt_index: int | None = None


class _Rows:
    """What the loop knows of each row, on the policy's device: (B,) tensors and the tokens so far (B, T)."""

    def __init__(self, rows: int, budget: int, device: torch.device, suspects: int):
        def zeros(dtype, *shape):
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.key, self.count, self.budget = zeros(torch.int64), zeros(torch.int64), zeros(torch.int64)
        self.tokens, self.log_ratios = zeros(torch.int64, budget), zeros(torch.float64, budget)
        self.log_prob, self.reference_log_prob = zeros(torch.float64), zeros(torch.float64)
        self.kl_exact, self.log_kept = zeros(torch.float64), zeros(torch.float64)  # log of what the cut to k keeps
        self.alive, self.finished = zeros(torch.bool), zeros(torch.bool)
        self.unsound = zeros(torch.bool, suspects)  # since the row started, see `Policy.distribution`

    def start(self, rows: Sequence[int], jobs: Sequence[Job]) -> None:
        device = self.key.device
        index = torch.as_tensor(rows, device=device)
        self.key[index] = torch.as_tensor([tilting.fold_key(j.key) for j in jobs], device=device)
        budgets = torch.as_tensor([j.budget for j in jobs], device=device)
        self.budget[index] = budgets
        short = int(max(j.budget for j in jobs)) - self.tokens.shape[1]
        if short > 0:
            self.tokens = torch.nn.functional.pad(self.tokens, (0, short))
            self.log_ratios = torch.nn.functional.pad(self.log_ratios, (0, short))
        self.count[index] = 0
        for total in (self.log_prob, self.reference_log_prob, self.kl_exact, self.log_kept):
            total[index] = 0.0
        self.alive[index], self.finished[index], self.unsound[index] = True, False, False

    def record(self, step: Step, eos: Tensor, unsound: Tensor) -> Tensor:
        """Choose a candidate for every row and write it down for those that are alive; returns the choice (B,)."""
        choice = tilting.sample(step.p_tilt, tilting.uniforms(self.key, self.count))
        pick = choice.unsqueeze(1)
        token = step.token_ids.gather(1, pick).squeeze(1)
        place = self.count.clamp(max=self.tokens.shape[1] - 1).unsqueeze(1)
        kept = torch.where(self.alive, token, self.tokens.gather(1, place).squeeze(1))
        self.tokens.scatter_(1, place, kept.unsqueeze(1))
        log_p, log_q = (p.gather(1, pick).squeeze(1).double().log() for p in (step.p_tilt, step.p_ref))
        self.log_prob += torch.where(self.alive, log_p, 0.0)
        self.reference_log_prob += torch.where(self.alive, log_q, 0.0)
        p_ref = step.p_ref.double()
        self.kl_exact += torch.where(self.alive, tilting.step_kl(step.p_tilt.double(), p_ref), 0.0)
        self.log_kept += torch.where(self.alive, p_ref.sum(1).log(), 0.0)
        self.log_ratios.scatter_(
            1, place, torch.where(self.alive, log_p - log_q, self.log_ratios.gather(1, place).squeeze(1)).unsqueeze(1)
        )
        self.unsound |= self.alive.unsqueeze(1) & unsound
        self.finished |= self.alive & (token.unsqueeze(1) == eos).any(1)
        self.count += self.alive
        self.alive &= ~self.finished & (self.count < self.budget)
        return choice

    def take(self, rows: Sequence[int], total: int) -> None:
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.key.device)
        for name, tensor in vars(self).items():
            kept = tensor[index]
            empty = kept.new_zeros(total - len(rows), *kept.shape[1:])
            setattr(self, name, torch.cat([kept, empty]))


@torch.inference_mode()
def run_jobs(
    policy: Policy,
    queue: deque[Job],
    *,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int,
    trace: bool = False,
    sync_every: int | None = None,
    suppress_first_eos: bool = False,
) -> Iterator[tuple[Job, Completion, Snapshot | None]]:
    """Work through a queue of jobs, in batches of rows that are refilled as they finish.

    Yields (job, completion, state or None) as jobs end. The caller may put new jobs on the queue between two yields;
    the queue's left end is taken first.

    Args:
        sync_every: steps between two looks at which rows have ended (default: `steps_between_looks`). A row whose
            budget ends is always seen at once.
        suppress_first_eos: the first token after a `Prefix` is no end-of-sequence token (see `decode`).

    Raises:
        DataError: values or probabilities that are not finite, at the next look; the message names the prompt and the
            objective.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = policy.device
    eos = eos_tensor(eos_token_id, device)
    ends = {"eos": eos}  # for recorded steps: a place of its own
    forbidden = eos if suppress_first_eos else None
    sync_every = sync_every or steps_between_looks(device)
    jobs: list[Job | None] = []
    rows: _Rows | None = None
    traces: list[list[dict]] = []
    remaining: list[int] = []
    since_look = 0

    while queue or any(j is not None for j in jobs):
        active = [r for r, j in enumerate(jobs) if j is not None]
        wanted = _number_of_rows(len(active) + len(queue), batch_size, policy)
        if rows is None:
            policy.open(wanted)
            rows = _Rows(wanted, max(j.budget for j in queue), device, 1 + len(policy.objectives))
            jobs, traces, remaining = [None] * wanted, [[] for _ in range(wanted)], [0] * wanted
        elif wanted > len(jobs) or (not queue and 2 * wanted <= len(jobs)):
            policy.take(active, wanted)
            rows.take(active, wanted)
            empty = wanted - len(active)
            jobs = [jobs[r] for r in active] + [None] * empty
            traces = [traces[r] for r in active] + [[] for _ in range(empty)]
            remaining = [remaining[r] for r in active] + [0] * empty

        free = [r for r, j in enumerate(jobs) if j is None][: len(queue)]
        if free:
            _prefill(policy, queue, len(free), batch_size, forbidden)
            started = [queue.popleft() for _ in free]
            policy.load(free, [j.start.snapshot if isinstance(j.start, Prefix) else j.start for j in started])
            rows.start(free, started)
            for r, job in zip(free, started, strict=True):
                jobs[r], traces[r], remaining[r] = job, [], job.budget

        choice = None
        if policy.graphs is not None and not trace:
            _recorded_step(policy, rows, ends)
        else:
            step = policy.distribution()
            choice = rows.record(step, eos, policy.unsound)
            if trace:
                _trace(step, choice, jobs, traces)
        active = [r for r, j in enumerate(jobs) if j is not None]
        for r in active:
            remaining[r] -= 1
        since_look += 1
        ended: list[int] = []
        if since_look >= sync_every or min(remaining[r] for r in active) <= 0:
            since_look = 0
            alive, unsound = torch.stack([rows.alive, rows.unsound.any(1)]).tolist()
            if any(unsound[r] for r in active):
                _complain(policy, rows, jobs, next(r for r in active if unsound[r]))
            ended = [r for r in active if not alive[r]]
        if choice is not None and (len(ended) < len(active) or any(jobs[r].keep_state for r in ended)):
            policy.advance(choice)
        if ended:
            yield from _finish(policy, rows, jobs, traces, ended)


def _number_of_rows(needed: int, batch_size: int, policy: Policy) -> int:
    """Rows for that many jobs; where each number of rows is recorded anew, a power of two below the batch's size."""
    return min(batch_size, needed if policy.graphs is None else 1 << (needed - 1).bit_length())


def _recorded_step(policy: Policy, rows: _Rows, ends: dict[str, Tensor]) -> None:
    """A whole step, the models' reading of the chosen tokens included, as a graph of the policy's."""

    def choose() -> Tensor:
        return rows.record(policy.distribution(), ends["eos"], policy.unsound)

    of_rows = {f"row's {name}": (vars(rows), name) for name in vars(rows)}
    policy.recorded_step(choose, of_rows | {"eos": (ends, "eos")})


def _complain(policy: Policy, rows: _Rows, jobs: Sequence[Job | None], row: int) -> None:
    raise not_finite(jobs[row].prompt_index, policy.complaint(rows.unsound[row].tolist()), int(rows.count[row]))


def _prefill(policy: Policy, queue: deque[Job], free: int, batch_size: int, forbidden: Tensor | None) -> None:
    """Read the prefixes that the next jobs need, and some ahead of them, so that prompts are read in batches."""
    waiting: list[Prefix] = []
    needed = 0
    for place, job in enumerate(queue):
        if place >= max(free, batch_size):
            break
        prefix = job.start
        if isinstance(prefix, Prefix) and prefix.snapshot is None and not any(prefix is w for w in waiting):
            waiting.append(prefix)
        if place == free - 1:
            needed = len(waiting)
    if not needed:
        return
    while waiting:
        group, longest = [], 0
        while waiting and max(longest, len(waiting[0].tokens)) * (len(group) + 1) <= max(
            PREFILL_TOKENS, len(waiting[0].tokens)
        ):
            longest = max(longest, len(waiting[0].tokens))
            group.append(waiting.pop(0))
        starts = [len(p.tokens) if p.response_start is None else p.response_start for p in group]
        for prefix, snapshot in zip(group, policy.prefill([p.tokens for p in group], starts, forbidden), strict=True):
            prefix.snapshot = snapshot


def _finish(policy, rows: _Rows, jobs, traces, ended: list[int]) -> list[tuple[Job, Completion, Snapshot | None]]:
    """Completions of ended rows, and their states where a job asks for them; the rows are free afterwards."""
    index = torch.as_tensor(ended, device=rows.key.device)
    # In two pieces, since each copy from a device waits for all that it has to do before.
    whole = torch.column_stack([rows.count, rows.finished, rows.tokens])[index].tolist()
    sums = (rows.log_prob, rows.reference_log_prob, rows.kl_exact, rows.log_kept)
    real = torch.column_stack([*sums, rows.log_ratios])[index].tolist()
    results = []
    for r, (count, finished, *tokens), (log_prob, reference_log_prob, kl_exact, log_kept, *log_ratios) in zip(
        ended, whole, real, strict=True
    ):
        follows = policy.follows_reference
        completion = Completion(
            tokens[:count],
            log_prob - reference_log_prob if follows else float("nan"),
            bool(finished),
            log_prob,
            reference_log_prob if follows else float("nan"),
            log_ratios[:count] if follows else [],
            traces[r] or None,
            kl_exact=kl_exact if follows else float("nan"),
            kl_top_k=kl_exact + log_kept if follows else float("nan"),
        )
        state = policy.save([r])[0] if jobs[r].keep_state and not finished else None
        results.append((jobs[r], completion, state))
        jobs[r], traces[r] = None, []
    policy.release(ended)
    return results


def _trace(step: Step, choice: Tensor, jobs, traces) -> None:
    """Copies, since the policy writes over its rows' candidates when it loads new texts."""
    columns = {name: tensor if tensor is None else tensor.to("cpu", copy=True) for name, tensor in vars(step).items()}
    for r, job in enumerate(jobs):
        if job is not None and len(traces[r]) < job.budget:
            row = {name: None if tensor is None else tensor[r] for name, tensor in columns.items()}
            traces[r].append({**row, "chosen": int(choice[r])})


def decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int,
    trace: bool = False,
    reference: torch.nn.Module | None = None,
    suppress_first_eos: bool = False,
    on_completion=None,
) -> list[Completion]:
    """Sample one completion per prompt.

    Args:
        prompts: lists of token ids, of any lengths; equal prompts are read once.
        keys: one tuple of whole numbers per prompt, (seed, prompt_index, trial). The tokens depend on it alone, not
            on the batch; in half precision another batch shape may round a probability otherwise and flip a token.
        max_new_tokens: tokens per completion at most.
        eos_token_id: one id, several, or None.
        reference: for a policy that is no tilted reference: the model (or ReferencePolicy) against which the log-ratio
            is taken, in one pass over each finished text.
        suppress_first_eos: the first new token is no end-of-sequence token (v3), so that no answer is empty: the token
            is taken out before the top k are chosen, at the one place where the candidates after a prompt are made.
            p_ref stays the full softmax, so a log-ratio counts what this costs: -log(1 - p_ref(eos)) without a tilt
            and without a cut.
        on_completion: called with the number of tokens of each completion as it ends (for progress bars).

    Returns:
        completions in the order of the prompts.
    """
    if len(prompts) != len(keys):
        raise ValueError(f"{len(prompts)} prompts but {len(keys)} keys")
    check_prompts(prompts, max_new_tokens, policy.context)
    prefixes: dict[tuple[int, ...], Prefix] = {}
    queue: deque[Job] = deque()
    for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        prefix = prefixes.setdefault(tuple(prompt), Prefix(list(prompt)))
        queue.append(Job(key, prefix, max_new_tokens, tag=i, prompt_index=prompt_of(key, i)))
    prefixes.clear()  # a prefix's cache goes when its last job has started
    completions: list[Completion | None] = [None] * len(prompts)
    options = dict(batch_size=batch_size, trace=trace, suppress_first_eos=suppress_first_eos)
    for job, completion, _ in run_jobs(policy, queue, eos_token_id=eos_token_id, **options):
        completions[job.tag] = completion
        if on_completion is not None:
            on_completion(len(completion.token_ids))
    if reference is not None:
        read_by(reference, prompts, completions, temperature=policy.temperature)
    return completions


def read_by(reference, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], *, temperature: float):
    """Give completions of another policy their log-ratio to the reference, which reads each finished text once."""
    scores = score_texts(reference, prompts, [c.token_ids for c in completions], temperature=temperature)
    for completion, score in zip(completions, scores, strict=True):
        completion.reference_log_prob = score
        completion.log_ratio = completion.log_prob - score


@torch.inference_mode()
def score_texts(
    model,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> list[float]:
    """Sum of a language model's log-probabilities of each response after its prompt, one pass over each text."""
    model = model_of(model)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    scores = [0.0] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [list(prompts[i]) + list(responses[i]) for i in rows]
        longest = max(map(len, texts))
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for r, text in enumerate(texts):  # right-padded: causal attention never sees the padding
            tokens[r, : len(text)], mask[r, : len(text)] = torch.as_tensor(text), 1
        tokens = tokens.to(device)
        skipped = min(len(prompts[i]) for i in rows) - 1  # positions whose next tokens are prompts' alone
        logits = model(
            input_ids=tokens, attention_mask=mask.to(device), use_cache=False, logits_to_keep=longest - skipped
        ).logits
        sums = []
        for r, i in enumerate(rows):  # a row at a time: wide logits of all of them would be most of the memory
            first, stop = len(prompts[i]) - 1, len(texts[r]) - 1
            wide = tilting.widened(logits[r, first - skipped : stop - skipped]) / temperature
            sums.append(wide.log_softmax(-1).gather(1, tokens[r, first + 1 : stop + 1, None]).double().sum())
        for i, score in zip(rows, torch.stack(sums).tolist(), strict=True):
            scores[i] = score
    return scores
