"""Rewarded Soups (Rame et al. 2023): the weighted average of policies' parameters, for LoRA adapters on one base.

A LoRA layer adds s B A to its weight, with s = alpha / r (or alpha / sqrt(r) with rank-stabilised scaling). Averaging A
and B apart would give the product of averages, which is not the average of products. The average of full weights,

    W + sum_i w_i s_i B_i A_i = W + [c_1 B_1 ... c_n B_n] [c_1 A_1; ...; c_n A_n]  with  c_i = sqrt(w_i s_i),

is exactly the adapter whose ranks are those of the parts one after another, with scale 1. The root shares each factor
between both sides, so that neither under- nor overflows in half precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import DataError
from utils.places import ADAPTER, check_adapter_folder

CONFIG, TENSORS = ADAPTER
SIDE_A, SIDE_B = ".lora_A.weight", ".lora_B.weight"
# What the average of products does not cover, and what each option must be instead.
PLAIN = {
    "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "trainable_token_indices": None, "layer_replication": None, "target_parameters": None,
}  # fmt: skip
SHARED = ("peft_type", "task_type", "fan_in_fan_out")  # what must be the same in all of them


def read_adapter(folder: str | Path) -> tuple[dict, dict]:
    """(adapter_config.json, tensors) of a plain LoRA adapter.

    Raises:
        DataError: no adapter there, or one with more than low-rank products in it.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    check_adapter_folder(folder, "adapter")
    config = json.loads((folder / CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise DataError(f"{folder} holds a {config.get('peft_type')} adapter; only LORA can be averaged")
    for option, plain in PLAIN.items():
        if (config.get(option) or plain) != plain:
            raise DataError(
                f"{folder} has {option}={config[option]!r}; only plain LoRA adapters can be averaged exactly"
            )
    tensors = load_file(folder / TENSORS)
    if odd := [name for name in tensors if not name.endswith((SIDE_A, SIDE_B))]:
        raise DataError(f"{folder} has tensors that are no low-rank product ({odd[0]}); they cannot be averaged")
    return config, tensors


def scale_of(config: Mapping) -> float:
    """The factor of an adapter's products."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def average_adapters(adapters: Sequence[tuple[Mapping, Mapping]], weights: Sequence[float]) -> tuple[dict, dict]:
    """(adapter_config.json, tensors) of the adapter that adds sum_i w_i s_i B_i A_i to each layer.

    Args:
        adapters: (configuration, tensors) of each, as `read_adapter` gives them; a layer that one of them lacks counts
            as unchanged by it.
        weights: (n,) not negative; an adapter of weight 0 takes no rank.

    Raises:
        DataError: adapters of different kinds, or layers of different shapes.
    """
    import torch

    kept = [(config, tensors, w) for (config, tensors), w in zip(adapters, weights, strict=True) if w != 0]
    for key in SHARED:
        if len({str(config.get(key)) for config, _, _ in kept}) > 1:
            raise DataError(f"the adapters differ in {key}: {', '.join(str(c.get(key)) for c, _, _ in kept)}")
    layers = list(dict.fromkeys(name.removesuffix(SIDE_A) for _, t, _ in kept for name in t if name.endswith(SIDE_A)))
    averaged = {}
    for layer in layers:
        some = next(t for _, t, _ in kept if layer + SIDE_A in t)
        inputs, outputs, dtype = (
            some[layer + SIDE_A].shape[1],
            some[layer + SIDE_B].shape[0],
            some[layer + SIDE_A].dtype,
        )
        side_a, side_b = [], []
        for config, tensors, w in kept:
            a = tensors.get(layer + SIDE_A, torch.zeros(config["r"], inputs))
            b = tensors.get(layer + SIDE_B, torch.zeros(outputs, config["r"]))
            if a.shape[1] != inputs or b.shape[0] != outputs:
                raise DataError(
                    f"the adapters belong to different bases: {layer} is {outputs} x {inputs} in one and "
                    f"{b.shape[0]} x {a.shape[1]} in another"
                )
            factor = math.sqrt(w * scale_of(config))
            side_a.append(factor * a.double())
            side_b.append(factor * b.double())
        averaged[layer + SIDE_A] = torch.cat(side_a).to(dtype).contiguous()  # (sum of ranks, inputs)
        averaged[layer + SIDE_B] = torch.cat(side_b, dim=1).to(dtype).contiguous()  # (outputs, sum of ranks)
    rank = sum(config["r"] for config, _, _ in kept)
    targets = sorted({m for config, _, _ in kept for m in _listed(config["target_modules"])})
    config = dict(kept[0][0]) | {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": targets}
    return config, averaged


def _listed(modules: str | Sequence[str]) -> list[str]:
    if isinstance(modules, str):
        raise DataError(f"target_modules is the pattern {modules!r}; adapters whose modules are listed can be averaged")
    return list(modules)
