"""Several LoRA adapters on one base in memory: policies that are switched, value models that are read side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from utils.cached_models import backbone_of, head_of


class AdapterOf(nn.Module):
    """One of the LoRA adapters on a shared base, as a language model of its own.

    The base's layers are switched to the adapter for the length of a call and off again, so that any number of policies
    cost one base's memory, and the base itself stays the reference. It is for decoding: gradients are none of its
    business.
    """

    def __init__(self, peft_model: nn.Module, adapter: str):
        super().__init__()
        if adapter not in peft_model.peft_config:
            raise ValueError(f"no adapter {adapter!r}; the model has {', '.join(peft_model.peft_config)}")
        self.base, self.adapter = peft_model.get_base_model(), adapter
        self.config = self.base.config
        self.layers = [m for m in self.base.modules() if isinstance(m, BaseTunerLayer)]
        self.switch(on=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def switch(self, on: bool) -> None:
        for layer in self.layers:  # PEFT's own switch would also walk every adapter's parameters, in each step
            layer._disable_adapters = not on
            layer._active_adapter = [self.adapter]

    def forward(self, *args, **inputs):
        self.switch(on=True)
        try:
            return self.base(*args, **inputs)
        finally:
            self.switch(on=False)


class StackedLinear(nn.Module):
    """A linear layer whose rows have low-rank updates of their own: row i has that of member i % M.

    One product with the layer's weight for all rows, and two small batched ones with the members' matrices.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.updates: list[tuple[Tensor, Tensor] | None] = []  # of each adapter: (in, r) and (r, out); None: no update
        self.active: tuple[Tensor, Tensor] | None = None  # of the members: (M, in, r) and (M, r, out)
        self._chosen: dict[tuple[int, ...], tuple[Tensor, Tensor] | None] = {}

    def use(self, members: tuple[int, ...]) -> None:
        """Choose the adapters of the rows; a choice is put together once."""
        if members not in self._chosen:
            self._chosen[members] = self._stack([self.updates[m] for m in members])
        self.active = self._chosen[members]

    @staticmethod
    def _stack(updates: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
        given = [u for u in updates if u is not None]
        if not given:
            return None
        rank = max(down.shape[1] for down, _ in given)
        down = given[0][0].new_zeros(len(updates), given[0][0].shape[0], rank)
        up = given[0][1].new_zeros(len(updates), rank, given[0][1].shape[1])
        for m, update in enumerate(updates):
            if update is not None:
                down[m, :, : update[0].shape[1]], up[m, : update[1].shape[0]] = update
        return down, up

    def forward(self, x: Tensor) -> Tensor:
        """(B * M, q, in) to (B * M, q, out)."""
        out = self.layer(x)
        if self.active is None:
            return out
        down, up = self.active
        m, q = len(down), x.shape[1]
        by_member = x.unflatten(0, (-1, m)).transpose(0, 1).flatten(1, 2)  # (M, B * q, in)
        update = torch.bmm(torch.bmm(by_member, down), up)
        return out + update.unflatten(1, (-1, q)).transpose(0, 1).flatten(0, 1)


class AdapterStack(nn.Module):
    """The backbone of value models that differ in LoRA adapters alone: one pass reads a text with each of them.

    Each text is read in M copies, one for each member that is asked for: the base's weights are moved once for all of
    them, where merged models move them M times. It is for decoding: gradients are none of its business.
    """

    def __init__(self):
        super().__init__()
        self.backbone: nn.Module | None = None  # the first member's base; the others' must be equal
        self.layers: dict[str, StackedLinear] = {}
        self.size = 0

    @property
    def config(self):
        """The backbone's configuration."""
        return self.backbone.config

    def add(self, model: PeftModel, device: torch.device, dtype: torch.dtype) -> StackedValueModel:
        """One more value model: its adapter and its head, on that device; `model` is used up.

        Raises:
            ValueError: an adapter that is more than low-rank updates of the backbone's linear layers.
        """
        updates = _updates(model)
        base = model.unload()  # without the adapter, with the trained head
        prefix = base.base_model_prefix + "."
        if outside := sorted(name for name in updates if not name.startswith(prefix)):
            raise ValueError(f"it changes {outside[0]}, which is no part of the backbone")
        if self.backbone is None:
            self.backbone = backbone_of(base).to(device, dtype).eval()
        for layer in self.layers.values():
            layer.updates.append(None)
        for name, (down, up) in updates.items():
            self._layer(name.removeprefix(prefix)).updates[-1] = down.to(device, dtype), up.to(device, dtype)
        self.size += 1
        return StackedValueModel(self, self.size - 1, base.config, head_of(base).to(device, dtype).eval())

    def _layer(self, name: str) -> StackedLinear:
        """The stacked layer of that name, put in its place if it is the first that a member changes it."""
        if name not in self.layers:
            parent, _, child = name.rpartition(".")
            layer = self.layers[name] = StackedLinear(self.backbone.get_submodule(name))
            layer.updates = [None] * (self.size + 1)
            setattr(self.backbone.get_submodule(parent), child, layer)
        return self.layers[name]

    def read(self, members: tuple[int, ...], token_ids: Tensor, **inputs) -> Tensor:
        """The states (B, M, q, H) of tokens (B, q), read with each member's adapter; `inputs` are the backbone's."""
        m = len(members)
        for layer in self.layers.values():
            layer.use(members)
        inputs = {n: x.repeat_interleave(m, 0) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        out = self.backbone(input_ids=token_ids.repeat_interleave(m, 0), **inputs)
        return out.last_hidden_state.unflatten(0, (-1, m))


class StackedValueModel(nn.Module):
    """A member of an `AdapterStack`, as a value model of its own; policies read the members that they need together."""

    def __init__(self, stack: AdapterStack, member: int, config, head: nn.Module):
        super().__init__()
        self.config, self.member, self.score = config, member, head
        self.base_model_prefix = "stack"
        self.stack = stack

    def get_input_embeddings(self) -> nn.Module:
        return self.stack.backbone.get_input_embeddings()


def _updates(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (in, r) and (r, out)} of a value model's one adapter, its scaling within.

    Raises:
        ValueError: it is more than low-rank updates of linear layers and a head.
    """
    [adapter] = model.peft_config
    if (bias := model.peft_config[adapter].bias) != "none":
        raise ValueError(f"its biases are trained too (bias={bias!r})")
    base, found = model.get_base_model(), {}
    for name, layer in base.named_modules():
        if isinstance(layer, ModulesToSaveWrapper) and name.startswith(base.base_model_prefix + "."):
            raise ValueError(f"it has a {name} of its own, which is no low-rank update")
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer) or set(layer.lora_A) != {adapter} or _is_special(layer, adapter):
            raise ValueError(f"{name} has an update that is no plain LoRA")
        down, up = layer.lora_A[adapter].weight.detach().T, layer.lora_B[adapter].weight.detach().T
        found[name] = down.contiguous(), (up * layer.scaling[adapter]).contiguous()
    return found


def _is_special(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter's layer does more than add a product of two matrices (DoRA, a bias, a convolution)."""
    return bool(
        layer.lora_variant or layer.lora_bias.get(adapter) or any(p.dim() != 2 for p in layer.lora_A.parameters())
    )
