"""Value training: seconds per node, reading each node's path (published) and reading each tree's tokens once.

    python benchmarks/value_training.py                       # SmolLM2's first 8 layers, CPU, about a minute
    python benchmarks/value_training.py --model tinyllama --device cuda --batch_size 32

Both ways take the same optimizer steps on the same nodes of synthetic trees (a model's weights do not change its
speed, so they are random); their runs alternate, and the ratio is of their medians. Prints a table; --output writes it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import in_turns, keep
from utils.cli import run

SHAPES = {  # hidden size, MLP size, layers, heads, key-value heads, vocabulary, LoRA rank and dropout
    "smollm": (576, 1536, 8, 9, 3, 49152, 32, 0.05),
    "tinyllama": (2048, 5632, 22, 32, 4, 32001, 128, 0.2),
    "test": (32, 64, 2, 4, 2, 64, 4, 0.0),
}
WHAT = {"training": "train", "forward": "forward"}  # what is measured: methods of `Reading`


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="smollm", help="shape of the value model")
    parser.add_argument("--trees", type=int, default=8, help="trees per run")
    parser.add_argument("--children", default="4,2,2", help="children of the root and of the nodes of each layer")
    parser.add_argument("--new_tokens", type=int, default=48, help="tokens from the root to a leaf")
    parser.add_argument("--prompt_tokens", default="10,60", help="shortest and longest prompt")
    parser.add_argument("--batch_size", type=int, default=28, help="nodes per optimizer step")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="where the device has it")
    parser.add_argument("--device", help="torch device (default: the first GPU, else the CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of the trees")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def make_trees(args, vocabulary: int) -> list:
    """Trees of random tokens whose leaves lie `new_tokens` below the root."""
    import numpy as np

    from utils.trees import Tree

    widths = [int(c) for c in args.children.split(",")]
    low, high = (int(c) for c in args.prompt_tokens.split(","))
    generator, trees = np.random.default_rng(args.seed), []
    for index in range(args.trees):
        parent, tokens, level = [-1], [generator.integers(3, vocabulary, generator.integers(low, high + 1))], [0]
        cuts = np.linspace(0, args.new_tokens, len(widths) + 1).round().astype(int)
        for width, length in zip(widths, np.diff(cuts), strict=True):
            level = [len(parent) + i for i in range(len(level) * width)]
            above = range(level[0] - len(level) // width, level[0])
            parent += [a for a in above for _ in range(width)]
            tokens += [generator.integers(3, vocabulary, length) for _ in level]
        values = {"reward": generator.normal(size=len(parent))}
        trees.append(Tree(np.array(parent), [t.astype(np.int32) for t in tokens], np.zeros(len(parent)), values,
                          prompt_index=index))  # fmt: skip
    return trees


def make_model(shape: tuple, device):
    """A value model of that shape (see `SHAPES`) with random weights, under a LoRA adapter."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from utils.specs import LoraSpec

    hidden, mlp, layers, heads, kv_heads, vocabulary, rank, dropout = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_labels=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, lora_dropout=dropout, modules_to_save=["score"],
                      target_modules=list(LoraSpec(1, 1).target_modules))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for a deprecated property
        return get_peft_model(LlamaForSequenceClassification(config), lora).to(device)


class Reading:
    """One way of reading the nodes (`packing`): the steps of an epoch, and a run over them."""

    def __init__(self, model, examples, packing: str, batch_size: int, bf16: bool, device):
        import numpy as np

        from utils.tree_layouts import make_units, unit_tokens
        from utils.value_training import plan_epoch

        self.model, self.examples, self.bf16, self.device = model, examples, bf16, device
        self.units = make_units(examples, packing, batch_size)
        self.lengths = np.array([unit_tokens(examples[i], nodes) for i, nodes in self.units])
        self.steps = plan_epoch(self.units, self.lengths, packing, batch_size, seed=0, epoch=0)

    def train(self) -> int:
        """Optimizer steps; returns the tokens read with their padding."""
        import torch

        from utils.specs import TrainingSpec
        from utils.value_training import add_gradients, make_optimizer

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.model, TrainingSpec(lr=1e-6))
        nodes = sum(len(x.nodes) for x in self.examples)
        self.model.train()
        for step in self.steps:
            picked = [self.units[u] for u in step]
            add_gradients(self.model, self.examples, picked, nodes, bf16=self.bf16, device=self.device)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.padded

    def forward(self) -> int:
        """The same nodes' values alone."""
        import torch

        from utils.node_values import node_values
        from utils.tree_layouts import collate, lay_out

        self.model.eval()
        for step in self.steps:
            layouts = [lay_out(self.examples[i], nodes) for i, nodes in (self.units[u] for u in step)]
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                node_values(self.model, collate(layouts, self.device))
        return self.padded

    @property
    def padded(self) -> int:
        return sum(len(step) * int(max(self.lengths[step])) for step in self.steps)


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    import torch

    from utils.models import has_bfloat16, pick_device
    from utils.tree_examples import make_examples, training_nodes

    device = pick_device(args.device)
    bf16 = args.bf16 and has_bfloat16(device)
    torch.manual_seed(0)
    model = make_model(SHAPES[args.model], device)
    trees = make_trees(args, model.config.vocab_size)
    examples = make_examples(trees, "reward", lambda tree: training_nodes(tree, 1.0, 0))
    nodes = sum(len(x.nodes) for x in examples)
    ways = {p: Reading(model, examples, p, args.batch_size, bf16, device) for p in ("node", "tree")}
    runs = {(what, p): getattr(way, WHAT[what]) for p, way in ways.items() for what in WHAT}
    seconds, read = in_turns(runs, args.repeats, device)

    result: dict = {"model": args.model, "device": str(device), "threads": torch.get_num_threads(), "bf16": bf16,
                    "nodes": nodes, "batch_size": args.batch_size, "torch": torch.__version__}  # fmt: skip
    if device.type == "cuda":
        result["device_name"] = torch.cuda.get_device_name(device)
    result |= {f"tokens_{p}": read["training", p] for p in ways}
    tokens = [result[f"tokens_{p}"] / nodes for p in ways]
    print(f"{nodes} nodes of {len(trees)} trees, {args.batch_size} nodes a step, {args.model} on {device}, bf16 {bf16}")
    print(f"{'':<12}{'one path per node':>20}{'one row per tree':>20}{'ratio':>8}")
    print(f"{'tokens/node':<12}{tokens[0]:>20.1f}{tokens[1]:>20.1f}{tokens[0] / tokens[1]:>8.2f}")
    for what in WHAT:
        node, tree = (statistics.median(seconds[what, p]) / nodes for p in ways)
        result |= {f"{what}_ms_per_node_node": node * 1e3, f"{what}_ms_per_node_tree": tree * 1e3}
        result[f"{what}_ratio"] = node / tree
        print(f"{what:<12}{node * 1e3:>17.2f} ms{tree * 1e3:>17.2f} ms{node / tree:>8.2f}")
    result["tokens_ratio"] = tokens[0] / tokens[1]
    keep(result, args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
