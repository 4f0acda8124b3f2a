#!/usr/bin/env python
"""What each stage costs at the paper's scale and at ten times it: tokens, operations, bytes, GPU-hours.

    python benchmarks/cost_model.py                                          # prints; --output writes the JSON too
    python benchmarks/cost_model.py --peak 312e12 --bandwidth 2.0e12         # an A100

Arithmetic, not a measurement. Lengths of segments are drawn as `utils.growth` draws them, answers end with a constant
chance per token, and every pass is counted by `utils.costs`. A stage's time is

    seconds = operations / (peak * compute fraction) + bytes / (bandwidth * bandwidth fraction) + layer calls * overhead

where bytes are the weights, read once a pass, and the keys and values that are read. The three parts are added, as if
nothing overlapped. Reward models run in float32, and so does value training whose configuration does not say bf16;
their operations have a peak of their own. Below the table the same formula is held against what was measured with
SmolLM2-135M on two CPU cores: its two rates are fitted to benchmarks/results/decode_smollm_cpu.json alone, so that the
rest is a prediction.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import keep
from utils import cli
from utils.config import load_config
from utils.costs import (
    Shape,
    adapter_parameters,
    attention_flops,
    cache_bytes,
    forward_flops,
    matrix_parameters,
    shape_of,
    training_flops,
)
from utils.errors import DataError, UsageError
from utils.prefix_tree import pack
from utils.specs import Config, DatasetSpec
from utils.trees import Tree

GPT2_LARGE = Shape(36, 1280, 20, 20, 64, 5120, 2, 50257)
# For models that need not be here: what their configurations on the Hub say. The humour and faithfulness rewards are
# taken to be a DistilBERT and a BART-base.
SHAPES = {
    "meta-llama/Llama-2-7b-hf": Shape(32, 4096, 32, 32, 128, 11008, 3, 32000),
    "TinyLlama/TinyLlama_v1.1": Shape(22, 2048, 32, 4, 64, 5632, 3, 32000),
    "Ray2333/gpt2-large-helpful-reward_model": GPT2_LARGE,
    "Ray2333/gpt2-large-harmless-reward_model": GPT2_LARGE,
    "mohameddhiab/humor-no-humor": Shape(6, 768, 12, 12, 64, 3072, 2, 30522, causal=False),
    "Tristan/gpt2_reward_summarization": Shape(12, 768, 12, 12, 64, 3072, 2, 50257),
    "CogComp/bart-faithful-summary-detector": Shape(6, 768, 12, 12, 64, 3072, 2, 50265, encoder_layers=6),
}
SMOLLM2 = Shape(30, 576, 9, 3, 64, 1536, 3, 49152)
MINILM = Shape(6, 384, 12, 12, 32, 1536, 2, 30522, causal=False)
PASS_TOKENS = 8192  # of prefills, of reward models' batches and of value training's passes
TREES = 200  # that are drawn for the means of a data set
MEASURED = ROOT / "benchmarks" / "results"


# -------------------------------------------------------------------------------------------------------------- trees


def end_rate(mean_tokens: float, max_tokens: int) -> float:
    """The chance of ending at each token for which answers of at most `max_tokens` have that mean, by bisection."""
    if mean_tokens >= max_tokens:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 - (1 - middle) ** max_tokens) / middle > mean_tokens:
            low = middle
        else:
            high = middle
    return low


def drawn_tree(shape, prompt_tokens: int, ending: float, seed: int, index: int) -> Tree:
    """A tree with the segment lengths of `utils.growth` for that seed and prompt index, and tokens that are all 0.

    Args:
        shape: a TreeShape without dynamic splitting.
        ending: the chance that a token ends the text; for 0 it has exactly the lengths of a tree that is grown without
            an end-of-sequence token.
    """
    from utils.growth import segment_length

    parent, tokens, finished = [-1], [np.zeros(prompt_tokens, np.int32)], [False]
    level = [((), 0, 0)]  # (path, node, tokens below the prompt)
    for layer in range(shape.num_layers):
        below = []
        for path, node, used in level:
            for child in range(shape.non_root_children if path else shape.root_children):
                key = (seed, index, *path, child)
                budget = segment_length(shape.max_new_tokens - used, layer, shape.num_layers, key)
                ends = np.random.default_rng([*key, 7]).geometric(ending) if ending else math.inf
                length = int(min(budget, ends))
                parent.append(node)
                tokens.append(np.zeros(length, np.int32))
                finished.append(ends <= budget)
                if not finished[-1] and used + length < shape.max_new_tokens:
                    below.append(((*path, child), len(parent) - 1, used + length))
        level = below
    return Tree(np.array(parent, np.int64), tokens, np.zeros(len(parent)), finished=np.array(finished),
                prompt_index=index)  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Tokens of a tree.

    Attributes:
        prompt: read once. generated: of all segments. contexts: (generated,) tokens before each one.
        leaves: (n,) tokens of each leaf's text, prompt included; nodes: (N - 1,) those of each node's path;
        deepest: (N - 1,) whether the node is in the tree's deepest layer.
        rows: (r,) tokens of the rows in which a decoder reads the leaves, what they share once (`prefix_tree`).
    """

    prompt: int
    contexts: np.ndarray
    leaves: np.ndarray
    nodes: np.ndarray
    deepest: np.ndarray
    rows: np.ndarray

    @property
    def generated(self) -> int:
        return len(self.contexts)


