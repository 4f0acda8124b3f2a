"""Score answers that another method made, beside the project's own: same prompts, rewards, statistics and report.

    python answers_eval.py answers.jsonl --method_name mine --dataset anthropic
    python answers_eval.py answers.jsonl --method_name mine --obj_weights 0.5,0.5, --dataset anthropic

The file has a row per answer: `index` (the prompt's number in datasets/<dataset>/<dataset>_<split>_deduped.csv, from 0)
or `prompt`, and `response`. With `log_prob` (the sum of the method's own log-probabilities of the answer's tokens) the
KL is estimated; `trial`, `finished` and `seconds` are taken where they are there. The weights are what the method was
asked for: they choose nothing, and put the run into a front. Run folders lie in <workspace>/baseline_logs.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from baseline_eval import BASELINES
from utils.cli import run
from utils.errors import DataError, UsageError
from utils.evaluation import evaluate_method
from utils.methods import Method, Models, load_prompts
from utils.rivals import SINGLE_POLICY
from utils.settings import Settings, add_evaluation_arguments, resolve

OWN = ("mavis", "mavis_bs", SINGLE_POLICY, *(baseline.method or name for name, baseline in BASELINES.items()))
TAKEN = {name.replace("_", " ") for name in OWN}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("answers", metavar="FILE", help="answers: .jsonl, .json or .csv, plain or gzipped, or .parquet")
    parser.add_argument("--method_name", required=True, help="what made them: its name in run folders and reports")
    add_evaluation_arguments(parser, decodes=False)
    return parser


def checked_name(name: str) -> str:
    """The method's name, which is a part of a folder's.

    Raises:
        UsageError: it cannot be one, or one of the project's methods has it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", name):
        raise UsageError(f"--method_name {name!r}: letters, digits, '.', '_' and '-' make a name")
    shown = " ".join(name.lower().replace("_", " ").split())  # as reports have it, where '_' is a space
    if shown in TAKEN or shown.endswith("best of n"):
        raise UsageError(f"--method_name {name!r} is one of the project's own methods; give another name")
    return name


def method_of(settings: Settings, args: Namespace, answers: Mapping) -> Method:
    """The method of given answers; without any (a dry run), what it would load."""
    from utils.given_answers import GivenAnswers, fingerprint_of

    def build(settings: Settings, models: Models) -> GivenAnswers:
        reference = models.reference if settings.track_kl else None
        return GivenAnswers(answers, models.tokenizer, reference, temperature=settings.temperature)

    return Method(
        name=args.method_name,
        kind="baseline_logs",
        build=build,
        generator=lambda settings, given, eos_token_id: given,
        decodes=False,
        determining={"answers": fingerprint_of(answers)},
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    points, file = resolve(args), Path(args.answers)
    checked_name(args.method_name)
    if len(points) > 1:
        raise UsageError("a file's answers are of one trade-off; give one --obj_weights")
    if not file.is_file():
        raise DataError(f"no file {file}; it holds a row per answer: index (or prompt) and response")
    answers: Mapping = {}
    if not args.dry_run:
        from utils.given_answers import read_answers

        answers = read_answers(file, load_prompts(points[0]), args.num_trials)
        points = [replace(points[0], num_trials=1 + max(trial for _, trial in answers))]
    return evaluate_method(points, lambda settings: method_of(settings, args, answers))


if __name__ == "__main__":
    raise SystemExit(run(main))
