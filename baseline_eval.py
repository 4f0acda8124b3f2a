"""Evaluate what MAVIS is compared with, in the same run folders and by the same loop.

    python baseline_eval.py --dataset anthropic                                              # the reference itself
    python baseline_eval.py --dataset anthropic --num_samples 16 --obj_weights 0.5,0.5       # best of 16 samples
    python baseline_eval.py --dataset anthropic --token_table --beta 4 --obj_weights 0.5,0.5      # the control

The reference takes no weights. Best of N ranks the samples of each answer by their weighted reward. A token table is
the context-free control: a value for each token whatever came before it, with the same tilt (fit_token_table.py makes
one). Several weights and betas are several points, for which the models are loaded once. Run folders lie in
<workspace>/baseline_logs, those of best-of-N in <workspace>/baseline_bon_logs.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass

from utils.cli import UsageError, run
from utils.evaluation import Method, Models, evaluate_method
from utils.settings import Settings, add_evaluation_arguments, add_tilt_arguments, resolve


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
    add_tilt_arguments(parser, "the tilt of a table")
    add_evaluation_arguments(parser)
    return parser


# ------------------------------------------------------------------------------------------------------------ policies


@dataclass(frozen=True)
class Baseline:
    """One baseline policy: its `build`, its series and its checkpoints, from a point's settings and the arguments."""

    build: Callable
    series: Callable[[Settings, Namespace], dict] = lambda settings, args: {}
    checkpoints: Callable[[Settings, Namespace], dict] = lambda settings, args: {}
    tilted: bool = False  # by table values: a beta is needed
    weighted: bool = False  # weights are needed


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
    common = f"--config {settings.config.path} --dataset {settings.spec.name} --output_dir {folder}"
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


# A new baseline is one entry here and its flag above; the key is the flag's name, the first entry is the default.
BASELINES = {
    "reference": Baseline(_reference),
    "token_table": Baseline(_token_table, _token_table_series, _token_table_files, tilted=True, weighted=True),
    "prompt_words": Baseline(_prompt_words, _prompt_words_series, tilted=True),
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
    if n < 1:
        raise UsageError(f"--num_samples must be at least 1, got {n}")
    if n > 1 and settings.kl_budget is not None:
        raise UsageError("--kl_budget needs a KL that log-ratios estimate; that of the best of N is only bounded")
    if n > 1 and not settings.weights:
        raise UsageError("--num_samples needs --obj_weights, which rank the samples")
    if n == 1 and name == "reference" and settings.weights:
        raise UsageError("the reference takes no --obj_weights; give --num_samples or --token_table with them")
    series = baseline.series(settings, args)
    return Method(
        name=name if n == 1 else "best_of_n" if name == "reference" else f"{name}_best_of_n",
        kind="baseline_logs" if n == 1 else "baseline_bon_logs",
        build=baseline.build(args),
        series=series if n == 1 else {"num_samples": n} | series,
        checkpoints=baseline.checkpoints(settings, args),
        num_samples=n,
        shares_candidates=name == "reference" and n > 1,
        kl_added=math.log(n) - (n - 1) / n,  # the most that choosing one of N adds to the KL
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return evaluate_method(resolve(args), lambda settings: method_of(settings, args))


if __name__ == "__main__":
    raise SystemExit(run(main))
