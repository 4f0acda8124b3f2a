"""Pretrained models and tokenizers, their device and dtype: bases, the reference, reward models, encoders.

A path is a folder (of the workspace, or anywhere) or a Hub name; both work everywhere. Nothing is unpickled: weights
are safetensors, and a checkpoint that has none is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from utils.cached_models import refuse_biases
from utils.cli import quiet_libraries
from utils.errors import DataError
from utils.places import reference_path
from utils.sharding import this_process
from utils.specs import Config, DatasetSpec

quiet_libraries()


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else the first GPU, else the CPU; of several processes on a machine, each has its own GPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise DataError(f"--device {name!r} is no torch device; try cpu, cuda or cuda:1") from None
    if device.type == "cuda" and device.index is None:
        device = own_gpu(this_process().local_rank, torch.cuda.device_count())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"--device {name}: PyTorch cannot use it here ({reason})") from None
    return device


def own_gpu(local_rank: int | None, count: int) -> torch.device:
    """The GPU of a machine's process of that number; a launcher may also show each process one GPU alone.

    Raises:
        DataError: more processes than GPUs.
    """
    if local_rank is None or count <= 1:
        return torch.device("cuda")
    if local_rank >= count:
        raise DataError(
            f"this machine has {count} CUDA devices, and this is its process {local_rank + 1}; start {count} processes "
            "on it, or name a device with --device"
        )
    return torch.device("cuda", local_rank)


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The configuration's precision on that kind of device; `auto` is bfloat16 where the hardware has it."""
    name = config.cpu_dtype if device.type == "cpu" else config.gpu_dtype
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 products; elsewhere they are emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private names, absent in other releases
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def load_pretrained(loader, path: str, what: str, made_by: str = "", *, new_head: bool = False, **kwargs):
    """`loader.from_pretrained` whose failures are one line that says what was looked for and what makes it.

    What a command of the project makes (`made_by`) lies in a folder, so that the Hub is not asked for it. Weights that
    a checkpoint lacks would come out random: only a head may be lacking, where `new_head` says that it is to be new.
    """
    path = str(path)
    if os.path.isdir(path) and not any(Path(path).iterdir()):
        raise DataError(f"{what}: {path} is an empty folder" + (f"; make it with: {made_by}" if made_by else ""))
    if made_by and not os.path.isdir(path):
        raise DataError(f"{what}: no folder {path!r}; make it with: {made_by}")
    try:
        if loader in (AutoTokenizer, AutoConfig):
            return loader.from_pretrained(path, **kwargs)
        # Where the Hub has pickles alone, the Hub's conversion is taken.
        model, report = loader.from_pretrained(path, use_safetensors=True, output_loading_info=True, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        hint = f"make it with: {made_by}" if made_by else "give a folder or a Hub name that this machine can reach"
        raise DataError(
            f"{what}: no usable checkpoint at {path!r} ({type(error).__name__}: {reason}); {hint}"
        ) from error
    inside = model.base_model_prefix + "."
    lacking = [k for k in report["missing_keys"] if k.startswith(inside) or not new_head]
    if loader is AutoModel or new_head:  # only a head that was trained on it reads an encoder's pooler
        lacking = [k for k in lacking if "pooler." not in k]
    if lacking:
        raise DataError(
            f"{what}: the checkpoint at {path!r} lacks {len(lacking)} weights of a {type(model).__name__} (first "
            f"{min(lacking)}), which would be random; it was saved as another kind of model"
        )
    return model


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's end-of-sequence token, and those special tokens that the model's
    `generation_config` names besides (the end of a turn, in many chat models), as for transformers' `generate`."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = [] if named is None else named if isinstance(named, list) else [named]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *(i for i in named if i in special)]))


def load_tokenizer(
    path: str, special_tokens: dict[str, str] | None = None, made_by: str = ""
) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token; `special_tokens` are added where they are missing (published: [PAD])."""
    tokenizer = load_pretrained(AutoTokenizer, path, "tokenizer", made_by)
    if special_tokens:
        tokenizer.add_special_tokens(dict(special_tokens))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    what: str = "model",
    made_by: str = "",
) -> PreTrainedModel:
    """A causal language model in eval mode, its embeddings resized to at least `vocab_size` tokens."""
    first = first_layers(path, num_layers, what, made_by)
    model = load_pretrained(AutoModelForCausalLM, path, what, made_by, dtype=dtype, **first)
    if vocab_size is not None and model.get_input_embeddings().num_embeddings < vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model.to(device).eval()


def load_trunk(
    path: str, num_layers: int | None, device: torch.device, dtype: torch.dtype = torch.float32, made_by: str = ""
) -> PreTrainedModel:
    """The headless first N layers of a model (its last hidden state passes the final norm), in eval mode."""
    first = first_layers(path, num_layers, "trunk", made_by)
    trunk = load_pretrained(AutoModel, path, "trunk", made_by, dtype=dtype, **first)
    refuse_biases(trunk)
    return trunk.to(device).eval()


def first_layers(path: str, num_layers: int | None, what: str, made_by: str = "") -> dict:
    """The argument that keeps a checkpoint's first N layers; more than it has would come out untrained."""
    if num_layers is None:
        return {}
    have = load_pretrained(AutoConfig, path, what, made_by).get_text_config().num_hidden_layers
    if not 1 <= num_layers <= have:
        raise DataError(f"{what}: {path} has {have} layers, so num_layers must be 1 to {have}, got {num_layers}")
    return {"num_hidden_layers": num_layers}


def load_reference(
    config: Config,
    dataset: DatasetSpec,
    device: torch.device,
    path: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen reference model of a data set and its tokenizer."""
    default, made_by = reference_path(config, dataset)
    path, made_by = (path, "") if path else (default, made_by)
    what = f"reference model of {dataset.name}"
    model = load_causal_lm(path, device, dtype or pick_dtype(config, device), what=what, made_by=made_by)
    tokenizer = load_tokenizer(path, made_by=made_by)
    if len(tokenizer) > vocabulary_size(model):
        raise DataError(
            f"{what}: the tokenizer in {path} has {len(tokenizer)} tokens, the model {vocabulary_size(model)}; "
            "it was saved with another model"
        )
    return model, tokenizer


def load_base(
    config: Config, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the configuration's added tokens (what SFT starts from), and its tokenizer."""
    spec = config.base_model
    path = config.locate(spec.path)
    tokenizer = load_tokenizer(path, spec.special_tokens, spec.made_by)
    model = load_causal_lm(
        path,
        device,
        dtype,
        num_layers=spec.num_layers,
        vocab_size=len(tokenizer),
        what="base model",
        made_by=spec.made_by,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------ reward models


def load_sequence_classifier(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32, what: str = "reward model", made_by: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification checkpoint and its tokenizer, both with a padding token (GPT-2 has none of its own)."""
    tokenizer = load_tokenizer(path, made_by=made_by)
    model = load_pretrained(AutoModelForSequenceClassification, path, what, made_by, dtype=dtype)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def new_sequence_classifier(
    path: str,
    device: torch.device,
    *,
    num_layers: int | None = None,
    special_tokens: dict[str, str] | None = None,
    seed: int = 0,
    made_by: str = "",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model's first layers with a fresh scalar head, ready to train in float32, and its tokenizer."""
    tokenizer = load_tokenizer(path, special_tokens, made_by)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load_pretrained(
            AutoModelForSequenceClassification,
            path,
            "base model",
            made_by,
            new_head=True,
            dtype=torch.float32,
            num_labels=1,
            **first_layers(path, num_layers, "base model", made_by),
        )
        if model.get_input_embeddings().num_embeddings < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device), tokenizer


def load_encoder(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sentence encoder (headless) and its tokenizer."""
    return load_pretrained(AutoModel, path, "encoder", dtype=dtype).to(device).eval(), load_tokenizer(path)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().num_embeddings


def input_embeddings(model: PreTrainedModel) -> torch.Tensor:
    """The input embeddings (V, E), float32 on the CPU."""
    return model.get_input_embeddings().weight.detach().float().cpu()


def resolved_config(path: str):
    """A checkpoint's configuration."""
    return load_pretrained(AutoConfig, path, "configuration")
