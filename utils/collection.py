"""Collecting trees into a data folder: what is there is skipped, what is missing is grown, nothing is half-written."""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import cli
from utils.errors import DataError, UsageError
from utils.specs import Config, DatasetSpec
from utils.trees import Tree

if TYPE_CHECKING:
    from utils.growth import TreeShape

CHUNK = 64  # prompts whose trees grow together: what a process takes at a time, and may lose when it is killed


def add_collection_arguments(parser: ArgumentParser, *, num_default: str = "") -> None:
    """The arguments that all data collection shares; `num_default` says what NUM is where it may be left out."""
    parser.add_argument("start", metavar="START", type=int, help="index of the first prompt")
    optional = {"nargs": "?"} if num_default else {}
    default = f" (default: {num_default})" if num_default else ""
    parser.add_argument("num", metavar="NUM", type=int, help=f"number of prompts{default}", **optional)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="anthropic", help="a data set of the configuration (default: anthropic)")
    group.add_argument("--data_split", default="train", help="which split's prompts (default: train)")
    group.add_argument(
        "--output_dir", type=Path, help="folder of the trees (default: below <workspace>/tree_data/<dataset>)"
    )
    group = parser.add_argument_group("trees")
    group.add_argument("--root_children", type=int, help="children of the root")
    group.add_argument("--non_root_children", type=int, help="children of every other inner node")
    group.add_argument("--num_layers", type=int, help="layers below the root")
    group.add_argument(
        "--max_new_tokens", type=int, help="tokens from the prompt's end to a leaf (default: the data set's)"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=float, help="divides the logits (default: the configuration's)")
    group.add_argument("--topk", type=int, help="candidates per step (default: the configuration's)")
    group.add_argument("--seed", type=int, default=0, help="base seed (default: 0)")
    group.add_argument(
        "--seed_increment", type=int, default=0, help="added to the seed, for another set of trees (default: 0)"
    )
    group.add_argument("--batch_size", type=int, help="segments that grow at a time (default: the configuration's)")
    cli.add_graphs_argument(group)
    group.add_argument(
        "--chunk",
        type=int,
        default=CHUNK,
        help=f"prompts whose trees grow together, and what one of several processes takes at a time (default: {CHUNK})",
    )
    cli.add_common(parser)


def dry_run(config: Config, dataset: DatasetSpec, args: Namespace, output_dir: Path, more=()) -> int:
    """Print what the collection would load."""
    from utils.data import prompts_csv
    from utils.places import prompts_command, reference_path

    check_arguments(dataset, args)
    csv = prompts_csv(config, dataset, args.data_split)
    reference, made_by = reference_path(config, dataset)
    cli.report_dry_run(
        [
            ("reference", reference, cli.found(reference, made_by)),
            ("prompts", str(csv), cli.found(str(csv), prompts_command(dataset.name, args.data_split, config))),
            *more,
            ("trees", str(output_dir), "made by this stage"),
        ]
    )
    return 0