def counts_of(tree: Tree) -> Counts:
    """What a tree of real or of drawn tokens comes to."""
    own = np.array([len(t) for t in tree.tokens])
    paths = own.copy()
    for node in range(1, len(tree)):
        paths[node] += paths[tree.parent[node]]
    contexts = [np.arange(paths[n] - own[n], paths[n]) for n in range(1, len(tree))]
    depth = tree.depth
    # Every token another one: no two siblings begin alike, and a drawn tree's tokens are all 0.
    numbered = replace(tree, tokens=np.split(np.arange(own.sum()), own.cumsum()[:-1]))
    rows = pack([numbered.path_tokens(leaf).tolist() for leaf in tree.leaves])
    return Counts(int(own[0]), np.concatenate(contexts), paths[tree.leaves], paths[1:], depth[1:] == depth.max(),
                  np.array([len(row.tokens) for row in rows]))  # fmt: skip


def mean_counts(shape, prompt_tokens: int, ending: float, number: int = TREES, seed: int = 0) -> list[Counts]:
    return [counts_of(drawn_tree(shape, prompt_tokens, ending, seed, i)) for i in range(number)]


# --------------------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class Work:
    """Tokens that are read or generated, operations in half and in full precision, bytes that are moved, layers that
    are called, bytes on disk."""

    tokens: float = 0.0
    flops: float = 0.0
    flops32: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, factor: float) -> Work:
        return Work(*(factor * a for a in vars(self).values()))

    def in_float32(self) -> Work:
        return replace(self, flops=0.0, flops32=self.flops + self.flops32, bytes=2 * self.bytes)


@dataclass(frozen=True)
class Device:
    """Rates that are reached, not peaks: operations in half and in full precision and bytes per second; seconds of one
    layer's call beside them."""

    name: str
    rate: float
    rate32: float
    bandwidth: float
    overhead: float = 0.0

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds, by what they go to."""
        return {
            "compute": work.flops / self.rate + work.flops32 / self.rate32,
            "memory": work.bytes / self.bandwidth,
            "launches": work.calls * self.overhead,
        }

    def seconds(self, work: Work) -> float:
        return sum(self.parts(work).values())


def weight_bytes(shape: Shape, num_layers: int | None = None, head: bool = False) -> float:
    """Of a pass in two bytes a parameter."""
    return 2.0 * matrix_parameters(shape, num_layers=num_layers, head=head)


def layers_of(shape: Shape, num_layers: int | None) -> int:
    return (shape.layers if num_layers is None else num_layers) + shape.encoder_layers


def texts_read(shape: Shape, lengths: Iterable[float], *, num_layers: int | None = None, head: bool = False) -> Work:
    """Whole texts, in passes of `PASS_TOKENS` tokens without padding; `head`: one token's logits of each."""
    lengths = list(lengths)
    flops = sum(forward_flops(shape, n, num_layers=num_layers, head_tokens=head) for n in lengths)
    passes = max(1, math.ceil(sum(lengths) / PASS_TOKENS))
    moved = passes * weight_bytes(shape, num_layers, head)
    return Work(tokens=sum(lengths), flops=flops, bytes=moved, calls=passes * layers_of(shape, num_layers))


