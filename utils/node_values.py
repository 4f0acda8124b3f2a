"""What a value model says at the nodes of trees, and the states that its head reads there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from utils.policies import pools_mean, without_adapter
from utils.tree_examples import Example
from utils.tree_layouts import TOKENS_PER_PASS, Batch, collate, lay_out, make_units, passes, response_mean


def head_weight(model) -> torch.Tensor:
    """The scalar head's weight (1, H)."""
    return without_adapter(model).score.weight


def backbone_inputs(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The batch's inputs for a backbone of that precision."""
    mask = batch.inputs["attention_mask"]
    if mask.dim() == 2 or dtype == torch.float32:
        return batch.inputs
    return batch.inputs | {"attention_mask": mask.to(dtype).clamp_(min=torch.finfo(dtype).min)}


def _head_and_states(model, batch: Batch):
    """The sequence-classification model under any adapter, and its hidden states (B, L, H)."""
    head = without_adapter(model)
    backbone = getattr(head, head.base_model_prefix)
    inputs = backbone_inputs(batch, next(backbone.parameters()).dtype)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    return head, hidden.to(head.score.weight.dtype)


def node_values(model, batch: Batch) -> torch.Tensor:
    """(m,) float32 values at a batch's places.

    Args:
        model: a `...ForSequenceClassification` causal model with one label, bare or under a PEFT adapter. The head is
            applied in its own precision, at the places only or, for a model that pools, at every token.
    """
    head, hidden = _head_and_states(model, batch)
    with torch.autocast(hidden.device.type, enabled=False):
        if not pools_mean(model):
            return head.score(hidden[batch.rows, batch.places])[:, 0].float()
        scores = head.score(hidden)[..., 0]  # (B, L)
        return (response_mean(batch, scores.dtype) * scores[batch.rows]).sum(-1).float()


def node_states(model, batch: Batch) -> torch.Tensor:
    """(m, H) what the head reads at a batch's places: the value is linear in it."""
    _, hidden = _head_and_states(model, batch)
    if not pools_mean(model):
        return hidden[batch.rows, batch.places]
    with torch.autocast(hidden.device.type, enabled=False):
        weights, states = response_mean(batch, hidden.dtype), hidden.new_zeros(len(batch.rows), hidden.shape[-1])
        for row in range(len(hidden)):
            mine = batch.rows == row
            states[mine] = weights[mine] @ hidden[row]
    return states


@torch.no_grad()
def predict(
    model,
    examples: Sequence[Example],
    *,
    packing: str = "tree",
    bf16: bool = False,
    device=None,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = TOKENS_PER_PASS,
) -> torch.Tensor:
    """(M,) float32 values of all the examples' nodes, in order; a process fills its own rows and leaves 0 elsewhere."""
    units = make_units(examples, packing, max(len(x.nodes) for x in examples))  # whole trees, or single nodes
    starts = np.cumsum([0, *(len(nodes) for _, nodes in units)])
    layouts = [lay_out(examples[i], nodes) for i, nodes in units]
    values = torch.zeros(int(starts[-1]), device=device)
    training = model.training
    model.eval()
    for number, group in enumerate(passes(layouts, max_tokens)):
        if number % world != rank:
            continue
        batch = collate([layouts[i] for i in group], device)
        with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=bf16):
            predicted = node_values(model, batch)
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
        values[torch.from_numpy(places).to(values.device)] = predicted
    model.train(training)
    return values
