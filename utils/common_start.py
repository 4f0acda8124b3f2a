"""What the value models of one command have in common before any of them is trained.

The objectives of a command read the same trees, and begin with the same untrained model. So trees are read once, and
where heads start as ridge regressions, one pass over the untrained states gives all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from utils.cached_models import attended_length
from utils.errors import DataError
from utils.hdf5_utils import read_trees
from utils.head_starts import Ridge, fit_ridges, start_at_mean, start_at_ridge
from utils.models import has_bfloat16, load_tokenizer, resolved_config, vocabulary_size
from utils.node_values import read_states
from utils.places import reference_path
from utils.specs import Config, DatasetSpec, TrainingSpec
from utils.training_output import is_complete
from utils.tree_examples import Example, make_examples, training_nodes, validation_nodes
from utils.trees import Tree
from utils.value_models import new_value_model


@dataclass(frozen=True)
class Source:
    """What value models are learned from: two that have the same one begin alike, but for their targets."""

    spec: TrainingSpec
    data_dir: Path
    init: Path | None  # the value model to continue from; None: from the base
    max_trees: int | None = None
    kl_penalty: float = 0.0
    log_ratio: str | None = None


class CommonStart:
    """Trees, tokenizer, untrained model and the heads that start on its states: each made at its first use, once.

    Nothing depends on what was made before for which objective, so that a killed command goes on to the same bits.

    Args:
        outputs: {objective: the folder that its value model takes}, of all objectives with this source. Those that are
            not complete when a ridge regression is needed get theirs in the same pass.
        rerun: complete ones are trained again.
        accelerator: an `accelerate.Accelerator`; its processes share the passes.
        say: called with lines for the user.
    """

    def __init__(
        self,
        config: Config,
        dataset: DatasetSpec,
        source: Source,
        outputs: Mapping[str, Path],
        *,
        rerun: bool,
        accelerator,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.config, self.dataset, self.source, self.outputs, self.rerun = config, dataset, source, outputs, rerun
        self.accelerator, self.device, self.say = accelerator, device, say
        self._examples: dict[str, tuple[list[Example], list[Example]]] = {}
        self._ridges: dict[str, tuple[Ridge, float]] = {}
        self._states: torch.Tensor | None = None

    @cached_property
    def spec(self) -> TrainingSpec:
        """The hyperparameters, without what the device cannot do."""
        if self.source.spec.bf16 and not has_bfloat16(self.device):
            self.say(f"no bfloat16 instructions on {self.device}: training in float32")
            return replace(self.source.spec, bf16=False)
        return self.source.spec

    @cached_property
    def tokenizer(self):
        """The reference's."""
        reference, made_by = reference_path(self.config, self.dataset)
        return load_tokenizer(reference, made_by=made_by)

    @cached_property
    def vocab_size(self) -> int:
        """The reference's."""
        return resolved_config(reference_path(self.config, self.dataset)[0]).get_text_config().vocab_size

    @cached_property
    def trees(self) -> dict[str, list[Tree]]:
        """{split: its trees}."""
        limits = {"train": self.source.max_trees, "val": None}
        return {s: list(itertools.islice(read_trees(self.source.data_dir, s), n)) for s, n in limits.items()}

    def examples(self, objective: str) -> tuple[list[Example], list[Example]]:
        """What an objective is trained and validated on.

        Raises:
            DataError: see `make_examples`; no nodes to train or validate on.
        """
        if objective not in self._examples:
            source, found = self.source, []
            chosen = {"train": lambda tree: training_nodes(tree, source.spec.deepest_fraction, source.spec.seed),
                      "val": validation_nodes}  # fmt: skip
            for split, choose in chosen.items():
                found.append(
                    make_examples(self.trees[split], objective, choose, kl_penalty=source.kl_penalty,
                                  log_ratio=source.log_ratio, vocab_size=self.vocab_size, data_dir=source.data_dir)
                )  # fmt: skip
            if not found[0]:
                raise DataError(f"no nodes to use in the training trees in {source.data_dir}")
            if not found[1]:
                raise DataError(f"no nodes to use in the validation trees in {source.data_dir}; inner nodes are needed")
            self._examples[objective] = (found[0], found[1])
        return self._examples[objective]

    def model(self):
        """The untrained value model. It is one object: what was trained of it before is put back."""
        model, untrained = self._model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in untrained:
                    parameter.copy_(untrained[name])
                    parameter.grad = None
        return model

    @cached_property
    def _model(self):
        """The model, and what is trained of it, as it is before."""
        model = new_value_model(self.config, self.tokenizer, self.vocab_size, self.device, self.source.init,
                                seed=self.spec.seed)  # fmt: skip
        assert vocabulary_size(model) == self.vocab_size, (vocabulary_size(model), self.vocab_size)
        longest = max(int(tree.path_lengths.max()) for trees in self.trees.values() for tree in trees)
        if longest > (attended_length(model) or longest):
            raise DataError(
                f"the trees in {self.source.data_dir} have texts of up to {longest} tokens, and value models on "
                f"{self.config.value_model.path} attend to {attended_length(model)}: name a value_model.path with a "
                "longer context, or grow trees of shorter prompts"
            )
        return model, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def give_head(self, model, objective: str) -> float:
        """Put the head that an objective starts from into the untrained model.

        Returns:
            the seconds that it took; of a pass that gave several objectives theirs, an equal part.
        """
        began = time.perf_counter()
        if self.spec.head_start == "ridge":
            if objective not in self._ridges:
                self._fit_ridges(model, objective)
            ridge, seconds = self._ridges[objective]
            start_at_ridge(model, ridge)
            self.say(f"head: ridge regression on the untrained states, penalty {ridge.penalty:g}")
            return seconds
        if not self.source.init:
            start_at_mean(model, self.examples(objective)[0], packing=self.spec.packing, device=self.device)
        return time.perf_counter() - began

    def _fit_ridges(self, model, objective: str) -> None:
        """Those of the objective and of all others that are still to be trained.

        Which these are is looked at when one is needed: the processes are together then, since no one can have
        published a value model whose training waits for this pass.
        """
        began = time.perf_counter()
        names = [n for n, output in self.outputs.items() if n == objective or self.rerun or not is_complete(output)]
        ridges = fit_ridges(model, [self.examples(n)[0] for n in names], dense=self.spec.targets == "dense",
                            bf16=self.spec.bf16, device=self.device, accelerator=self.accelerator)  # fmt: skip
        seconds = (time.perf_counter() - began) / len(names)
        self._ridges |= {n: (ridge, seconds) for n, ridge in zip(names, ridges, strict=True)}

    def validation_states(self, model, objective: str) -> torch.Tensor | None:
        """(M, H) what the head reads at the validation nodes, where no training changes it; else None.

        They are the same for all objectives, which differ in their targets alone.
        """
        if self.spec.num_epochs:
            return None
        if self._states is None:
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            self._states = read_states(model, self.examples(objective)[1], packing=self.spec.packing,
                                       bf16=self.spec.bf16, device=self.device, rank=rank, world=world)  # fmt: skip
            if world > 1:
                self._states = self.accelerator.reduce(self._states, "sum")
        return self._states