def steps(
    shape: Shape,
    contexts: np.ndarray,
    rows: float,
    *,
    candidates: int = 1,
    num_layers: int | None = None,
    head: bool = True,
) -> Work:
    """Decoding: each token (or its k candidates) behind its context, `rows` texts at a time, each cache read once.

    Args:
        contexts: (n,) tokens before each of the n tokens.
    """
    n, seen = len(contexts), float(np.sum(contexts) + len(contexts))
    linear = 2 * matrix_parameters(shape, num_layers=num_layers, head=head) * n * candidates
    flops = linear + attention_flops(shape, candidates * seen, num_layers=num_layers)
    calls = n / rows
    moved = calls * weight_bytes(shape, num_layers, head) + cache_bytes(shape, seen, num_layers=num_layers)
    return Work(tokens=n * candidates, flops=flops, bytes=moved, calls=calls * layers_of(shape, num_layers))


# ------------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Scale:
    """What the configuration does not say: lengths and amounts. `occupancy`: the share of rows that are filled."""

    prompt_tokens: int
    answer_tokens: float
    occupancy: float = 0.85
    factor: int = 1
    points: int = 6
    betas: int = 3


@dataclass(frozen=True)
class Models:
    """Shapes of a data set's models; `rewards` are passes over a text: (shape, layers, whether the leaves of a tree
    share what they have in common: the reward is a decoder whose text ends with the response)."""

    reference: Shape
    value: Shape
    value_layers: int | None
    rewards: tuple[tuple[Shape, int | None, bool], ...]


def collection(dataset: DatasetSpec, models: Models, batch_size: int, scale: Scale, counts: Sequence[Counts]) -> Work:
    """Trees: each prompt read once, then a step per token; the last token of a text is read too where it has children.

    On disk: four bytes a token, and a line of JSON with about 40 bytes a node.
    """
    trees = scale.factor * dataset.trees.num_prompts
    rows = batch_size * scale.occupancy
    grown = steps(models.reference, np.concatenate([c.contexts for c in counts]), rows)
    read = texts_read(models.reference, [c.prompt for c in counts], head=True)
    stored = sum(4 * (c.prompt + c.generated) + 40 * len(c.nodes) for c in counts)
    return (grown + read + Work(disk=stored)).times(trees / len(counts))


def labelling(dataset: DatasetSpec, models: Models, scale: Scale, counts: Sequence[Counts]) -> Work:
    """The leaves' texts, once for each reward model, in float32 (--bf16 is faster). Where they share what they have in
    common, the mask of a row is dense: its attention is between all pairs."""
    work = Work()
    for shape, layers, shared in models.rewards:
        if shared:
            work += texts_read(
                replace(shape, causal=False), np.concatenate([c.rows for c in counts]), num_layers=layers
            )
        else:
            work += texts_read(shape, np.concatenate([c.leaves for c in counts]), num_layers=layers)
    return work.in_float32().times(scale.factor * dataset.trees.num_prompts / len(counts))


