"""Answers that were made elsewhere, put in the place of decoding: any method is scored as the project's own are.

A file has a row per answer: `response`, and `index` (the prompt's number in the data set's CSV), `prompt` (its text as
it stands there) or both. It may have `trial` (left out: answers to a prompt are counted as they come), `log_prob` (the
sum of the method's own log-probabilities of the answer's tokens, from which the KL is estimated), `finished` (whether
it ended by itself) and `seconds`. What else a row has is not looked at, so a run's samples.jsonl is such a file too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.completions import Completion
from utils.decoding import read_by
from utils.errors import DataError
from utils.rows import read_rows
from utils.summaries import mean_and_error

FEW = 20  # answers, of which a mean says little
ROUNDING = 1e-3  # what a sum of log-probabilities of certain tokens may be above 0


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt; `log_prob` is nan and `seconds` is 0 where the file does not say."""

    response: str
    log_prob: float = math.nan
    finished: bool = True
    seconds: float = 0.0


Key = tuple[int, int]  # a prompt's index and the trial


def read_answers(file: Path, prompts: Mapping[int, str], num_trials: int | None = None) -> dict[Key, Answer]:
    """The answers to these prompts; those to others are left out.

    Args:
        file: JSON lines, a JSON list or CSV, plain or gzipped, or Parquet.
        prompts: {index: the data set's prompt}.
        num_trials: answers per prompt that are wanted; None: as many as the file has.

    Raises:
        DataError: a row that cannot be used, two answers of one trial, a prompt that has too few answers.
    """
    numbers = {text: index for index, text in prompts.items()}
    found: dict[Key, Answer] = {}
    counts: Counter[int] = Counter()  # of each prompt's answers
    strangers = 0
    for place, row in enumerate(read_rows(Path(file)), start=1):
        where = f"{file}, answer {place}"
        index = _index_of(row, prompts, numbers, where)
        if index is None:
            strangers += 1
            continue
        trial = _number(row, "trial", where, whole=True)
        if trial is None:
            trial = counts[index]
        if (index, trial) in found:
            raise DataError(f"{where}: a second answer of trial {trial} to prompt {index}")
        found[index, trial] = _answer_of(row, where)
        counts[index] += 1
    if not found:
        raise DataError(f"{file} has no answer to any of the {len(prompts)} prompts that are evaluated")
    trials = num_trials or 1 + max(trial for _, trial in found)
    missing = len(prompts) * trials - sum(trial < trials for _, trial in found)
    if missing:  # they may be too many to write them down
        index, trial = next((i, t) for i in prompts for t in range(trials) if (i, t) not in found)
        others = f", and {missing - 1} more are missing" if missing > 1 else ""
        raise DataError(
            f"{file} has no answer of trial {trial} to prompt {index}{others}: {trials} to each of {len(prompts)} "
            f"prompts are wanted; --num_prompts, --start_index and --num_trials say how many"
        )
    kept = {key: found[key] for key in sorted(found) if key[1] < trials}
    for name, known in (("log_prob", lambda a: not math.isnan(a.log_prob)), ("seconds", lambda a: a.seconds > 0)):
        if len({known(answer) for answer in kept.values()}) > 1:
            raise DataError(f"{file} has {name} for some answers only; give it for all of them, or for none")
    if left := strangers + len(found) - len(kept):
        print(f"{left} answers in {file} are to other prompts or of further trials, and are left out")
    return kept


def _index_of(row: Mapping, prompts: Mapping[int, str], numbers: Mapping[str, int], where: str) -> int | None:
    """The number of the prompt that a row answers; None where it is not evaluated."""
    index, text = _number(row, "index", where, whole=True), row.get("prompt")
    if index is None and not isinstance(text, str):
        raise DataError(f"{where}: it names no prompt, by index or prompt")
    if index is None:
        return numbers.get(text)
    if index in prompts and isinstance(text, str) and text != prompts[index]:
        raise DataError(
            f"{where}: prompt {index} of the data set is another text than the row's; are these the same split and the "
            f"same prompts? {prompts[index][:60]!r}, {text[:60]!r}"
        )
    return index if index in prompts else None


