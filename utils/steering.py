"""What `mavis.py` and `mavis_bs.py` share: steering's arguments, and the MAVIS policy built from them."""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from utils.cli import parse_iterations, same_iteration
from utils.errors import UsageError
from utils.methods import Method, Models
from utils.places import candidate_head_command, candidate_head_path, value_model_command, value_model_folder
from utils.provenance import fingerprint
from utils.settings import Settings, add_tilt_arguments

VALUE_HEADS = ("scalar", "candidates")
VALUE_ADAPTERS = ("merged", "stacked")


def add_steering_arguments(parser: ArgumentParser, *, kl_budget: bool = True) -> None:
    """Value models, strength and normalisation; `kl_budget` as in `add_tilt_arguments`."""
    group = parser.add_argument_group("value models")
    group.add_argument(
        "--value_model_dir", help="folder of iter_<N>/<objective> (default: value_models in the workspace)"
    )
    group.add_argument(
        "--value_model_iter",
        default="0",
        help="iteration of each objective's value model, e.g. 1,,0; one number for all (default: 0)",
    )
    group.add_argument(
        "--value_head",
        choices=VALUE_HEADS,
        default=VALUE_HEADS[0],
        help="scalar: a value model reads each of the k candidates; candidates: it reads the one that was taken, and a "
        "candidate head (fit_candidate_heads.py) values all k from the state before them (default: %(default)s)",
    )
    group.add_argument(
        "--value_adapters",
        choices=VALUE_ADAPTERS,
        default=VALUE_ADAPTERS[0],
        help="merged: each value model has weights of its own; stacked: their adapters share one base in memory, and a "
        "text is read with all of them in one pass (default: %(default)s)",
    )
    group.add_argument("--candidate_head_dir", help="folder of candidate heads (default: the workspace's)")
    add_tilt_arguments(parser, "steering", kl_budget=kl_budget)


def value_models_of(settings: Settings, args: Namespace, iterations: dict[str, int]) -> dict[str, tuple[str, str]]:
    """{objective: (folder, the command that makes it)} of the value models that steer."""
    config = settings.config
    folders = {o: str(value_model_folder(config, args.value_model_dir, n, o)) for o, n in iterations.items()}
    return {o: (folder, value_model_command(config, o, folder)) for o, folder in folders.items()}


def candidate_heads_of(settings: Settings, args: Namespace, iterations: dict[str, int]) -> dict[str, tuple[str, str]]:
    """{objective: (file, the command that makes it)} of the candidate heads; empty where value models read candidates.

    Raises:
        UsageError: a folder of heads that are not asked for.
    """
    if args.value_head != "candidates":
        if args.candidate_head_dir is not None:
            raise UsageError("--candidate_head_dir goes with --value_head candidates")
        return {}
    root = args.candidate_head_dir or str(settings.config.default_path("candidate_heads"))
    return {
        objective: (
            str(candidate_head_path(root, iteration, objective)),
            candidate_head_command(
                settings.config, objective, iteration, args.candidate_head_dir, args.value_model_dir
            ),
        )
        for objective, iteration in iterations.items()
    }


def steering_method(
    settings: Settings,
    args: Namespace,
    *,
    name: str,
    kind: str,
    series: dict[str, Any] | None = None,
    generator: Callable | None = None,
) -> Method:
    """The evaluation method of a MAVIS policy at a point; the others as in `Method`.

    Raises:
        UsageError: no weights, nothing that says how strong the tilt is, or iterations that do not fit the weights.
    """
    if not settings.weights:
        raise UsageError(f"--obj_weights is needed: weights of {','.join(settings.spec.objectives)}, e.g. 0.5,0.5")
    if args.beta is None and settings.kl_budget is None:
        raise UsageError("--beta" + (" (or --kl_budget)" if "kl_budget" in args else "") + " is needed, e.g. --beta 4")
    iterations = parse_iterations(args.value_model_iter, settings.weights, settings.spec.objectives)
    value_models = value_models_of(settings, args, iterations)
    candidate_heads = candidate_heads_of(settings, args, iterations)

    def build(settings: Settings, models: Models):
        from utils.candidates import load_candidate_head
        from utils.policies import CandidatePolicy, MavisPolicy
        from utils.value_models import load_value_models

        loaded = load_value_models(
            settings.config,
            args.value_model_dir,
            iterations,
            models.tokenizer,
            models.vocab_size,
            models.device,
            loaded=models.once("value models", dict),
            adapters=args.value_adapters,
        )
        if not candidate_heads:
            return MavisPolicy(models.reference, loaded, settings.weights, **settings.tilt)

        def load_head(name: str):
            (file, made_by), (folder, _) = candidate_heads[name], value_models[name]
            return load_candidate_head(file, loaded[name], fingerprint(folder), made_by)

        heads = {n: models.once(("candidate head", n), functools.partial(load_head, n)) for n in iterations}
        return CandidatePolicy(models.reference, loaded, heads, settings.weights, **settings.tilt)

    return Method(
        name=name,
        kind=kind,
        build=build,
        series={
            "beta": settings.beta,  # first, for the reader
            "iteration": same_iteration(args.value_model_iter),
            "value_model_dir": args.value_model_dir or "value_models",
            **({"value_head": args.value_head} if candidate_heads else {}),
            **({"value_adapters": "stacked"} if args.value_adapters == "stacked" else {}),  # other rounding
            **settings.tilt_series,
            **(series or {}),
        },
        checkpoints={f"value model of {n}": made for n, made in value_models.items()}
        | {f"candidate head of {n}": made for n, made in candidate_heads.items()},
        generator=generator,
    )