def training(
    dataset: DatasetSpec, models: Models, rank: int, scale: Scale, counts: Sequence[Counts], packing: str | None = None
) -> Work:
    """One objective's value model: an adapter, by paths as published or by whole trees, and its evaluations.

    Evaluations are ten an epoch, but at most a fifth of the training (`value_training.VALIDATION_SHARE`): a fifth is
    taken. A step of `batch_size` nodes reads the weights three times.
    """
    spec, trees = dataset.training, scale.factor * dataset.trees.num_prompts - dataset.num_val_prompts
    work = Work()
    for c in counts:
        chosen = np.where(c.deepest, spec.deepest_fraction, 1.0)
        if (packing or spec.packing) == "node":
            flops = sum(
                w * training_flops(models.value, n, num_layers=models.value_layers, rank=rank)
                for n, w in zip(c.nodes, chosen, strict=True)
            )
            tokens = float(c.nodes @ chosen)
        else:  # a tree's tokens once, each seeing its own path
            tokens = float(c.prompt + c.generated)
            pairs = float(np.sum(c.contexts) + c.generated + c.prompt * (c.prompt + 1) / 2)
            straight = training_flops(models.value, tokens, num_layers=models.value_layers, rank=rank)
            layers = models.value_layers
            more = attention_flops(models.value, tokens * (tokens + 1) / 2 - pairs, num_layers=layers)
            flops = straight - 3 * more
        updates = float(chosen.sum()) / spec.batch_size
        moved = 3 * updates * weight_bytes(models.value, models.value_layers)
        calls = 3 * updates * layers_of(models.value, models.value_layers)
        work += Work(tokens=tokens, flops=flops, bytes=moved, calls=calls)
    work = work if spec.bf16 else work.in_float32()
    size = 4.0 * adapter_parameters(models.value, rank, num_layers=models.value_layers)
    return work.times(1.2 * max(1, spec.num_epochs) * trees / len(counts)) + Work(disk=size)


def answers(
    models: Models, batch_size: int, prompt_tokens: int, lengths: Sequence[int], *, value_models: float, top_k: int,
    occupancy: float = 1.0,
) -> Work:  # fmt: skip
    """Answers of given lengths, steered by so many value models (each its own backbone), and their rewards apart."""
    rows = batch_size * occupancy
    contexts = np.concatenate([prompt_tokens + np.arange(n) for n in lengths])
    rereads = np.concatenate([prompt_tokens + np.arange(n - 1) for n in lengths])  # the last token is never read
    prompts = [prompt_tokens] * len(lengths)
    work = texts_read(models.reference, prompts, head=True) + steps(models.reference, rereads, rows)
    if value_models:
        layers = models.value_layers
        one = texts_read(models.value, prompts, num_layers=layers)
        one += steps(models.value, contexts, rows, candidates=top_k, num_layers=layers, head=False)
        work += one.times(value_models)
    return work


def evaluation(
    config: Config, dataset: DatasetSpec, models: Models, scale: Scale, *, value_models: float, points: int
) -> Work:
    """So many points of a front, each prompts times trials answers, scored by every reward; 2 kB a row on disk."""
    spec = config.evaluation
    number = spec.num_prompts * spec.num_trials * scale.factor
    lengths = [round(scale.answer_tokens)] * number
    work = answers(models, config.decoding.batch_size, scale.prompt_tokens, lengths, value_models=value_models,
                   top_k=config.decoding.top_k, occupancy=scale.occupancy)  # fmt: skip
    for shape, layers, _ in models.rewards:  # what a prompt's trials share is left out
        work += texts_read(shape, [scale.prompt_tokens + n for n in lengths], num_layers=layers).in_float32()
    return (work + Work(disk=2000.0 * number)).times(points)


def shape_at(config: Config, path: str) -> Shape:
    """The shape of a model that is here, else of a published one.

    Raises:
        DataError: neither.
    """
    folder = Path(config.locate(path))
    if (folder / "config.json").is_file():
        from transformers import AutoConfig

        return shape_of(AutoConfig.from_pretrained(folder))
    if path not in SHAPES:
        raise DataError(f"no config.json in {folder}, and the shape of {path!r} is not in SHAPES of {__file__}")
    return SHAPES[path]


