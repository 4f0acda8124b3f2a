"""Steer the reference model's answers with value models, and write a run folder with their rewards (paper, sec. 4).

    python mavis.py --dataset anthropic --obj_weights 0.2,,0.8 --value_model_iter 1,,0 --beta 4 --track_KL
    python mavis.py --dataset anthropic --front help,harm --points 6 --beta 2 4        # 12 runs, models loaded once
    python mavis.py --dataset anthropic --obj_weights 0.5,0.5 --kl_budget 3            # the beta of 3 nats
    python mavis.py --dataset anthropic --obj_weights 1 --obj_weights 0,1 --beta 4 --prompt "How do I learn to swim?"

At each step the reference's k likeliest tokens are valued by one value model per weighted objective; the weighted
values, normalised over the k candidates, tilt their probabilities by exp(beta * value). Each point (weights and beta)
is a run folder in <workspace>/mavis_logs; the same command completes an interrupted run and repeats no complete one.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from utils.cli import run
from utils.evaluation import evaluate_method
from utils.settings import add_evaluation_arguments, resolve
from utils.steering import add_steering_arguments, steering_method


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_steering_arguments(parser)
    add_evaluation_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return evaluate_method(
        resolve(args), lambda settings: steering_method(settings, args, name="mavis", kind="mavis_logs")
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
