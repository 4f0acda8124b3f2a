"""Evaluate what MAVIS is compared with, in the same run folders and by the same loop.

    python baseline_eval.py --dataset anthropic                                              # the reference itself
    python baseline_eval.py --dataset anthropic --num_samples 16 --obj_weights 0.5,0.5       # best of 16 samples
    python baseline_eval.py --dataset anthropic --token_table --beta 4 --obj_weights 0.5,0.5      # the control
    python baseline_eval.py --dataset anthropic --morlhf --obj_weights 0.4,0.6               # trained on these weights
    python baseline_eval.py --dataset anthropic --ppo --obj_weights 0.4,0.6                  # Rewarded Soups

The reference takes no weights. Best of N ranks the samples of each answer by their weighted reward; it goes with every
baseline. A token table is the context-free control: a value for each token whatever came before it, with the same tilt
(fit_token_table.py makes one). Trained policies are adapters on the reference; a weight of 1 takes the objective's
single policy. Several weights and betas are several points, for which the models are loaded once. Run folders lie in
<workspace>/baseline_logs, those of best-of-N in <workspace>/baseline_bon_logs. baseline_eval_KL.py is the same with the
KL always taken by one pass of the reference; mod_eval.py mixes logits.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass

from utils import rivals
from utils.cli import run
from utils.errors import UsageError
from utils.evaluation import evaluate_method
from utils.methods import Method, Models
from utils.settings import Settings, add_evaluation_arguments, add_tilt_arguments, resolve


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_baseline_arguments(parser)
    add_evaluation_arguments(parser)
    return parser


def add_baseline_arguments(parser: ArgumentParser) -> None:
    """Which baseline, and best of how many."""
    group = parser.add_argument_group("baseline (none of these: the reference)")
    group.add_argument("--num_samples", type=int, default=1, help="best of N: samples per answer (default: 1)")
    group.add_argument(
        "--token_table",
        nargs="?",
        const="",
        metavar="DIR",
        help="steer by tables of token values, DIR/<objective>.safetensors (without DIR: the workspace's token_tables)",
    )
    group.add_argument(
        "--prompt_words",
        action="store_const",
        const=True,
        help="steer towards the prompt's own words, each worth its idf: no learning, no weights",
    )
    for flag, what, root in (
        ("ppo", "Rewarded Soups: the averaged single policies", "reward_soup/<data set>"),
        ("morlhf", "MORLHF: the policy that was trained on the weights", "morlhf/<data set>"),
        ("mod", "MOD: the weighted sum of the single policies' logits", "morlhf/<data set>/single"),
        ("arm", "GenARM: autoregressive reward models guide the reference", "arm/<data set>"),
    ):
        where = f"{what}, below DIR (default: the workspace's {root})"
        group.add_argument(f"--{flag}", nargs="?", const="", metavar="DIR", help=where)
    group.add_argument(
        "--arm_beta", type=float, help="of --arm: its KL penalty, above 0; small values follow the reward models"
    )
    add_tilt_arguments(parser, "the tilt of a table")


# ------------------------------------------------------------------------------------------------------------ policies


@dataclass(frozen=True)
class Baseline:
    """One baseline policy: its `build`, its series and its checkpoints, from a point's settings and the arguments."""

    build: Callable
    series: Callable[[Settings, Namespace], dict] = lambda settings, args: {}
    checkpoints: Callable[[Settings, Namespace], dict] = lambda settings, args: {}
    tilted: bool = False  # by table values: a beta is needed
    weighted: bool = False  # weights are needed
    method: str = ""  # its name in run folders; empty: the flag's
    single: Callable[[Settings, Namespace], bool] = lambda settings, args: False  # the point is a single policy
    trained: bool = False  # a policy of its own, not a tilted reference: see `Method`, where this is two things


def _reference(args: Namespace):
    def build(settings: Settings, models: Models):
        from utils.policies import ReferencePolicy

        return ReferencePolicy(models.reference, top_k=settings.top_k, temperature=settings.temperature)

    return build


def _token_table_dir(settings: Settings, args: Namespace) -> str:
    return args.token_table or str(settings.config.default_path("token_tables"))


def _token_table(args: Namespace):
    def build(settings: Settings, models: Models):
        from utils.policies import TokenTablePolicy
        from utils.token_table import load_token_tables

        tables = load_token_tables(_token_table_dir(settings, args), list(settings.weights), models.vocab_size)
        return TokenTablePolicy(models.reference, tables, settings.weights, **settings.tilt)

    return build


def _token_table_series(settings: Settings, args: Namespace) -> dict:
    return {"beta": settings.beta, "token_table": args.token_table or "token_tables"} | settings.tilt_series


def _token_table_files(settings: Settings, args: Namespace) -> dict:
    folder = _token_table_dir(settings, args)
    common = f"{settings.config.flags} --dataset {settings.spec.name} --output_dir {folder}"
    return {
        f"token table of {n}": (f"{folder}/{n}.safetensors", f"python fit_token_table.py <labelled trees> {n} {common}")
        for n in settings.weights
    }


def _prompt_words(args: Namespace):
    def build(settings: Settings, models: Models):
        from utils.data import prompts_csv, read_prompts
        from utils.policies import PromptTablePolicy
        from utils.token_table import prompt_words

        def own_words():
            texts = read_prompts(prompts_csv(settings.config, settings.spec, "train"), settings.config)
            return prompt_words(settings.spec, texts, models.tokenizer, models.vocab_size)

        return PromptTablePolicy(models.reference, models.once("prompt words", own_words), **settings.tilt)

    return build