def check_arguments(dataset: DatasetSpec, args: Namespace) -> None:
    """Raise a UsageError (or a ConfigError for the split) unless every number can be meant."""
    from utils.data import split_source

    split_source(dataset, args.data_split)
    if args.start < 0 or args.num < 1:
        raise UsageError(f"START must be at least 0 and NUM at least 1, got {args.start} {args.num}")
    for name in ("root_children", "non_root_children", "num_layers", "max_new_tokens", "topk", "batch_size", "chunk"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    cli.check_graphs(args.cuda_graphs, args.device)
    if args.temperature is not None and not (math.isfinite(args.temperature) and args.temperature > 0):
        raise UsageError(f"--temperature must be a finite number above 0, got {args.temperature}")


def rounded(tree: Tree) -> Tree:
    """The tree as it is kept: log-ratios as far as they do not depend on which trees grew beside it."""
    from utils.completions import LOG_RATIO_DECIMALS

    return replace(tree, log_ratio=np.round(tree.log_ratio, LOG_RATIO_DECIMALS))


@dataclass(frozen=True)
class Plan:
    """What a command grows.

    Attributes:
        texts: the split's prompts; wanted: the indices that the command names.
        made_with: what the folder records, and what another command must have to add to it.
        growth: arguments of `grow_trees` that all its calls share.
    """

    shape: TreeShape
    temperature: float
    top_k: int
    texts: Sequence[str]
    wanted: Sequence[int]
    made_with: Mapping
    growth: Mapping


def plan_of(config: Config, dataset: DatasetSpec, args: Namespace, shape: Mapping, policy: Mapping) -> Plan:
    """The command line, resolved; arguments as in `collect`."""
    from utils.data import prompts_csv, read_prompts
    from utils.growth import TreeShape
    from utils.provenance import fingerprint

    check_arguments(dataset, args)
    given = {k: getattr(args, k) for k in ("root_children", "non_root_children", "num_layers", "max_new_tokens")}
    given = {k: v for k, v in given.items() if v is not None}
    tree_shape = TreeShape(**{"max_new_tokens": dataset.max_new_tokens, **shape, **given})
    temperature = config.decoding.temperature if args.temperature is None else args.temperature
    top_k = config.decoding.top_k if args.topk is None else args.topk
    seed = args.seed + args.seed_increment
    texts = read_prompts(prompts_csv(config, dataset, args.data_split), config)
    if args.start >= len(texts):
        raise DataError(
            f"START {args.start} is behind the last of the {len(texts)} prompts of {dataset.name} {args.data_split}"
        )
    made_with = {
        **policy,
        "reference": fingerprint(config.sft_path(dataset)),
        "dataset": dataset.name,
        "data_split": args.data_split,
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
        **{name: value for name, value in vars(tree_shape).items() if value is not False},
    }
    batch_size = config.decoding.batch_size if args.batch_size is None else args.batch_size
    wanted = range(args.start, min(args.start + args.num, len(texts)))
    return Plan(tree_shape, temperature, top_k, texts, wanted, made_with, {"seed": seed, "batch_size": batch_size})


class Grower:
    """Grows trees into a folder, and counts what one process grew."""

    def __init__(self, plan: Plan, output_dir: Path, known: Collection[int], bar):
        self.plan, self.output_dir, self.known, self.bar = plan, output_dir, frozenset(known), bar
        self.began, self.tokens, self.grown, self.discarded = time.time(), 0, 0, 0

    def load(self, config: Config, dataset: DatasetSpec, args: Namespace, build: Callable) -> None:
        """Load the policy, and encode the prompts that are missing.

        Raises:
            DataError: no room for a prompt.
        """
        from utils.data import encode_prompts
        from utils.graphs import graphs_for
        from utils.models import load_reference, pick_device, stop_tokens

        plan, device = self.plan, pick_device(args.device)
        graphs = graphs_for(device, args.cuda_graphs, config.decoding.cuda_graphs)
        reference, tokenizer = load_reference(config, dataset, device)
        self.policy = build(reference, tokenizer, device, plan.top_k, plan.temperature)
        self.policy.graphs = graphs
        self.eos_token_id = stop_tokens(reference, tokenizer)
        room = None if self.policy.context is None else self.policy.context - plan.shape.max_new_tokens
        if room is not None and room < 1:
            raise DataError(
                f"--max_new_tokens {plan.shape.max_new_tokens} leaves no room for a prompt: the models attend to "
                f"{self.policy.context} tokens"
            )
        missing = [i for i in plan.wanted if i not in self.known]
        texts = [plan.texts[i] for i in missing]
        self.encoded = dict(zip(missing, encode_prompts(dataset, tokenizer, texts, room), strict=True))

    def lacking(self, unit: Sequence[int]) -> list[int]:
        """The prompts of a unit that no process has done."""
        from utils.hdf5_utils import tree_path

        return [i for i in unit if i not in self.known and tree_path(self.output_dir, i) is None]

    def has(self, unit: Sequence[int]) -> bool:
        """Whether nothing is left to do of a unit."""
        return not self.lacking(unit)

    def grow(self, unit: Sequence[int]) -> None:
        """Grow and write the trees of a unit's prompts, as far as they are lacking."""
        from utils.growth import grow_trees
        from utils.hdf5_utils import write_discarded, write_tree

        for tree in grow_trees(
            self.policy,
            {i: self.encoded[i] for i in self.lacking(unit)},
            dict(enumerate(self.plan.texts)),
            self.plan.shape,
            eos_token_id=self.eos_token_id,
            on_tokens=self._count,
            **self.plan.growth,
        ):
            if tree.depth.max() < min(2, self.plan.shape.num_layers):
                self.discarded += 1
                write_discarded(self.output_dir, tree.prompt_index, tree.prompt, "no segment reached a second layer")
            else:
                self.grown += 1
                write_tree(self.output_dir, rounded(tree))
            self.bar.update(1)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self.bar.tokens(tokens)

    def figures(self) -> dict[str, float]:
        """What was grown until now."""
        rate = self.tokens / max(time.time() - self.began, 1e-9)
        return {
            "trees": self.grown, "discarded": self.discarded, "tokens": self.tokens, "tokens_per_second": rate,
        }  # fmt: skip

    def __str__(self) -> str:
        figures, seconds = self.figures(), time.time() - self.began
        return (
            f"{self.grown} trees grown, {self.discarded} discarded (no second layer), {self.tokens} tokens in "
            f"{seconds:.0f} s ({figures['tokens_per_second']:.0f} tokens/s)"
        )


def collect(
    config: Config,
    dataset: DatasetSpec,
    args: Namespace,
    output_dir: Path,
    *,
    shape: Mapping,
    policy: Mapping,
    build: Callable,
) -> int:
    """Grow the trees of prompts START .. START + NUM - 1 that a folder does not have yet.

    Several processes share the range, `--chunk` prompts at a time; the first of them brings the tokens together.

    Args:
        shape: TreeShape's fields; arguments that were given override them.
        policy: what the folder records of the policy; another policy's folder is refused.
        build: (reference, tokenizer, device, top_k, temperature) -> policy.

    Raises:
        UsageError, DataError: a range without prompts, a folder made with other arguments, a prompt without room.
    """
    from utils.hdf5_utils import claim_collection, consolidate, stored_indices
    from utils.sharding import Alone, chunks, claims_of, forget, share, this_process
    from utils.tracking import Tracker

    process, plan = this_process(), plan_of(config, dataset, args, shape, policy)
    claim_collection(output_dir, plan.made_with, only_check=True)
    if output_dir.is_dir() and process.first:
        consolidate(output_dir)  # a damaged store is found now, not behind hours of growth
    known = set(stored_indices(output_dir))
    missing = sum(i not in known for i in plan.wanted)
    bar, tracker = cli.progress(total=missing, desc="trees", unit="prompt"), Tracker(False, "")
    grower = Grower(plan, output_dir, known, bar)
    if missing:
        grower.load(config, dataset, args, build)
        wandb, name = args.wandb and process.first, f"trees_{output_dir.name}"
        tracker = Tracker(wandb, f"trees_{policy['policy']}", name, plan.made_with)
        claim_collection(output_dir, plan.made_with)  # not before everything is loaded: a failure leaves no folder
    claimed = output_dir / "claims" / f"{args.start}-{args.num}-{args.chunk}"
    try:
        with claims_of(process, claimed) if missing else Alone() as claims:
            units = chunks(list(plan.wanted), args.chunk)
            for unit in share(units, done=grower.has, claims=claims, wait=process.first):
                grower.grow(unit)
                tracker.log(grower.figures())
        if process.first:
            forget(claimed)
    finally:
        bar.close()
        total = consolidate(output_dir) if process.first else 0
        tracker.summary({"trees_in_folder": total})
        tracker.finish()
    if process.first:
        print(f"{f'{process}: ' if process.several else ''}{grower}; {output_dir} holds {total} trees")
    return 0
