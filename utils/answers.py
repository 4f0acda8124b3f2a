"""Answers to prompts, and the rows that are written of them: decode, score, pick the best candidate.

Nothing here knows of configurations or command lines; whatever decodes and scores is given. What is heavy is imported
where it is used, so that a script's `--help` is instant.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from utils.cli import progress
from utils.judge import distinct_ratio
from utils.runs import Run
from utils.summaries import EXACT_KL

# (prompts as token ids, keys, on_completion) -> the candidates of each answer; there is one prompt and key per answer,
# and on_completion(number of tokens) is called as completions end.
Generate = Callable[[Sequence[Sequence[int]], Sequence[tuple[int, ...]], Callable[[int], None] | None], list[list[Any]]]
# From prompts and responses to N rewards per name.
Score = Callable[[Sequence[str], Sequence[str]], Mapping[str, np.ndarray]]
# (prompts as token ids, an answer's completion each): gives completions the reference's log-probability.
Read = Callable[[Sequence[Sequence[int]], Sequence[Any]], None]


def sampler(
    policy,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: Sequence[int],
    batch_size: int,
    suppress_first_eos: bool = False,
) -> Generate:
    """Candidates by sampling: the answer's own key for one sample, the key and the sample's number for more."""
    from utils.decoding import decode

    def generate(prompts, keys, on_completion=None):
        many = [(*key, n) for key in keys for n in range(num_samples)] if num_samples > 1 else list(keys)
        completions = decode(
            policy,
            [prompt for prompt in prompts for _ in range(num_samples)],
            keys=many,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            batch_size=batch_size,
            suppress_first_eos=suppress_first_eos,
            on_completion=on_completion,
        )
        return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]

    return generate


class Remembered:
    """A `Generate` that makes each answer's candidates once, by its key: for points that only rank them otherwise."""

    def __init__(self, generate: Generate):
        self._generate = generate
        self._made: dict[tuple[int, ...], tuple[list[Any], float]] = {}

    def __call__(self, prompts, keys, on_completion=None):
        if on_completion is not None:
            for candidate in (c for key in keys if key in self._made for c in self._made[key][0]):
                on_completion(len(candidate.token_ids))
        new = [(prompt, key) for prompt, key in zip(prompts, keys, strict=True) if key not in self._made]
        if new:
            began = time.perf_counter()
            candidates = self._generate([p for p, _ in new], [k for _, k in new], on_completion)
            share = (time.perf_counter() - began) / len(new)
            self._made |= {key: (made, share) for (_, key), made in zip(new, candidates, strict=True)}
        return [self._made[key][0] for key in keys]

    def seconds(self, keys: Sequence[tuple[int, ...]]) -> float:
        """What making these answers' candidates took, when it was done."""
        return sum(self._made[key][1] for key in keys)


def evaluate(
    run: Run,
    prompts: Mapping[int, str],
    tokens: Mapping[int, Sequence[int]],
    *,
    num_trials: int,
    chunk: int = 128,
    num_candidates: int = 1,
    **how: Any,
) -> None:
    """Answer every prompt `num_trials` times and write each answer's row; rows that the run has are left as they are.

    The key of an answer is (seed, prompt index, trial), so methods with one seed share their random numbers, and a
    resumed run gives what an uninterrupted one gives.

    Args:
        run: an open, incomplete run; it is not finished here.
        prompts: {index: the data set's prompt}; tokens: {index: what the reference reads of it}.
        chunk: answers between two writes.
        num_candidates: completions per answer, for the progress bar.
        how: the arguments of `answer_part`.
    """
    done = run.done
    todo = [(i, t) for i in prompts for t in range(num_trials) if (i, t) not in done]
    bar = progress(total=len(todo) * num_candidates, desc="answers", unit="answer")
    for start in range(0, len(todo), chunk):
        run.append(answer_part(todo[start : start + chunk], prompts, tokens, bar=bar, **how))
    bar.close()


