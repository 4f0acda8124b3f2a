"""What `mavis.py` and `mavis_bs.py` share: steering's arguments, and the MAVIS policy built from them."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from typing import Any

from utils.cli import UsageError, check_beta, parse_iterations
from utils.evaluation import Method, Settings


def add_steering_arguments(parser: ArgumentParser) -> None:
    """Strength, value models and normalisation."""
    group = parser.add_argument_group("steering")
    group.add_argument("--beta", type=float, required=True, help="strength of the tilt, at least 0; 0 is the reference")
    group.add_argument(
        "--value_model_dir", help="folder of iter_<N>/<objective> (default: value_models in the workspace)"
    )
    group.add_argument(
        "--value_model_iter",
        default="0",
        help="iteration of each objective's value model, e.g. 1,,0; one number for all (default: 0)",
    )
    group.add_argument(
        "--normalize_values",
        action=BooleanOptionalAction,
        help="normalise values over a step's candidates (default: the configuration's)",
    )


def steering_method(
    settings: Settings,
    args: Namespace,
    *,
    name: str,
    kind: str,
    series: dict[str, Any] | None = None,
    generator: Callable | None = None,
    num_samples: int = 1,
) -> Method:
    """The evaluation method of a MAVIS policy; `series` and `generator` as in `Method`.

    Raises:
        UsageError: no weights, a beta that cannot tilt, or iterations that do not fit the weights.
    """
    if not settings.weights:
        raise UsageError(f"--obj_weights is needed: weights of {','.join(settings.spec.objectives)}, e.g. 0.5,0.5")
    beta = check_beta(args.beta)
    iterations = parse_iterations(args.value_model_iter, settings.weights, settings.spec.objectives)
    normalization = settings.config.decoding.normalization
    if args.normalize_values is not None:
        on = normalization if normalization != "none" else "minmax"
        normalization = on if args.normalize_values else "none"
    value_model_dir = args.value_model_dir or str(settings.config.default_path("value_models"))

    def build(settings, reference, tokenizer, device):
        from utils.models import load_value_models, vocabulary_size
        from utils.policies import MavisPolicy

        value_models = load_value_models(
            settings.config, value_model_dir, iterations, tokenizer, vocabulary_size(reference), device
        )
        return MavisPolicy(
            reference,
            value_models,
            settings.weights,
            beta=beta,
            top_k=settings.top_k,
            temperature=settings.temperature,
            normalization=normalization,
        )

    def checkpoint(objective: str) -> tuple[str, str]:
        iteration = iterations[objective]
        folder = f"{value_model_dir}/iter_{iteration}/{objective}"
        made_by = (
            f"python train_value_model.py --config {settings.config.path} --dataset {settings.spec.name} "
            f"--objective {objective} --data_dir <labelled trees> --output_dir {folder}"
        )
        if iteration:
            made_by += f" --init_checkpoint {value_model_dir}/iter_{iteration - 1}/{objective}"
        return folder, made_by

    return Method(
        name=name,
        kind=kind,
        build=build,
        series={
            "beta": beta,
            "iteration": args.value_model_iter,
            "value_model_dir": args.value_model_dir or "value_models",
            "normalization": normalization,
            **(series or {}),
        },
        checkpoints={f"value model of {objective}": checkpoint(objective) for objective in iterations},
        generator=generator,
        num_samples=num_samples,
    )
