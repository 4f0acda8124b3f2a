"""The figures of an evaluation's answers: means per prompt, with their errors, and a run's summary.txt.

All of it is computed from the lines of samples.jsonl and args.yaml, as plain data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Columns of rewards.csv that are not rewards, in their order; log_ratio is there only where it was tracked, and
# EXACT_KL only of one answer by a tilted reference (see `Completion`).
EXACT_KL = ("kl_exact", "kl_top_k")
GENERATED = "generated_tokens"  # of all candidates; a rewards.csv of an earlier version has no such column
WORK = ("language_tokens", "value_tokens", "gflop")  # of an answer; runs from before it was counted lack it
MEASURES = ("log_ratio", *EXACT_KL, "seconds", "tokens", GENERATED, *WORK, "distinct", "reference_log_prob", "finished")


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the mean; the error is nan for fewer than two values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return math.nan, math.nan
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def columns_of(samples: Sequence[Mapping]) -> tuple[list[str], list[str], list[str]]:
    """Names of the rewards, of the further scores and of the measures that every sample has."""
    extra = [n for n in samples[0].get("extra", {}) if all(n in s.get("extra", {}) for s in samples)]
    measures = [n for n in MEASURES if all(n in s for s in samples)]
    return list(samples[0]["rewards"]), extra, measures


def per_prompt(samples: Sequence[Mapping]) -> list[dict]:
    """Rows of rewards.csv: means over the trials of each prompt, in the order of prompts.

    A further score or a measure is a column only where every sample has it (log_ratio: where it was tracked).
    `reference_log_prob` is per token; an empty answer has none and does not count.
    """
    rewards, extra, measures = columns_of(samples)
    groups: dict[int, list[Mapping]] = {}
    for sample in samples:
        groups.setdefault(sample["index"], []).append(sample)
    rows = []
    for index in sorted(groups):
        group = groups[index]
        row = {"index": index}
        row |= {name: float(np.mean([s["rewards"][name] for s in group])) for name in rewards}
        row |= {name: float(np.mean([s["extra"][name] for s in group])) for name in extra}
        for name in measures:
            values = [per_token_log_prob(s) if name == "reference_log_prob" else s[name] for s in group]
            known = [v for v in values if v is not None]
            row[name] = float(np.mean(known)) if known else math.nan
        rows.append(row)
    return rows


def per_token_log_prob(sample: Mapping) -> float | None:
    """The reference's log-probability of the answer per token; None where the answer is empty."""
    return sample["reference_log_prob"] / sample["tokens"] if sample["tokens"] else None


@dataclass(frozen=True)
class Statistic:
    """A mean with its standard error over prompts and, for rewards, its standard deviation over trials."""

    mean: float
    error: float = math.nan
    trials: float = math.nan


def summarize(samples: Sequence[Mapping]) -> dict[str, Statistic]:
    """Every figure of summary.txt, from the lines of samples.jsonl alone."""
    rows = per_prompt(samples)
    trials = sorted({s["trial"] for s in samples})
    rewards, extra, measures = columns_of(samples)
    figures = {}
    for kind, names in (("rewards", rewards), ("extra", extra)):
        for name in names:
            by_trial = [np.mean([s[kind][name] for s in samples if s["trial"] == t]) for t in trials]
            spread = float(np.std(by_trial, ddof=1)) if len(trials) > 1 else math.nan
            figures[name] = Statistic(*mean_and_error([r[name] for r in rows]), spread)
    for name in measures:
        figures[name] = Statistic(*mean_and_error([r[name] for r in rows if not math.isnan(r[name])]))
    seconds = sum(s["seconds"] for s in samples)
    generated = sum(s["generated_tokens"] for s in samples)
    figures["seconds_per_prompt"] = Statistic(seconds / len(samples) if seconds > 0 else math.nan)
    figures["tokens_per_second"] = Statistic(generated / seconds if seconds > 0 else math.nan)
    return figures


# ----------------------------------------------------------------------------------------------------------- summary


def describe_weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


def format_summary(arguments: Mapping, figures: Mapping[str, Statistic]) -> str:
    """summary.txt: what was run, then each figure with its errors."""

    def number(value: float, digits: int = 4) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    indices, kl_added = arguments["indices"], arguments["kl_added"]
    head = {
        "method": arguments["method"],
        "weights": describe_weights(arguments["weights"]) or "none",
        "settings": ", ".join(f"{k} {v}" for k, v in arguments["series"].items()) or "none",
        "data set": arguments["dataset"],
        "configuration": arguments["configuration"].get("label", ""),
        "prompts": f"{len(indices)} (index {min(indices)} to {max(indices)}), trials: {arguments['num_trials']}",
    }
    lines = [f"{key:<16}{value}" for key, value in head.items() if value]
    rewards = [n for n in figures if n not in MEASURES and not n.endswith(("_per_prompt", "_per_second"))]
    width = max(16, *(len(name) + 2 for name in rewards))
    lines += ["", f"{'reward':<{width}}{'mean':>10}{'s.e. over prompts':>20}{'s.d. over trials':>19}"]
    for name in rewards:
        f = figures[name]
        lines.append(f"{name:<{width}}{number(f.mean):>10}{number(f.error):>20}{number(f.trials):>19}")
    lines.append("")
    if "log_ratio" in figures:
        f = figures["log_ratio"]
        sign = "<= " if kl_added else ""
        parts = f" ({number(f.mean)} estimated + at most {number(kl_added)} by choosing one of N)" if kl_added else ""
        lines.append(f"{'KL':<24}{sign}{number(f.mean + kl_added)} nats, s.e. {number(f.error)}{parts}")
    if all(name in figures for name in EXACT_KL):
        exact, top_k = (figures[name] for name in EXACT_KL)
        lines.append(f"{'KL, exact in each step':<24}{number(exact.mean)} nats, s.e. {number(exact.error)}")
        lines.append(f"{'  to the top k alone':<24}{number(top_k.mean)} nats, s.e. {number(top_k.error)}")
    if search := arguments.get("kl_search"):
        which = "one" if search["met"] else "the nearest one"
        lines.append(
            f"{'KL budget':<24}{search['budget']:g} nats; this beta, {which} of {search['tried']} that were tried, has "
            f"{number(search['kl'])} (s.e. {number(search['error'])}) on one answer per prompt"
        )
    lines.append(f"{'seconds per prompt':<24}{number(figures['seconds_per_prompt'].mean)}")
    lines.append(f"{'tokens per second':<24}{number(figures['tokens_per_second'].mean, 1)}")
    lines.append(f"{'tokens per answer':<24}{figures['tokens'].mean:.1f}")
    if all(name in figures for name in WORK):
        language, value, gflop = (figures[name].mean for name in WORK)
        text = f"{language:.0f} tokens of language models, {value:.0f} of value models, {gflop:.3g} GFLOP"
        lines.append(f"{'work per answer':<24}{text}")
    lines.append(f"{'distinct tokens':<24}{number(figures['distinct'].mean)} of an answer's tokens")
    if "reference_log_prob" in figures:
        lines.append(f"{'reference log-prob':<24}{number(figures['reference_log_prob'].mean)} per token")
    lines.append(f"{'finished':<24}{100 * figures['finished'].mean:.0f} % of answers")
    return "\n".join(lines) + "\n"
