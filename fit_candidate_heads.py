#!/usr/bin/env python
"""Fit candidate heads: what a value model says of all k candidates, from the state before them.

    python fit_candidate_heads.py <objective|all> --dataset anthropic
    python mavis.py --value_head candidates ...              # the value model then reads 1 token a step, not k

Training prompts are answered by MAVIS at several strengths and random weights, and each head is fitted to what its
value model says of the candidates on the way: no rewards, no trees. Writes
<workspace>/candidate_heads/iter_<N>/<objective>.safetensors and prints how well the head agrees with the value model
over the candidates of a state, on held-out prompts, beside a context-free table's agreement.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from utils import cli
from utils.errors import UsageError
from utils.places import candidate_head_path, check_adapter_folder, value_model_command, value_model_folder


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("objective", help="an objective of the data set, several with commas, or all")
    parser.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    parser.add_argument("--value_model_dir", help="folder of iter_<N>/<objective> (default: the workspace's)")
    parser.add_argument("--value_model_iter", type=int, default=0, help="iteration of the value models (default: 0)")
    parser.add_argument("--output_dir", help="folder to write (default: <workspace>/candidate_heads)")
    parser.add_argument("--num_prompts", type=int, default=512, help="training prompts to answer (default: 512)")
    parser.add_argument(
        "--betas", type=float, nargs="+", default=[0.0, 4.0], help="strengths, a batch each (default: 0 4)"
    )
    parser.add_argument("--rank", type=int, default=64, help="of the form of state and candidate (default: 64)")
    parser.add_argument("--num_epochs", type=int, default=12, help="passes over the states (default: 12)")
    parser.add_argument("--batch_size", type=int, help="prompts at a time (default: the configuration's)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and the fit (default: 0)")
    cli.add_common(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(args)
    dataset = config.dataset(args.dataset)
    objectives = cli.objectives_of(dataset, args.objective)
    for flag in ("num_prompts", "rank", "num_epochs"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.value_model_iter < 0:
        raise UsageError(f"--value_model_iter must be at least 0, got {args.value_model_iter}")
    betas = [cli.check_beta(beta) for beta in args.betas]
    output = args.output_dir or str(config.default_path("candidate_heads"))
    folders = {n: value_model_folder(config, args.value_model_dir, args.value_model_iter, n) for n in objectives}
    made_by = {n: value_model_command(config, n, folders[n]) for n in objectives}
    if args.dry_run:
        rows = [(f"value model of {n}", str(folders[n]), cli.found(str(folders[n]), made_by[n])) for n in objectives]
        cli.report_dry_run([*rows, ("candidate heads", output, "made by this command")])
        return 0
    for name in objectives:
        check_adapter_folder(folders[name], f"value model of {name}", made_by[name])

    from utils import candidates, models
    from utils.cached_models import attended_length
    from utils.data import encode_prompts, prompts_csv, read_prompts
    from utils.provenance import fingerprint
    from utils.tracking import Tracker
    from utils.value_models import load_value_models

    device = models.pick_device(args.device)
    reference, tokenizer = models.load_reference(config, dataset, device)
    iterations = dict.fromkeys(objectives, args.value_model_iter)
    size = models.vocabulary_size(reference)
    value_models = load_value_models(config, args.value_model_dir, iterations, tokenizer, size, device)
    texts = read_prompts(prompts_csv(config, dataset, "train"), config)[: args.num_prompts]
    contexts = filter(None, map(attended_length, (reference, *value_models.values())))
    room = min(contexts, default=1 << 30) - dataset.max_new_tokens
    decoding = config.decoding
    seen = candidates.watch(
        reference, value_models, encode_prompts(dataset, tokenizer, texts, room), betas=betas, top_k=decoding.top_k,
        temperature=decoding.temperature, normalization=decoding.normalization, max_new_tokens=dataset.max_new_tokens,
        eos_token_id=models.stop_tokens(reference, tokenizer), batch_size=args.batch_size or decoding.batch_size,
        seed=args.seed,
    )  # fmt: skip
    with Tracker(args.wandb, "fit_candidate_heads", settings={"objectives": objectives}) as tracker:
        for name in objectives:
            embeddings = models.input_embeddings(value_models[name])
            tensors, report = candidates.fit_candidate_head(
                seen.states[name], seen.token_ids, seen.scores[name], seen.prompt, embeddings,
                rank=args.rank, epochs=args.num_epochs, seed=args.seed,
            )  # fmt: skip
            path = candidate_head_path(output, args.value_model_iter, name)
            candidates.save_candidate_head(path, tensors, report, fingerprint(folders[name]))
            tracker.summary({name: report})
            print(
                f"{name}: correlation with the value model over a state's candidates {report['correlation']:.3f} on "
                f"{report['held_out_states']} held-out states (a token table {report['correlation_table']:.3f}, the "
                f"head without context {report['correlation_frozen_state']:.3f}); saved {path}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
