"""What a value model says at the nodes of trees, and the states that its head reads there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from utils.cached_models import backbone_of, pools_mean, without_adapter
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
    backbone = backbone_of(head)
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


def predict(model, examples: Sequence[Example], *, device=None, **how) -> torch.Tensor:
    """(M,) float32 values of all the examples' nodes, in order; see `read_nodes` for the other arguments."""
    values = torch.zeros(sum(len(x.nodes) for x in examples), device=device)
    return read_nodes(node_values, model, examples, values, **how)


def read_states(model, examples: Sequence[Example], *, device=None, **how) -> torch.Tensor:
    """(M, H) what the head reads at all the examples' nodes, in order; see `read_nodes` for the other arguments."""
    weight = head_weight(model)
    states = torch.zeros(sum(len(x.nodes) for x in examples), weight.shape[1], dtype=weight.dtype, device=device)
    return read_nodes(node_states, model, examples, states, **how)


@torch.no_grad()
def values_of_states(model, states: torch.Tensor) -> torch.Tensor:
    """(M,) float32 values at nodes of which the head reads these states (M, H)."""
    return (states @ head_weight(model)[0]).float()


@torch.no_grad()
def read_nodes(
    read: Callable[..., torch.Tensor],
    model,
    examples: Sequence[Example],
    found: torch.Tensor,
    *,
    packing: str = "tree",
    bf16: bool = False,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = TOKENS_PER_PASS,
) -> torch.Tensor:
    """Fill `found` (M, ...) with what `read(model, batch)` gives at all the examples' nodes, in order, and return it.

    Of several processes each fills its own rows and leaves the others as they are.
    """
    units = make_units(examples, packing, max(len(x.nodes) for x in examples))  # whole trees, or single nodes
    starts = np.cumsum([0, *(len(nodes) for _, nodes in units)])
    layouts = [lay_out(examples[i], nodes) for i, nodes in units]
    training = model.training
    model.eval()
    for group in passes(layouts, max_tokens)[rank::world]:
        batch = collate([layouts[i] for i in group], found.device)
        with torch.autocast(found.device.type, torch.bfloat16, enabled=bf16):
            part = read(model, batch)
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
        found[torch.from_numpy(places).to(found.device)] = part
    model.train(training)
    return found