def _answer_of(row: Mapping, where: str) -> Answer:
    response = row.get("response")
    if not isinstance(response, str):
        raise DataError(f"{where}: no response that is a text")
    try:
        response.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the response is not valid Unicode") from None
    finished = row.get("finished")
    if finished in (None, ""):
        finished = True
    if str(finished).lower() not in ("true", "false"):
        raise DataError(f"{where}: finished is {finished!r}, neither true nor false")
    log_prob, seconds = _number(row, "log_prob", where), _number(row, "seconds", where)
    if log_prob is not None and log_prob > ROUNDING:
        raise DataError(f"{where}: log_prob is {log_prob:g}; the logarithm of a probability is at most 0")
    if seconds is not None and seconds < 0:
        raise DataError(f"{where}: seconds is {seconds:g}, below 0")
    return Answer(
        response.strip(),
        math.nan if log_prob is None else min(log_prob, 0.0),
        str(finished).lower() == "true",
        seconds or 0.0,
    )


def _number(row: Mapping, name: str, where: str, *, whole: bool = False) -> float | int | None:
    """A row's number of that name; None where it has none. A CSV's cells are texts, and an empty one is none."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (whole and (number < 0 or number != int(number))):
        kind = "a whole number of at least 0" if whole else "a finite number"
        raise DataError(f"{where}: {name} is {value!r}, not {kind}")
    return int(number) if whole else number


def fingerprint_of(answers: Mapping[Key, Answer]) -> str:
    """What tells one set of answers from another, wherever the file lies and in whatever order."""
    rows = [[*key, *asdict(answers[key]).values()] for key in sorted(answers)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class GivenAnswers:
    """Answers in the place of a policy and of its decoding (`answers.Generate`).

    Args:
        reference: reads each answer once, for its log-probability; None: that is left out.
        temperature: of the reference, as of every other method's.

    Raises:
        DataError: an answer ends with a special token, which would be read as another token of it.
    """

    def __init__(self, answers: Mapping[Key, Answer], tokenizer, reference=None, *, temperature: float = 1.0):
        self.answers, self.tokenizer, self.reference = answers, tokenizer, reference
        self.temperature = temperature
        self._log_ratios: list[float] = []
        self._said = False
        self.context = getattr(getattr(reference, "config", None), "max_position_embeddings", None)
        special = tuple(token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token)
        for (index, trial), answer in answers.items():
            if special and answer.response.endswith(special):
                raise DataError(
                    f"answer {trial} to prompt {index} ends with a special token, {answer.response[-20:]!r}; leave it "
                    "out (skip_special_tokens=True), and say by `finished` whether the answer ended by itself"
                )

    def work(self) -> dict[str, float]:
        """What a token took is not known."""
        return {}

    def tokens_of(self, answer: Answer) -> list[int]:
        """An answer as the reference's tokenizer has it, with the end of sequence where it ended by itself."""
        ids = self.tokenizer(answer.response, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if answer.finished else list(ids)

    def seconds(self, keys: Sequence[tuple[int, ...]]) -> float:
        """What the file says that these answers took."""
        return sum(self.answers[key[1:]].seconds for key in keys)

    def __call__(self, prompts, keys, on_completion=None) -> list[list[Completion]]:
        answers = [self.answers[key[1:]] for key in keys]
        tokens = [self.tokens_of(answer) for answer in answers]
        completions = [
            Completion(ids, math.nan, answer.finished, answer.log_prob, text=answer.response)
            for answer, ids in zip(answers, tokens, strict=True)
        ]
        if self.reference is not None:
            for (_, index, trial), prompt, ids in zip(keys, prompts, tokens, strict=True):
                if self.context and len(prompt) + len(ids) > self.context:
                    raise DataError(
                        f"answer {trial} to prompt {index} has {len(ids)} tokens, and with its prompt more than the "
                        f"{self.context} that the reference reads; --no-track_KL scores it without that"
                    )
            read_by(self.reference, prompts, completions, temperature=self.temperature)
        if on_completion is not None:
            for given in completions:
                on_completion(len(given.token_ids))
        self._look_at([given.log_ratio for given in completions])
        return [[given] for given in completions]

    def _look_at(self, log_ratios: Sequence[float]) -> None:
        """Say once that the KL cannot be right, where so many answers' mean log-ratio lies that far below 0."""
        self._log_ratios += log_ratios
        if self._said or len(self._log_ratios) < FEW or any(map(math.isnan, self._log_ratios)):
            return
        mean, error = mean_and_error(self._log_ratios)
        if mean < -4 * error:
            self._said = True
            print(
                f"note: the log-ratios' mean is {mean:.2f} (s.e. {error:.2f}), and no KL is below 0: log_prob is to be "
                "the sum over the answer's own tokens, its end included, under the distribution that was sampled"
            )