def _prompt_words_series(settings: Settings, args: Namespace) -> dict:
    return settings.tilt_series


def _trained(flag: str, method: str, find: Callable, weights: Callable[[Settings], list[float]]) -> Baseline:
    """Policies that were trained: `find` gives their checkpoints, `weights` how their logits are added up."""

    def checkpoints(settings: Settings, args: Namespace) -> dict:
        return find(settings, getattr(args, flag))

    def make(args: Namespace):
        def build(settings: Settings, models: Models):
            return rivals.mixture(settings, models.reference, checkpoints(settings, args), weights(settings))

        return build

    def series(settings: Settings, args: Namespace) -> dict:
        return {"policies": getattr(args, flag)} if getattr(args, flag) else {}

    def single(settings: Settings, args: Namespace) -> bool:
        return rivals.is_single(settings, getattr(args, flag))

    return Baseline(make, series, checkpoints, weighted=True, method=method, single=single, trained=True)


def _arm_checkpoints(settings: Settings, args: Namespace) -> dict:
    return rivals.arm_checkpoints(settings, args.arm)


def _arm(args: Namespace):
    def build(settings: Settings, models: Models):
        return rivals.reward_guided(settings, models.reference, _arm_checkpoints(settings, args), args.arm_beta)

    return build


def _arm_series(settings: Settings, args: Namespace) -> dict:
    return {"arm_beta": args.arm_beta} | ({"policies": args.arm} if args.arm else {})


def _one(settings: Settings) -> list[float]:
    return [1.0]


# A new baseline is one entry here and its flag above; the key is the flag's name, the first entry is the default.
BASELINES = {
    "reference": Baseline(_reference),
    "token_table": Baseline(_token_table, _token_table_series, _token_table_files, tilted=True, weighted=True),
    "prompt_words": Baseline(_prompt_words, _prompt_words_series, tilted=True),
    "ppo": _trained("ppo", "rewarded_soup", rivals.soup_checkpoints, _one),
    "morlhf": _trained("morlhf", "morlhf", rivals.morlhf_checkpoints, _one),
    "mod": _trained("mod", "mod", rivals.mod_checkpoints, lambda settings: list(settings.weights.values())),
    "arm": Baseline(_arm, _arm_series, _arm_checkpoints, weighted=True, method="genarm", trained=True),
}


def method_of(settings: Settings, args: Namespace) -> Method:
    """The baseline that the flags name, at a point, alone or as the best of N of its samples.

    Raises:
        UsageError: flags that do not go together.
    """
    named = [name for name in BASELINES if name != "reference" and getattr(args, name) is not None]
    if len(named) > 1:
        raise UsageError(f"--{' and --'.join(named)} name two baselines; give one")
    name = named[0] if named else "reference"
    baseline, n = BASELINES[name], args.num_samples
    if baseline.tilted and not settings.tilted:
        raise UsageError(f"--{name} needs --beta (or --kl_budget)")
    if baseline.weighted and not settings.weights:
        raise UsageError(f"--{name} needs --obj_weights")
    if not baseline.tilted:
        tilt = ("beta", "kl_budget", "normalization", "normalize_values", "clip_values")
        for flag in (flag for flag in tilt if getattr(args, flag) is not None):
            raise UsageError(f"--{flag} has no meaning for the {name}; it goes with --token_table or --prompt_words")
    if name == "arm" and args.arm_beta is None:
        raise UsageError("--arm needs --arm_beta")
    if args.arm_beta is not None:
        if name != "arm":
            raise UsageError(f"--arm_beta has no meaning for the {name}; it goes with --arm")
        if not (math.isfinite(args.arm_beta) and args.arm_beta > 0):
            raise UsageError(f"--arm_beta must be a finite number above 0, got {args.arm_beta}")
    if n < 1:
        raise UsageError(f"--num_samples must be at least 1, got {n}")
    if n > 1 and settings.kl_budget is not None:
        raise UsageError("--kl_budget needs a KL that log-ratios estimate; that of the best of N is only bounded")
    if n > 1 and not settings.weights:
        raise UsageError("--num_samples needs --obj_weights, which rank the samples")
    if n == 1 and name == "reference" and settings.weights:
        raise UsageError("the reference takes no --obj_weights; give --num_samples or --token_table with them")
    series = baseline.series(settings, args)
    shown = rivals.SINGLE_POLICY if baseline.single(settings, args) else baseline.method or name
    return Method(
        name=shown if n == 1 else "best_of_n" if name == "reference" else f"{shown}_best_of_n",
        kind="baseline_logs" if n == 1 else "baseline_bon_logs",
        build=baseline.build(args),
        series=series if n == 1 else {"num_samples": n} | series,
        checkpoints=baseline.checkpoints(settings, args),
        num_samples=n,
        read_by_reference=baseline.trained,
        loads_late=baseline.trained,
        shares_candidates=name == "reference" and n > 1,
        kl_added=math.log(n) - (n - 1) / n,  # the most that choosing one of N adds to the KL
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return evaluate_method(resolve(args), lambda settings: method_of(settings, args))


if __name__ == "__main__":
    raise SystemExit(run(main))
