"""Beam search over values: the best of several steered continuations, picked by reward models at the end.

    python mavis_bs.py --dataset anthropic --obj_weights 0.5,0.5 --beta 4 --Q 4 --N 4

Q beams each draw --num_samples tokens from the tilted distribution; the continuations are ranked by their combined
value and the best Q go on. Of the finished texts the N best by value are scored by the reward models, whose weighted
reward picks the one that is reported. Each point (weights and beta) is a run folder in <workspace>/mavis_bs_logs.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from utils.cli import run
from utils.errors import UsageError
from utils.evaluation import evaluate_method
from utils.settings import add_evaluation_arguments, resolve
from utils.steering import add_steering_arguments, steering_method


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("beam search")
    group.add_argument("--Q", type=int, required=True, help="beams, at least 2")
    group.add_argument("--N", type=int, help="texts per answer that the reward models score (default: Q)")
    group.add_argument("--num_samples", type=int, default=1, help="continuations that each beam draws (default: 1)")
    add_steering_arguments(parser, kl_budget=False)
    add_evaluation_arguments(parser, track_kl=False)  # the best of several texts has no log-ratio of its own
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    points = resolve(args)
    if args.Q == 1:
        raise UsageError("--Q 1 is plain sampling: use mavis.py")
    num_return = args.Q if args.N is None else args.N
    for flag, value in (("Q", args.Q), ("N", num_return), ("num_samples", args.num_samples)):
        if value < 1:
            raise UsageError(f"--{flag} must be at least 1, got {value}")

    def generator(settings, policy, eos_token_id):
        from utils.beams import beam_search

        def generate(prompts, keys, on_completion=None):
            return beam_search(
                policy,
                prompts,
                keys=keys,
                num_beams=args.Q,
                num_return=num_return,
                num_samples=args.num_samples,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=eos_token_id,
                batch_size=settings.batch_size,
                suppress_first_eos=settings.suppress_first_eos,
                on_completion=on_completion,
            )

        return generate

    def method_of(settings):
        series = {"Q": args.Q, "N": num_return, "num_samples": args.num_samples}
        return steering_method(
            settings, args, name="mavis_bs", kind="mavis_bs_logs", series=series, generator=generator
        )

    return evaluate_method(points, method_of)


if __name__ == "__main__":
    raise SystemExit(run(main))
