"""Value models: a scalar head and a LoRA adapter on a base that reads the reference's tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from utils.adapters import load_adapter, with_new_adapter
from utils.cached_models import backbone_of, refuse_biases
from utils.errors import DataError
from utils.models import first_layers, load_pretrained, load_tokenizer, pick_dtype
from utils.places import check_adapter_folder, value_model_command, value_model_folder
from utils.shared_base import AdapterStack
from utils.specs import Config, ModelSpec


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells one vocabulary from another: a hash of its tokens, in the order of their ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256("\0".join(f"{i} {token}" for token, i in tokens).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _vocabulary_at(path: str) -> dict[int, str] | None:
    """{id: token} of a checkpoint's tokenizer; None for a folder without one."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if os.path.isdir(path) and not any((Path(path) / name).is_file() for name in names):
        return None
    return {i: token for token, i in load_tokenizer(path).get_vocab().items()}


def _check_same_tokens(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A value model reads the reference's token ids, so its base must mean the same tokens by them.

    One in a hundred may differ (special tokens under other names), and either may have more tokens than the other.

    Raises:
        DataError: another vocabulary; the first token that differs is named.
    """
    if path == tokenizer.name_or_path:
        return
    base = _vocabulary_at(path)
    if base is None:
        return
    reference = {i: token for token, i in tokenizer.get_vocab().items()}
    common = sorted(base.keys() & reference.keys())
    differ = [i for i in common if base[i] != reference[i]]
    if len(differ) * 100 > len(common) or not common:
        first = differ[0] if differ else 0
        raise DataError(
            f"base of the value models: {path} has another vocabulary than the reference {tokenizer.name_or_path}: "
            f"{len(differ)} of {len(common)} tokens differ (id {first} is {base.get(first)!r} and "
            f"{reference.get(first)!r}); name a value_model.path with the reference's tokenizer"
        )


def _check_trained_for(folder: Path, tokenizer: PreTrainedTokenizerBase, pooling: str) -> None:
    """Raise a DataError if a value model's folder records another vocabulary than the reference's, or pooling."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        recorded, trained = metrics["vocabulary"], metrics.get("pooling", "last")
    except (OSError, ValueError, KeyError, TypeError):
        return  # an adapter from elsewhere
    if trained != pooling:
        raise DataError(
            f"the value model in {folder} was trained with value_model.pooling: {trained}, the configuration has "
            f"{pooling}; train it again, or use the configuration that made it"
        )
    if recorded["hash"] != vocabulary_hash(tokenizer):
        raise DataError(
            f"the value model in {folder} was trained for another vocabulary ({recorded['size']} tokens) than that of "
            f"the reference {tokenizer.name_or_path} ({len(tokenizer)} tokens); train it on trees of this reference"
        )


def _value_base(
    config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, vocab_size: int, dtype: torch.dtype
) -> PreTrainedModel:
    path = config.locate(spec.path)
    model = load_pretrained(
        AutoModelForSequenceClassification,
        path,
        "base of the value models",
        spec.made_by,
        new_head=True,
        dtype=dtype,
        num_labels=1,
        **first_layers(path, spec.num_layers, "base of the value models", spec.made_by),
    )
    refuse_biases(model)
    _check_same_tokens(path, tokenizer)
    if model.get_input_embeddings().num_embeddings != vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.value_pooling = spec.pooling
    return model


def new_value_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    device: torch.device,
    init_checkpoint: str | Path | None = None,
    seed: int = 0,
) -> PeftModel:
    """A value model that is ready to train in float32: LoRA on the base, and a fresh scalar head (or a checkpoint's).

    The head starts at zero, so that the first predictions are 0 whatever the base.
    """
    spec = config.value_model
    if spec.lora is None:
        raise DataError(f"{config.path}: value_model.lora is missing")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = _value_base(config, spec, tokenizer, vocab_size, torch.float32)
        if init_checkpoint:
            check_adapter_folder(Path(init_checkpoint), "value model to continue")
            _check_trained_for(Path(init_checkpoint), tokenizer, spec.pooling)
            return load_adapter(base, init_checkpoint, is_trainable=True).to(device)
        torch.nn.init.zeros_(base.score.weight)
        return with_new_adapter(base, spec.lora, "SEQ_CLS", modules_to_save=["score"]).to(device)


def load_value_model(
    config: Config,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A trained value model with its adapter merged, in eval mode.

    Raises:
        DataError: no adapter there, or one that does not fit the configuration's value model or the vocabulary.
    """
    merged = _adapted_value_model(config, Path(folder), tokenizer, vocab_size).merge_and_unload()
    return merged.to(device, dtype or pick_dtype(config, device)).eval()


def _adapted_value_model(
    config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> PeftModel:
    check_adapter_folder(folder, "value model", value_model_command(config, folder.name, folder))
    _check_trained_for(folder, tokenizer, config.value_model.pooling)
    base = _value_base(config, config.value_model, tokenizer, vocab_size, torch.float32)
    return load_adapter(base, folder)


def load_value_models(
    config: Config,
    value_model_dir: str | Path | None,
    iterations: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    device: torch.device,
    loaded: dict | None = None,
    adapters: str = "merged",
) -> dict[str, torch.nn.Module]:
    """The value models of every objective that has an iteration: {objective: model}.

    Args:
        loaded: kept between calls: what one of them has loaded no other loads again.
        adapters: "merged", each a model of its own, or "stacked", members of one `AdapterStack`. Those whose head alone
            was trained share the base either way.

    Raises:
        DataError: as `load_value_model`; to be stacked, an adapter that is no plain LoRA.
    """
    folders = {name: value_model_folder(config, value_model_dir, n, name) for name, n in iterations.items()}
    loaded = {} if loaded is None else loaded
    new = {name: folder for name, folder in folders.items() if folder not in loaded}
    for name, folder in new.items():  # all are looked for before the first is loaded
        check_adapter_folder(folder, f"value model of {name}", value_model_command(config, name, folder))
    for folder in new.values():
        only_head = _only_head_is_trained(folder)
        if adapters == "stacked" and not only_head:
            stack = loaded.setdefault("stack", AdapterStack())
            loaded[folder] = _add_to_stack(stack, config, folder, tokenizer, vocab_size, device)
            continue
        model = loaded[folder] = load_value_model(config, folder, tokenizer, vocab_size, device)
        if only_head:  # then the backbone is the base's: one for all, which is read once
            setattr(model, model.base_model_prefix, loaded.setdefault("untrained backbone", backbone_of(model)))
    return {name: loaded[folder] for name, folder in folders.items()}


def _add_to_stack(
    stack: AdapterStack,
    config: Config,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    device: torch.device,
) -> torch.nn.Module:
    """One more member. Its own float32 base, which only the first member keeps, goes before the next one is loaded."""
    adapted = _adapted_value_model(config, folder, tokenizer, vocab_size)
    try:
        return stack.add(adapted, device, pick_dtype(config, device))
    except ValueError as error:
        raise DataError(
            f"the value model in {folder} cannot be stacked: {error}; use --value_adapters merged"
        ) from error


def _only_head_is_trained(folder: str | Path) -> bool:
    """Whether an adapter changes nothing but the head: every LoRA's second matrix is still 0."""
    try:
        with safe_open(str(Path(folder) / "adapter_model.safetensors"), "pt") as file:
            return not any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # it is no adapter, as whoever loads it will say