def models_of(config: Config, dataset: DatasetSpec) -> Models:
    rewards = []
    for spec in map(config.objective, dataset.objectives):
        if spec.kind == "classifier":
            shape = shape_at(config, spec.path)
            shared = shape.causal and not shape.encoder_layers and spec.text.endswith("{response}")
            rewards.append((shape, None, shared))
    value = config.value_model
    return Models(
        shape_at(config, config.base_model.path), shape_at(config, value.path), value.num_layers, tuple(rewards)
    )


def stages(config: Config, dataset: DatasetSpec, scale: Scale) -> dict[str, Work]:
    """{stage: its work} of a data set, in the order of the stages; objectives and fronts of pairs together."""
    from utils.growth import TreeShape

    models, t = models_of(config, dataset), dataset.trees
    shape = TreeShape(t.root_children, t.non_root_children, t.num_layers, dataset.max_new_tokens)
    counts = mean_counts(shape, scale.prompt_tokens, end_rate(scale.answer_tokens, dataset.max_new_tokens))
    objectives, rank = len(dataset.objectives), config.value_model.lora.r
    pairs = objectives * (objectives - 1) // 2
    inner = scale.points - 2  # with two value models; the ends have one
    steered = evaluation(config, dataset, models, scale, value_models=2, points=inner)
    steered += evaluation(config, dataset, models, scale, value_models=1, points=2)
    as_trees = training(dataset, models, rank, scale, counts, packing="tree")
    return {
        "trees": collection(dataset, models, config.decoding.batch_size, scale, counts),
        "labels": labelling(dataset, models, scale, counts),
        f"value models ({objectives}), paths": training(dataset, models, rank, scale, counts).times(objectives),
        f"value models ({objectives}), --packing tree": as_trees.times(objectives),
        f"fronts ({pairs} x {scale.points} weights x {scale.betas} betas)": steered.times(pairs * scale.betas),
        "the reference": evaluation(config, dataset, models, scale, value_models=0, points=1),
    }


# -------------------------------------------------------------------------------------------------------------- check


def smollm() -> Models:
    """The small world: 12 layers of the reference as value model; one pass for three rewards, and MiniLM for one."""
    return Models(SMOLLM2, SMOLLM2, 12, ((SMOLLM2, 12, True),))


def benchmark_work(method: str, batch_size: int, settings: dict, value_layers: int) -> tuple[Work, int]:
    """What a row of benchmarks/decode.py does, and the tokens that it counts."""
    from utils.growth import TreeShape

    models = replace(smollm(), value_layers=value_layers)
    prompt, new = settings["prompt_tokens"], settings["max_new_tokens"]
    if method == "trees":
        number = max(1, round(2 * batch_size / 4))
        counts = mean_counts(TreeShape(4, 2, 3, new), prompt, 0.0, number)
        work = steps(SMOLLM2, np.concatenate([c.contexts for c in counts]), batch_size)
        return work + texts_read(SMOLLM2, [prompt] * number, head=True), sum(c.generated for c in counts)
    number = {"reference": 0, "mavis_1": 1, "mavis_3": 3}[method]
    lengths = [new] * batch_size
    work = answers(models, batch_size, prompt, lengths, value_models=number, top_k=settings["topk"])
    return work, new * batch_size


def fitted_device(rows: Sequence[tuple[Work, float]], name: str) -> Device:
    """The two rates whose predicted seconds are nearest to the measured ones, in their logarithms."""
    operations, moved, seconds = (np.array(x) for x in zip(*((w.flops, w.bytes, s) for w, s in rows), strict=True))
    rates, bandwidths = np.geomspace(1e9, 1e13, 400), np.geomspace(1e9, 1e12, 300)
    predicted = operations / rates[:, None, None] + moved / bandwidths[None, :, None]  # (rates, bandwidths, rows)
    error = np.square(np.log(predicted / seconds)).mean(-1)
    i, j = np.unravel_index(error.argmin(), error.shape)
    return Device(name, float(rates[i]), float(rates[i]), float(bandwidths[j]))


