"""Multi-objective decoding (MOD): the weighted sum of the single-objective policies' logits (Shi et al. 2024).

    python mod_eval.py --dataset anthropic --obj_weights 0.4,0.6

Each weighted objective's policy is an adapter in <single_dir>/<objective> that Finetuning/PPO/ppo.py made; all of them
share one base. Temperature, top-k cut and softmax come after the sum. Run folders lie in <workspace>/baseline_logs,
those of best-of-N in <workspace>/baseline_bon_logs; the KL is taken against the reference.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from baseline_eval import build_parser as baseline_parser
from baseline_eval import method_of
from utils.cli import run
from utils.evaluation import evaluate_method
from utils.settings import add_evaluation_arguments, resolve


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    group = parser.add_argument_group("mixture")
    group.add_argument(
        "--single_dir", help="folder of <objective>/ adapters (default: the workspace's morlhf/<data set>/single)"
    )
    group.add_argument("--num_samples", type=int, default=1, help="best of N: samples per answer (default: 1)")
    add_evaluation_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    points = resolve(args)
    everything = baseline_parser().parse_args(["--dataset", args.dataset])  # baseline_eval.py's flags, none given
    chosen = Namespace(**vars(everything) | {"mod": args.single_dir or "", "num_samples": args.num_samples})
    return evaluate_method(points, lambda settings: method_of(settings, chosen))


if __name__ == "__main__":
    raise SystemExit(run(main))
