"""A small language made from nothing: its generator, its rewards, and the exact answers that models can be held to.

**The language.** 24 words: a stem names one of six topics, which lie on a circle (60 degrees apart), an ending one of
four rhymes, on another (90 degrees apart): `marane`, `solane`, `marook`, ... A prompt names its subject by the first of
these words in it. An answer is a Markov chain of order 1 over words, given the subject (`transition`): it starts near
the subject's topic, wanders from a topic and a rhyme to their neighbours, drifts a little to where no reward lies, and
ends with a fixed probability after each word. Every word can follow every other, so a top-k cut is a real cut.

**The rewards** are means over an answer's words (so its length is neutral) and depend on the prompt:

- `help`: the cosine of the angle between a word's topic and the subject's;
- `harm` (high is good, as in the paper's harmlessness reward): the cosine to the topic 120 degrees on, so it conflicts
  with help (correlation -0.5 for a uniform word), and the topic between the two serves both half;
- `humor`: the cosine of the angle between a word's rhyme and the subject's;
- `summarization`: help, for the subject of a post; `faithful`: whether a word occurs in the post, most of whose words
  are of the topic 120 degrees on.

The language is symmetric under turning the circle of topics, or that of rhymes, for subject and answer together. Hence,
averaged over prompts, no word is worth more than another: a context-free table of token values explains nothing. And a
word's own gain is not its value: what was said last decides where an answer can go from here.

**Exact answers.** Because the rewards are sums over words divided by a length, dynamic programming over (last
word, number of words, sum so far) gives the value of every prefix under the generator, the KL-regularised optimum
(soft Bellman equation), and what MAVIS reaches with perfect value models: `ExactValues`, `exact_mavis`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

STEMS = ("mar", "sol", "fen", "tor", "bri", "gal")  # topics, in the circle's order
ENDINGS = ("ane", "ook", "ily", "ush")  # rhymes
NUM_TOPICS, NUM_RHYMES = len(STEMS), len(ENDINGS)
WORDS = tuple(stem + ending for stem in STEMS for ending in ENDINGS)
NUM_WORDS = len(WORDS)
START = END = NUM_WORDS  # row NUM_WORDS of `transition`: before the first word; column NUM_WORDS: the end
TOPIC = np.arange(NUM_WORDS) // NUM_RHYMES  # (W,)
RHYME = np.arange(NUM_WORDS) % NUM_RHYMES  # (W,)
INDEX = {word: i for i, word in enumerate(WORDS)}

INERTIA = 1.3  # how strongly the next word's topic stays near the last one's (a von Mises weight)
DRIFT = 0.4  # how strongly it drifts to the topic opposite to the one between help and harm
START_NEAR = 0.5  # how strongly an answer starts near the topic between help and harm
RHYME_INERTIA = 1.1  # the same for rhymes
RHYME_DRIFT = 0.5  # how strongly they drift to the rhyme that follows the subject's
TURN = 10.0  # degrees by which each of these prefers one sense of its circle, so that no two words tie
HAZARD = 0.06  # probability that the answer ends, after each word
HARM_OFFSET = 2  # topics from help's best one to harm's

OPENERS = ("tell me about", "what is", "please describe", "do you know", "say something on", "i wonder about")
CLOSERS = ("", "today", "again", "in short", "for me")
POST_OPENERS = ("today i read about", "my friend asked me for", "we talked all night about", "nobody here knows")
POST_LINKS = ("and then came", "but also", "next to", "not without")

# --------------------------------------------------------------------------------------------------- the generator


def _cosine(steps) -> np.ndarray:
    """The cosine of an angle given in topics; exact multiples of one half."""
    return np.array([1.0, 0.5, -0.5, -1.0, -0.5, 0.5])[np.asarray(steps) % NUM_TOPICS]


@functools.cache
def transition(subject: int) -> np.ndarray:
    """The generator for prompts with that subject (a word's index): (W + 1, W + 1) probabilities, from the last word
    (row W: none yet) to the next (column W: the end, never the first)."""

    def pull(steps, size, turn=TURN):  # how near, for a distance in steps on a circle of that size: a cosine
        return np.cos(np.deg2rad(360 / size * (np.asarray(steps) % size) - turn))

    topic, rhyme = TOPIC - TOPIC[subject], RHYME - RHYME[subject]  # (W,), seen from the subject
    wander = INERTIA * pull(topic[None] - topic[:, None], NUM_TOPICS)  # (W, W)
    wander += RHYME_INERTIA * pull(rhyme[None] - rhyme[:, None], NUM_RHYMES)
    drift = DRIFT * pull(topic - 4, NUM_TOPICS) + RHYME_DRIFT * pull(rhyme - 1, NUM_RHYMES)  # (W,)
    start = START_NEAR * pull(topic - 1, NUM_TOPICS) + RHYME_DRIFT * pull(rhyme - 1, NUM_RHYMES)  # (W,)
    words = np.exp(np.concatenate([wander + drift, start[None]]))  # (W + 1, W)
    words /= words.sum(1, keepdims=True)
    end = np.full((NUM_WORDS + 1, 1), HAZARD)
    end[START] = 0.0
    matrix = np.concatenate([words * (1 - end), end], axis=1)
    matrix.setflags(write=False)
    return matrix


def sample_answers(subjects: Sequence[int], rng: np.random.Generator, max_words: int = 16) -> list[list[int]]:
    """One answer per subject, as word indices; END is the last index of an answer that ended within `max_words`."""
    cumulative = np.stack([transition(s) for s in range(NUM_WORDS)]).cumsum(-1)  # (W, W + 1, W + 1)
    subjects = np.asarray(subjects)
    state = np.full(len(subjects), START)
    answers: list[list[int]] = [[] for _ in subjects]
    alive = np.arange(len(subjects))
    for step in range(max_words + 1):
        uniform = rng.random(len(alive))
        following = (cumulative[subjects[alive], state[alive]] < uniform[:, None]).sum(1).clip(max=END)
        keep = np.ones(len(alive), bool)
        for i, (row, word) in enumerate(zip(alive, following, strict=True)):
            if step == max_words and word != END:
                keep[i] = False
                continue
            answers[row].append(int(word))
            keep[i] = word != END
        state[alive] = following
        alive = alive[keep]
        if not len(alive):
            break
    return answers


def words_of(answer: Sequence[int]) -> str:
    """An answer's text; the end has none."""
    return " ".join(WORDS[i] for i in answer if i != END)


def log_prob(subject: int, answer: Sequence[int]) -> float:
    """The generator's log-probability of an answer (nats)."""
    path = [START, *answer]
    return float(sum(np.log(transition(subject)[a, b]) for a, b in pairwise(path)))


def entropy_per_token(horizon: int = 16) -> float:
    """The generator's entropy (nats) per token of its answers cut at `horizon` tokens: no model can do better."""
    matrix = transition(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_state = -np.where(matrix > 0, matrix * np.log(matrix), 0.0).sum(1)  # (W + 1,)
    mass = np.zeros(NUM_WORDS + 1)
    mass[START] = 1.0
    total = tokens = 0.0
    for _ in range(horizon):
        total, tokens = total + mass @ by_state, tokens + mass.sum()
        mass = np.append((mass @ matrix)[:NUM_WORDS], 0.0)
    return float(total / tokens)


# ------------------------------------------------------------------------------------------------ prompts and posts


def all_prompts() -> list[str]:
    """Every question of the language: what a user can say in a dialogue."""
    return [" ".join(f"{o} {w} {c}".split()) for o in OPENERS for w in WORDS for c in CLOSERS]


def dialogue(user: str, answer: str) -> str:
    """A row's text in HH-RLHF's form."""
    return f"\n\nHuman: {user}\n\nAssistant: {answer}"


def make_post(rng: np.random.Generator) -> str:
    """A post: the first word is its subject, the others are all those of the topic 120 degrees on."""
    words = [int(rng.integers(NUM_WORDS))]
    others = np.flatnonzero((TOPIC - TOPIC[words[0]]) % NUM_TOPICS == HARM_OFFSET)
    words += [int(i) for i in rng.permutation(others)]
    text = f"{POST_OPENERS[rng.integers(len(POST_OPENERS))]} {WORDS[words[0]]}"
    for word in words[1:]:
        text += f" {POST_LINKS[rng.integers(len(POST_LINKS))]} {WORDS[word]}"
    return text


def subject_of(text: str) -> int:
    """The subject of a user's text: the first word of the language in it, as its index.

    Raises:
        ValueError: the text has no such word.
    """
    for word in text.split():
        if word in INDEX:
            return INDEX[word]
    raise ValueError(f"no word of the tiny language in {text!r}: its rewards need one, the subject")


# ------------------------------------------------------------------------------------------------------ the rewards


def gains(objective: str, text: str) -> np.ndarray:
    """What each word of an answer adds to a reward before it is divided by the number of words: (W,). `text` is what
    the user says."""
    subject = subject_of(text)
    if objective in ("help", "summarization"):
        gain = _cosine(TOPIC - TOPIC[subject])
    elif objective == "harm":
        gain = _cosine(TOPIC - TOPIC[subject] - HARM_OFFSET)
    elif objective == "humor":
        gain = np.array([1.0, 0.0, -1.0, 0.0])[(RHYME - RHYME[subject]) % NUM_RHYMES]
    elif objective == "faithful":
        gain = np.isin(WORDS, text.split())
    else:
        raise ValueError(f"unknown objective {objective!r} of the tiny world")
    return gain.astype(np.float64)


def _score(objective: str, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    scores = np.zeros(len(responses))
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        gain = gains(objective, prompt)
        words = response.split()
        # What is no word of the language (a prompt's word, say) adds nothing but counts.
        scores[i] = sum(gain[INDEX[word]] for word in words if word in INDEX) / max(len(words), 1)
    return scores


def help_reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How close the answer's words are to the topic of the prompt's subject: mean cosine, in [-1, 1]."""
    return _score("help", prompts, responses)


def harm_reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How close they are to the topic 120 degrees on: mean cosine, in [-1, 1]; conflicts with help."""
    return _score("harm", prompts, responses)


def humor_reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How well the answer's words rhyme with the prompt's subject: mean cosine, in [-1, 1]."""
    return _score("humor", prompts, responses)


def summarization_reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How close the words are to the topic of the post's subject: mean cosine, in [-1, 1]."""
    return _score("summarization", prompts, responses)


def faithful_reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Share of the words that occur in the post, in [0, 1]."""
    return _score("faithful", prompts, responses)


# ------------------------------------------------------------------------------------------------- the exact answers


def _allowed(matrix: np.ndarray, top_k: int | None) -> list[np.ndarray]:
    """Per last word, the next tokens that a top-k cut leaves (ties by index), impossible ones never."""
    order = np.argsort(-matrix, axis=1, kind="stable")
    return [row[: top_k or len(row)][matrix[i, row[: top_k or len(row)]] > 0] for i, row in enumerate(order)]


@dataclass(frozen=True)
class ExactValues:
    """The exact value of every prefix of an answer to one prompt, cut at `horizon` tokens.

    Without `eta`: the expected reward when the generator goes on. With `eta`: the optimum of the expected reward less
    eta times the KL divergence from the generator, the soft Bellman equation
    V(s) = eta log sum_a p(a | s) exp(V(s a) / eta), whose policy is p(a | s) exp((V(s a) - V(s)) / eta).
    A `top_k` restricts the actions to the k most probable ones (probabilities not renormalised: the KL is taken from
    the whole distribution, as everywhere in this project). Build with `solve`.
    """

    table: np.ndarray  # (horizon + 1, W + 1, J): words so far, last word, sum so far on a grid
    steps: np.ndarray  # (W,) integers: `gains` on that grid
    unit: float
    centre: int
    horizon: int

    @staticmethod
    def solve(
        text: str,
        weights: Mapping[str, float],
        horizon: int,
        eta: float | None = None,
        top_k: int | None = None,
        unit: float | None = None,
    ) -> ExactValues:
        """Solve for the reward sum of weight times objective; `weights` must be multiples of 1/20 (or give `unit`)."""
        matrix = transition(subject_of(text))
        gain = sum(weight * gains(name, text) for name, weight in weights.items())
        unit = unit or (0.5 if all(float(w).is_integer() for w in weights.values()) else 0.025)
        steps = np.rint(gain / unit).astype(np.int64)
        if not np.allclose(steps * unit, gain, atol=1e-9):
            raise ValueError(f"weights {dict(weights)} are no multiples of 1/20: give the grid's unit")
        reach = int(np.abs(steps).max()) * horizon
        sums = np.arange(-reach, reach + 1) * unit  # (J,)
        allowed = _allowed(matrix, top_k)
        table = np.zeros((horizon + 1, NUM_WORDS + 1, len(sums)))
        table[horizon] = sums / max(horizon, 1)
        for n in range(horizon - 1, -1, -1):
            stop = sums / max(n, 1)  # the value of ending here
            for last in range(NUM_WORDS + 1):
                options = np.stack(
                    [stop if a == END else _shift(table[n + 1, a], steps[a]) for a in allowed[last]]
                )  # (k, J)
                p = matrix[last, allowed[last]][:, None]
                if eta is None:
                    table[n, last] = (p * options).sum(0) / p.sum()
                else:
                    high = options.max(0)
                    table[n, last] = high + eta * np.log((p * np.exp((options - high) / eta)).sum(0))
        return ExactValues(table, steps, unit, reach, horizon)

    def value(self, answer: Sequence[int] = ()) -> float:
        """The value after these words (indices; END last where the answer has ended)."""
        ended = bool(answer) and answer[-1] == END
        words = list(answer[:-1] if ended else answer)
        total = sum(self.steps[word] for word in words)
        if ended or len(words) == self.horizon:
            return float(total * self.unit / max(len(words), 1))
        return float(self.table[len(words), words[-1] if words else START, self.centre + total])


def _shift(row: np.ndarray, step: int) -> np.ndarray:
    """row[j + step], the edge repeated (states beyond it cannot be reached)."""
    return row[np.clip(np.arange(len(row)) + step, 0, len(row) - 1)]


def exact_mavis(
    text: str,
    weights: Mapping[str, float],
    beta: float,
    horizon: int,
    top_k: int = 15,
    normalization: str = "minmax",
) -> dict[str, float]:
    """What MAVIS reaches with perfect value models of the generator: the expected reward of each objective of
    `weights` and `log_ratio`, the expected sum of log(p_tilt / p_ref).

    The policy at each step is p_tilt ~ p_ref exp(beta u) over the top-k tokens, u the (normalised) weighted values of
    the prefixes that they lead to. At most two objectives (the state holds a sum of each).
    """
    names = list(weights)
    if len(names) not in (1, 2):
        raise ValueError(f"exact_mavis takes one or two objectives, got {names}")
    if normalization not in ("minmax", "none"):
        raise ValueError(f"exact_mavis knows the normalizations minmax and none, got {normalization!r}")
    matrix = transition(subject_of(text))
    solved = [ExactValues.solve(text, {name: 1.0}, horizon) for name in names]
    allowed = _allowed(matrix, top_k)
    sizes = [s.table.shape[-1] for s in solved]
    mass = np.zeros((NUM_WORDS + 1, *sizes))
    mass[(START, *(s.centre for s in solved))] = 1.0
    result = dict.fromkeys(names, 0.0) | {"log_ratio": 0.0}

    def along(vector, axis):  # a vector (J,) as an array that broadcasts over the other objective's axis
        return vector.reshape([-1 if i == axis else 1 for i in range(len(names))])

    def collect(part, n):  # the rewards of answers that stop with n words
        for axis, (name, s) in enumerate(zip(names, solved, strict=True)):
            sums = (np.arange(sizes[axis]) - s.centre) * s.unit
            result[name] += float((part * along(sums, axis)).sum() / max(n, 1))

    for n in range(horizon):
        following = np.zeros_like(mass)
        for last in np.flatnonzero(mass.reshape(NUM_WORDS + 1, -1).sum(1)):
            options = []
            for a in allowed[last]:
                value = 0.0
                for axis, (name, s) in enumerate(zip(names, solved, strict=True)):
                    if a == END:
                        row = (np.arange(sizes[axis]) - s.centre) * s.unit / max(n, 1)
                    else:
                        row = _shift(s.table[n + 1, a], s.steps[a])
                    value = value + weights[name] * along(row, axis)
                options.append(np.broadcast_to(value, sizes))
            u = np.stack(options)  # (k, J1[, J2])
            if normalization == "minmax":
                low, high = u.min(0), u.max(0)
                u = (u - low) / (high - low + 1e-6)
            p = matrix[last, allowed[last]].reshape(-1, *[1] * len(names))
            tilted = p * np.exp(beta * (u - u.max(0)))
            tilted /= tilted.sum(0)
            flow = tilted * mass[last]
            result["log_ratio"] += float((flow * np.log(np.maximum(tilted, 1e-300) / p)).sum())
            for i, a in enumerate(allowed[last]):
                if a == END:
                    collect(flow[i], n)
                    continue
                moved = flow[i]
                for axis, s in enumerate(solved):
                    moved = np.roll(moved, s.steps[a], axis)
                following[a] += moved
        mass = following
    collect(mass.sum(0), horizon)
    return result
