"""Evaluate a baseline with its KL divergence from the reference: each answer is scored by the reference in one pass.

    python baseline_eval_KL.py --dataset anthropic --morlhf --obj_weights 0.4,0.6
    python baseline_eval_KL.py --dataset anthropic --ppo --obj_weights 0.4,0.6 --num_samples 4

The estimate is the mean over answers of log p(answer) under the policy that sampled it (cut to its top k) less
log p(answer) under the reference (the whole softmax), summed over tokens (paper, eq. 6). Choosing the best of N answers
adds at most log N - (N - 1) / N (Beirami et al. 2024), which the summary shows beside it. Arguments, run folders and
methods are baseline_eval.py's: a run that tracked its log-ratios there is complete here.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from baseline_eval import add_baseline_arguments, method_of
from utils.cli import run
from utils.evaluation import evaluate_method
from utils.settings import add_evaluation_arguments, resolve


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_baseline_arguments(parser)
    add_evaluation_arguments(parser, track_kl=False)
    parser.set_defaults(track_KL=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return evaluate_method(
        resolve(args), lambda settings: dataclasses.replace(method_of(settings, args), read_by_reference=True)
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
