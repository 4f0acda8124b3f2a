"""An independent judge: a Bradley-Terry model on the words of the response.

It is fitted on the same preference pairs as a reward head, from the source split alone, and no stage trains on it or
steers by it. It says whether a reward's rise is more than the reward model's own taste; and its accuracy stands beside
a reward model's, as what words alone achieve.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import DataError
from utils.files import write_atomically
from utils.specs import Config, DatasetSpec

FORMAT = 1
MAX_WORDS, MIN_TEXTS = 5000, 3
WORD = re.compile(r"[a-z']+|[0-9]+|[?!]")


def words_of(text: str) -> list[str]:
    """Lower-case words, numbers, question and exclamation marks."""
    return WORD.findall(text.lower().replace("’", "'"))


@dataclass(frozen=True)
class Judge:
    """score(response) = sum over its words of weight * count / sqrt(words in the response) + bias."""

    vocabulary: tuple[str, ...]
    weight: np.ndarray
    bias: float = 0.0

    def counts(self, responses: Sequence[str]):
        """(N, words) sparse, see `word_counts`."""
        return word_counts(responses, self.vocabulary)

    def score(self, responses: Sequence[str]) -> np.ndarray:
        """(N,) float64."""
        return np.asarray(self.counts(responses) @ self.weight) + self.bias

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """`score`, with the arguments that evaluation's scorers take."""
        return self.score(responses)

    def save(self, path: str | Path) -> None:
        """JSON, written whole or not at all."""
        record = {
            "format": FORMAT,
            "bias": self.bias,
            "weights": dict(zip(self.vocabulary, map(float, self.weight), strict=True)),
        }
        write_atomically(Path(path), json.dumps(record, ensure_ascii=False) + "\n")

    @staticmethod
    def load(path: str | Path) -> Judge:
        try:
            record = json.loads(Path(path).read_text())
            weights = record["weights"]
            return Judge(tuple(weights), np.array(list(weights.values()), np.float64), float(record["bias"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no judge ({error}); delete it and fit it again") from error


def vocabulary_of(texts: Sequence[str]) -> tuple[str, ...]:
    """The words that enough texts have, the most frequent first."""
    seen = Counter(word for text in texts for word in set(words_of(text)))
    return tuple(w for w, n in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS] if n >= MIN_TEXTS)


def word_counts(texts: Sequence[str], vocabulary: Sequence[str]):
    """(N, words) sparse: count / sqrt(words in the text), between a sum over words and a mean over them."""
    from scipy.sparse import csr_matrix

    index = {word: i for i, word in enumerate(vocabulary)}
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        words = words_of(text)
        for word, count in Counter(words).items():
            if word in index:
                rows.append(row)
                columns.append(index[word])
                values.append(count / np.sqrt(len(words)))
    return csr_matrix((values, (rows, columns)), shape=(len(texts), len(vocabulary)))


def fit_judge_pairs(chosen: Sequence[str], rejected: Sequence[str], groups: Sequence[str]) -> Judge:
    """Bradley-Terry on the differences of word counts; the penalty is chosen by cross-validation over `groups`."""
    from utils.pooled_reward import choose_l2, fit_logistic

    vocabulary = vocabulary_of([*chosen, *rejected])
    x = word_counts(chosen, vocabulary) - word_counts(rejected, vocabulary)
    y = np.ones(x.shape[0])
    l2 = choose_l2(lambda i, l2: fit_logistic(x[i], y[i], l2, intercept=False), x, y, groups)
    weight, bias = fit_logistic(x, y, l2, intercept=False)
    return Judge(vocabulary, weight, bias)


def fit_judge_labels(texts: Sequence[str], labels: Sequence[int]) -> Judge:
    """Logistic regression on word counts."""
    from utils.pooled_reward import choose_l2, fit_logistic

    vocabulary = vocabulary_of(texts)
    x, y = word_counts(texts, vocabulary), np.asarray(labels, np.float64)
    l2 = choose_l2(lambda i, l2: fit_logistic(x[i], y[i], l2, intercept=True), x, y, texts)
    weight, bias = fit_logistic(x, y, l2, intercept=True)
    return Judge(vocabulary, weight, bias)


# ----------------------------------------------------------------------------------------------------- of a workspace


def judge_path(config: Config, objective: str) -> Path:
    return config.default_path("judges", f"{objective}.json")


def fit_judges(config: Config, dataset: DatasetSpec, objectives: Sequence[str] | None = None) -> dict[str, Judge]:
    """Fit and save the judges of the objectives that have preference pairs; those that are there are read."""
    from utils.preferences import read_pairs

    judges = {}
    for spec in map(config.objective, dataset.objectives if objectives is None else objectives):
        if spec.training is None or spec.training.kind != "preference":
            continue
        path = judge_path(config, spec.name)
        if not path.is_file():
            pairs = read_pairs(config, dataset, spec.training.source, max_rows=spec.training.max_rows)
            groups = [p.conversation.first for p in pairs]
            fit_judge_pairs([p.chosen for p in pairs], [p.rejected for p in pairs], groups).save(path)
        judges[spec.name] = Judge.load(path)
    return judges


def load_judges(config: Config, objectives: Sequence[str]) -> dict[str, Callable]:
    """{judge_<objective>: scorer of (prompts, responses)} of those that the workspace has."""
    paths = {name: judge_path(config, name) for name in objectives}
    return {f"judge_{name}": Judge.load(path) for name, path in paths.items() if path.is_file()}


def distinct_ratio(tokens: Sequence[int]) -> float:
    """Fluency's cheap half: the share of distinct tokens in a response (1 for an empty one)."""
    tokens = list(tokens)
    return len(set(tokens)) / len(tokens) if tokens else 1.0