def check(folder: Path = MEASURED) -> dict:
    """The formula against the small world's measurements: {device, rows of (what, measured, predicted, ratio)}."""
    from utils.growth import TreeShape

    measured = json.loads((folder / "decode_smollm_cpu.json").read_text())
    ours = [r for r in measured["rows"] if r["method"] in ("reference", "mavis_1", "mavis_3", "trees")]
    works = [benchmark_work(r["method"], r["batch_size"], measured["settings"], 8) for r in ours]
    taken = [n / r["tokens_per_second"] for (_, n), r in zip(works, ours, strict=True)]
    cpu = fitted_device([(w, s) for (w, _), s in zip(works, taken, strict=True)], measured["device"])
    rows = [
        ("fitted", f"{r['method']}, batch {r['batch_size']}", s, cpu.seconds(w))
        for r, (w, _), s in zip(ours, works, taken, strict=True)
    ]
    pooled = json.loads((folder / "decode_smollm_pooled_cpu.json").read_text())
    for r in pooled["rows"]:
        if r["method"] == "mavis_3":  # value models that share a backbone are read once
            work, tokens = benchmark_work("mavis_1", r["batch_size"], pooled["settings"], 12)
            what = f"mavis_3 pooled, 12 layers, batch {r['batch_size']}"
            rows.append(("predicted", what, tokens / r["tokens_per_second"], cpu.seconds(work)))
    # docs/results/smollm.md: on the quiet machine. Prompts of the small world have about 35 tokens.
    prompt, trees = 35, mean_counts(TreeShape(4, 2, 3, 48), 35, end_rate(47.0, 48), 50)
    work = steps(SMOLLM2, np.concatenate([c.contexts for c in trees]), 64) + texts_read(SMOLLM2, [prompt] * 50)
    rows.append(("predicted", "50 trees of 4-2-2 children, 48 tokens", 57.0, cpu.seconds(work)))
    leaves = np.concatenate([c.leaves for c in trees])
    labels = texts_read(SMOLLM2, leaves, num_layers=12) + texts_read(MINILM, leaves - prompt)
    rows.append(("predicted", "their labels, four rewards, each text alone", 30.0, cpu.seconds(labels)))
    fit = json.loads((folder / "value_training_smollm_cpu.json").read_text())
    lengths = fit["tokens_node"] / fit["nodes"]
    ratio = training_flops(SMOLLM2, lengths, num_layers=8, rank=32) / forward_flops(SMOLLM2, lengths, num_layers=8)
    paths = fit["training_ms_per_node_node"] / fit["forward_ms_per_node_node"]
    rows.append(("predicted", "training over forward pass, paths (a ratio)", paths, ratio))
    rows.append(("predicted", "tokens of paths over tokens of trees (a ratio)", fit["training_ratio"],
                 fit["tokens_ratio"]))  # fmt: skip
    return {
        "device": {
            "name": cpu.name,
            "operations_per_second": round(cpu.rate),
            "bytes_per_second": round(cpu.bandwidth),
        },
        "rows": [
            {
                "kind": k,
                "what": w,
                "measured": round(m, 4),
                "model": round(p, 4),
                "ratio": round(p / m, 3),
            }
            for k, w, m, p in rows
        ],
    }


# --------------------------------------------------------------------------------------------------------------- main


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("device (the defaults: an H100 SXM in bfloat16)")
    group.add_argument("--peak", type=float, default=989e12, help="operations per second")
    group.add_argument("--peak32", type=float, default=67e12, help="operations per second in float32")
    group.add_argument("--compute_fraction", type=float, default=0.4, help="share of the peak that is reached")
    group.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second of the memory")
    group.add_argument("--bandwidth_fraction", type=float, default=0.6, help="share of it that is reached")
    group.add_argument(
        "--overhead", type=float, default=3.5e-4, help="seconds that one layer's call takes to be launched, eagerly"
    )
    group = parser.add_argument_group("world")
    group.add_argument("--prompt_tokens", default="anthropic=110,summary=330", help="mean tokens of the prompts")
    group.add_argument("--answer_share", type=float, default=0.8, help="mean answer over the longest one")
    group.add_argument("--occupancy", type=float, default=0.85, help="share of a batch's rows that are filled")
    group.add_argument("--points", type=int, default=6, help="weights of a front")
    group.add_argument("--betas", type=int, default=3, help="strengths of each")
    group.add_argument("--factors", type=int, nargs="+", default=[1, 10], help="times the paper's amounts")
    parser.add_argument("--output", type=Path, help="JSON file of everything that is printed")
    parser.add_argument("--config", default="paper_7b", help="configuration")
    return parser


