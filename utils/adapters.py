"""LoRA adapters on a base model: loaded with nothing left out, merged, switched, or new.

A path is a folder; the weights are safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from utils.errors import DataError
from utils.models import load_reference
from utils.places import check_adapter_folder
from utils.provenance import fingerprint
from utils.shared_base import AdapterOf
from utils.specs import Config, DatasetSpec, LoraSpec


def lora_config(lora: LoraSpec, task_type: str = "CAUSAL_LM", **more) -> LoraConfig:
    """PEFT's configuration of an adapter; `more` of its options."""
    return LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        **more,
    )


def with_new_adapter(model: PreTrainedModel, lora: LoraSpec, task_type: str = "CAUSAL_LM", **more) -> PeftModel:
    """A model with a fresh adapter to train; `more` as in `lora_config`.

    Raises:
        DataError: the adapter's modules are not the model's; the names of its linear layers are said.
    """
    check_target_modules(model, lora)
    try:
        return get_peft_model(model, lora_config(lora, task_type, **more))
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"lora.target_modules {', '.join(lora.target_modules)} do not fit: {reason}") from error


def check_target_modules(model: PreTrainedModel, lora: LoraSpec) -> None:
    """Raise a DataError unless an adapter finds some of its modules in a model; the model's linear layers are named."""
    wanted = lora.target_modules
    if any(name == w or name.endswith(f".{w}") for name, _ in model.named_modules() for w in wanted):
        return
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    raise DataError(
        f"lora.target_modules {', '.join(wanted)}: {model.name_or_path} has none of these; its linear layers are "
        f"called {', '.join(sorted(linear))}; name some of them in the configuration"
    )


def load_adapter(
    base: PreTrainedModel | PeftModel, folder: str | Path, is_trainable: bool = False, name: str = "default"
) -> PeftModel:
    """A PEFT adapter on its base, or one more on a base that has some; what does not fit it to the last tensor ends in
    one line."""
    # Read on the CPU: by itself PEFT reads them on the first GPU, whichever device was asked for.
    how = {"adapter_name": name, "is_trainable": is_trainable, "torch_device": "cpu"}
    try:
        with warnings.catch_warnings():  # PEFT only warns where tensors are missing; the comparison below refuses
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            if isinstance(base, PeftModel):
                model = base
                model.load_adapter(str(folder), **how)
            else:
                model = PeftModel.from_pretrained(base, str(folder), **how)
        with safe_open(str(Path(folder) / "adapter_model.safetensors"), "pt") as file:
            stored = {key for key in file.keys() if "lora_" in key or "score" in key}  # noqa: SIM118
        needed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the adapter in {folder} does not fit its base ({type(error).__name__}: {reason})") from error
    if different := sorted(needed ^ stored):
        lacking = sum(key in needed for key in different)
        raise DataError(
            f"the adapter in {folder} does not fit its base: {lacking} of {len(needed)} tensors are missing and "
            f"{len(different) - lacking} have no place (first {different[0]}); it was trained on another base, or on "
            "another number of layers"
        )
    return model


def merge_adapter(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """The base with a LoRA adapter added into its weights, in eval mode."""
    check_adapter_folder(Path(adapter), "adapter")
    return load_adapter(base, adapter).merge_and_unload().eval()


def load_policies(base: PreTrainedModel, folders: Mapping[str, str | Path]) -> dict[str, AdapterOf]:
    """Policies that are LoRA adapters on one base, none merged: {name: folder} to {name: model}.

    The adapters are off but during a policy's own call, so `base` itself goes on being the reference, and may be given
    more policies later; an adapter that it has is not loaded again. Not merging keeps the small differences of a
    low-rank update, which bfloat16 weights would round away.
    """
    model, loaded = base.__dict__.get("_policies", (base, {}))
    names = {}
    for name, folder in folders.items():
        key = (str(folder), fingerprint(folder))
        if key not in loaded:  # numbered names, since PEFT looks for an adapter's name within a tensor's name
            model = load_adapter(model, folder, name=f"adapter{len(loaded)}")
            loaded[key] = f"adapter{len(loaded)}"
        names[name] = loaded[key]
    base.__dict__["_policies"] = (model, loaded)  # not as a submodule, which would make the base its own descendant
    if next(base.parameters()).dtype == torch.float64:
        model.double()
    model.eval()
    return {name: AdapterOf(model, adapter) for name, adapter in names.items()}


def new_policy(
    config: Config,
    dataset: DatasetSpec,
    lora: LoraSpec,
    device: torch.device,
    *,
    path: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The reference of a data set (or the model at `path`) with a fresh LoRA adapter to train, and its tokenizer."""
    model, tokenizer = load_reference(config, dataset, device, path, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_new_adapter(model, lora), tokenizer