def answer_part(
    part: Sequence[tuple[int, int]],
    prompts: Mapping[int, str],
    tokens: Mapping[int, Sequence[int]],
    *,
    generate: Generate,
    to_text: Callable[[Sequence[int]], str],
    score: Score,
    weights: Mapping[str, float],
    seed: int,
    track_kl: bool = True,
    read: Read | None = None,
    extra: Mapping[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] | None = None,
    work: Mapping[str, float] | None = None,
    bar=None,
) -> list[dict]:
    """Lines of samples.jsonl for answers (prompt index, trial) that are decoded together.

    `seconds` is what their decoding took in the process that did it, an equal share each.

    Args:
        prompts: {index: the data set's prompt}; tokens: {index: what the reference reads of it}.
        generate: candidates of each answer; the best by weighted reward is the answer.
        to_text: token ids to the response's text.
        score: rewards of all objectives.
        weights: what ranks candidates; may be empty where there is one candidate.
        read: for candidates whose policy does not know the reference's log-probability; only the answers are read.
        extra: further scorers of (prompts, responses), logged and never used to choose.
        work: what each decoded token takes (`Policy.work`), counted for each answer.
    """

    def tick(tokens: int) -> None:
        if bar is not None:
            bar.update()
            bar.tokens(tokens)

    began = time.perf_counter()
    keys = [(seed, i, t) for i, t in part]
    candidates = generate([tokens[i] for i, _ in part], keys, tick)
    # Decoding alone, shared by the answers that were decoded together.
    seconds = generate.seconds(keys) if hasattr(generate, "seconds") else time.perf_counter() - began
    seconds /= len(part)
    how = {"track_kl": track_kl, "read": read, "extra": extra or {}, "work": work or {}}
    return pick(
        part, candidates, prompts, tokens, to_text=to_text, score=score, weights=weights, seconds=seconds, **how
    )


def pick(
    part: Sequence[tuple[int, int]],
    candidates: Sequence[Sequence[Any]],
    prompts: Mapping[int, str],
    tokens: Mapping[int, Sequence[int]],
    *,
    to_text: Callable[[Sequence[int]], str],
    score: Score,
    weights: Mapping[str, float],
    seconds: float,
    track_kl: bool,
    read: Read | None,
    extra: Mapping[str, Callable],
    work: Mapping[str, float],
) -> list[dict]:
    """Lines of samples.jsonl: of the candidates of each (index, trial), the best by weighted reward.

    `seconds` is each answer's; the other arguments are those of `answer_part`.
    """
    from utils.completions import LOG_RATIO_DECIMALS

    owner = [n for n, group in enumerate(candidates) for _ in group]
    flat = [completion for group in candidates for completion in group]
    texts = [to_text(c.token_ids) if c.text is None else c.text for c in flat]
    asked = [prompts[part[n][0]] for n in owner]
    rewards = {name: np.asarray(values, np.float64) for name, values in score(asked, texts).items()}
    total = sum((w * rewards[name] for name, w in weights.items()), np.zeros(len(flat)))
    best, first = [], 0
    for group in candidates:
        best.append(first + int(total[first : first + len(group)].argmax()))
        first += len(group)
    if read is not None:
        read([tokens[part[owner[b]][0]] for b in best], [flat[b] for b in best])
    others = {name: scorer([asked[b] for b in best], [texts[b] for b in best]) for name, scorer in extra.items()}
    rows = []
    for n, ((index, trial), b) in enumerate(zip(part, best, strict=True)):
        answer = flat[b]
        row = {
            "index": index, "trial": trial, "prompt": prompts[index], "response": texts[b],
            "rewards": {name: float(values[b]) for name, values in rewards.items()},
        }  # fmt: skip
        if others:
            row["extra"] = {name: float(values[n]) for name, values in others.items()}
        # Both are nan for a policy that is no tilted reference and was not read once more by the reference.
        if track_kl and not math.isnan(answer.log_ratio):
            row["log_ratio"] = round(float(answer.log_ratio), LOG_RATIO_DECIMALS)
            if len(candidates[n]) == 1 and not math.isnan(answer.kl_exact):  # of a chosen one it would estimate nothing
                row |= {name: round(getattr(answer, name), LOG_RATIO_DECIMALS) for name in EXACT_KL}
        if not math.isnan(answer.reference_log_prob):
            row["reference_log_prob"] = round(float(answer.reference_log_prob), LOG_RATIO_DECIMALS)
        generated = sum(len(c.token_ids) for c in candidates[n])
        decoded = sum(len(c.token_ids) if c.decoded is None else c.decoded for c in candidates[n])
        row |= {
            "tokens": len(answer.token_ids),
            "generated_tokens": generated,
            **{what: float(f"{decoded * per_token:.6g}") for what, per_token in work.items()},
            "distinct": distinct_ratio(answer.token_ids),
            "finished": bool(answer.finished),
            "num_candidates": len(candidates[n]),
            "seconds": seconds,
        }
        rows.append(row)
    return rows
