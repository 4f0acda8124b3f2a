"""Collecting trees into a data folder: what is there is skipped, what is missing is grown, nothing is half-written."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from utils import cli
from utils.config import Config, DatasetSpec
from utils.data import encode_prompts, prompts_csv, read_prompts
from utils.growth import TreeShape, grow_trees
from utils.hdf5_utils import claim_collection, consolidate, stored_indices, write_discarded, write_tree
from utils.models import load_reference, pick_device
from utils.policies import ReferencePolicy, _Policy

CHUNK = 64  # prompts whose trees grow together; bounds what a killed process loses


@dataclass
class Collection:
    """One command's share of a data folder."""

    policy: _Policy
    prompts: dict[int, list[int]]
    texts: dict[int, str]
    shape: TreeShape
    seed: int
    eos_token_id: int
    batch_size: int
    output_dir: Path

    @classmethod
    def under_reference(cls, config: Config, dataset: DatasetSpec, args: Namespace, output_dir: Path) -> Collection:
        """Trees under the reference policy, from `get_data_base.py`'s arguments."""
        given = {
            "root_children": args.root_children or dataset.trees.root_children,
            "non_root_children": args.non_root_children or dataset.trees.non_root_children,
            "num_layers": args.num_layers or dataset.trees.num_layers,
            "max_new_tokens": args.max_new_tokens or dataset.max_new_tokens,
        }
        shape = TreeShape(**given)
        temperature = args.temperature if args.temperature is not None else config.decoding.temperature
        top_k = args.topk if args.topk is not None else config.decoding.top_k
        seed = args.seed + args.seed_increment
        texts = read_prompts(prompts_csv(config, dataset, args.data_split))
        if args.start >= len(texts):
            raise cli.DataError(f"START {args.start} is behind the last of the {len(texts)} prompts of {dataset.name} {args.data_split}")
        claim_collection(
            output_dir,
            {
                "policy": "reference",
                "reference": config.sft_path(dataset),
                "dataset": dataset.name,
                "data_split": args.data_split,
                "temperature": temperature,
                "top_k": top_k,
                "seed": seed,
                **given,
            },
        )
        known = set(stored_indices(output_dir))
        missing = [i for i in range(args.start, min(args.start + args.num, len(texts))) if i not in known]
        if not missing:
            model = tokenizer = None
            policy, prompts = None, {}
        else:
            model, tokenizer = load_reference(config, dataset, pick_device(args.device))
            policy = ReferencePolicy(model, top_k=top_k, temperature=temperature)
            encoded = encode_prompts(dataset, tokenizer, [texts[i] for i in missing], policy.context)
            prompts = dict(zip(missing, encoded, strict=True))
        return cls(
            policy,
            prompts,
            dict(enumerate(texts)),
            shape,
            seed,
            None if tokenizer is None else tokenizer.eos_token_id,
            args.batch_size or config.decoding.batch_size,
            output_dir,
        )

    def run(self) -> int:
        """Grow what is missing, chunk by chunk, and put the tokens of all trees into one file."""
        start, tokens, grown, discarded = time.time(), 0, 0, 0
        indices = list(self.prompts)
        bar = cli.progress(total=len(indices), desc="trees", unit="prompt")

        def count(n: int) -> None:
            nonlocal tokens
            tokens += n
            bar.set_postfix_str(f"{tokens / (time.time() - start):.0f} tokens/s", refresh=False)

        try:
            for first in range(0, len(indices), CHUNK):
                chunk = {i: self.prompts[i] for i in indices[first : first + CHUNK]}
                for tree in grow_trees(
                    self.policy,
                    chunk,
                    self.texts,
                    self.shape,
                    seed=self.seed,
                    eos_token_id=self.eos_token_id,
                    batch_size=self.batch_size,
                    on_tokens=count,
                ):
                    if tree.depth.max() < min(2, self.shape.num_layers):
                        discarded += 1
                        write_discarded(self.output_dir, tree.prompt_index, tree.prompt, "no segment reached a second layer")
                    else:
                        grown += 1
                        write_tree(self.output_dir, tree)
                    bar.update(1)
        finally:
            bar.close()
            total = consolidate(self.output_dir)
        seconds = time.time() - start
        print(
            f"{grown} trees grown, {discarded} discarded (no second layer), {tokens} tokens in {seconds:.0f} s "
            f"({tokens / max(seconds, 1e-9):.0f} tokens/s); {self.output_dir} holds {total} trees"
        )
        return 0
