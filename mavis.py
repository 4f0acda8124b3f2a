"""Steer the reference model's answers with value models, and write a run folder with their rewards (paper, sec. 4).

    python mavis.py --dataset anthropic --obj_weights 0.2,,0.8 --value_model_iter 1,,0 --beta 4 --track_KL
    python mavis.py --dataset anthropic --obj_weights 0.5,0.5 --beta 4 --prompt "How do I learn to swim?"

At each step the reference's k likeliest tokens are valued by one value model per weighted objective; the weighted
values, normalised over the k candidates, tilt their probabilities by exp(beta * value). The run folder lies in
<workspace>/mavis_logs; the same command completes an interrupted run and does not repeat a complete one.
"""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter

from utils.cli import UsageError, check_beta, parse_iterations, run
from utils.evaluation import Method, add_evaluation_arguments, evaluate_method, resolve


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
    group.add_argument("--normalize_values", action=BooleanOptionalAction,
                       help="normalise values over a step's candidates (default: the configuration's)")  # fmt: skip
    add_evaluation_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = resolve(args)
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

    method = Method(
        name="mavis",
        kind="mavis_logs",
        build=build,
        series={
            "beta": beta,
            "iteration": args.value_model_iter,
            "value_model_dir": args.value_model_dir or "value_models",
            "normalization": normalization,
        },
        checkpoints={f"value model of {name}": checkpoint(name) for name in iterations},
    )
    return evaluate_method(settings, method)


if __name__ == "__main__":
    raise SystemExit(run(main))