def prompt_lengths(text: str) -> dict[str, int]:
    """`anthropic=110,summary=330` to a mapping."""
    try:
        return {name: int(number) for name, number in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UsageError(f"--prompt_tokens {text!r} must read <data set>=<tokens>,...") from None


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for name in ("compute_fraction", "bandwidth_fraction", "answer_share", "occupancy"):
        if not 0 < getattr(args, name) <= 1:
            raise UsageError(f"--{name} must be above 0 and at most 1, got {getattr(args, name)}")
    config = load_config(args.config)
    compute, memory = args.compute_fraction, args.bandwidth_fraction
    gpu = Device("GPU", args.peak * compute, args.peak32 * compute, args.bandwidth * memory, args.overhead)
    rows = []
    for factor in args.factors:
        for name, prompt_tokens in prompt_lengths(args.prompt_tokens).items():
            dataset = config.dataset(name)
            scale = Scale(prompt_tokens, args.answer_share * dataset.max_new_tokens, args.occupancy, factor,
                          args.points, args.betas)  # fmt: skip
            rows += [{"factor": factor, "dataset": name, "stage": stage, **figures(work, gpu)}
                     for stage, work in stages(config, dataset, scale).items()]  # fmt: skip
    record = {
        "assumed": {k: v for k, v in vars(args).items() if k not in ("output", "factors")},
        "rows": rows,
        "check": check(),
    }
    print_tables(record)
    keep(record, args.output)
    return 0


def figures(work: Work, gpu: Device) -> dict[str, float]:
    """A stage's numbers, and where its hours go."""
    hours = {name: seconds / 3600 for name, seconds in gpu.parts(work).items()}
    found = {
        "tokens": work.tokens, "flops": work.flops + work.flops32, "bytes_moved": work.bytes,
        "bytes_on_disk": work.disk, "gpu_hours": sum(hours.values()),
    }  # fmt: skip
    rounded = [{name: float(f"{x:.6g}") for name, x in part.items()} for part in (found, hours)]
    return {**rounded[0], "hours_of": rounded[1]}


def print_tables(record: dict) -> None:
    cells = [("times", "data set", "stage", "tokens", "operations", "moved", "on disk", "GPU-hours",
              "compute / memory / launches")]  # fmt: skip
    for r in record["rows"]:
        parts = " / ".join(f"{100 * h / r['gpu_hours']:.0f} %" for h in r["hours_of"].values())
        cells.append((r["factor"], r["dataset"], r["stage"], f"{r['tokens'] / 1e6:,.1f} M", f"{r['flops']:.2e}",
                      f"{r['bytes_moved'] / 1e12:,.0f} TB", f"{r['bytes_on_disk'] / 1e9:.2f} GB",
                      f"{r['gpu_hours']:,.1f}", parts))  # fmt: skip
    print("\n".join(cli.aligned(cells)))
    device = record["check"]["device"]
    print(
        f"\ncheck: {device['name']}, SmolLM2-135M; fitted: {device['operations_per_second'] / 1e9:.0f} G operations/s, "
        f"{device['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    rows = [("", "what", "measured", "model", "model / measured")]
    rows += [(r["kind"], r["what"], f"{r['measured']:.2f}", f"{r['model']:.2f}", f"{r['ratio']:.2f}")
             for r in record["check"]["rows"]]  # fmt: skip
    print("\n".join(cli.aligned(rows)))


if __name__ == "__main__":
    sys.exit(cli.run(main))
