"""The only place that calls `from_pretrained`: tokenizers, the reference, value models and reward models.

A path is a folder (of the workspace, or anywhere) or a Hub name; both work everywhere. Nothing is unpickled: weights
are safetensors, and a checkpoint that has none is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from utils.cached_models import backbone_of
from utils.cli import DataError, quiet_libraries
from utils.config import Config, DatasetSpec, LoraSpec, ModelSpec
from utils.places import check_adapter_folder, reference_path, value_model_command, value_model_folder
from utils.provenance import fingerprint
from utils.sharding import this_process
from utils.shared_base import AdapterOf, AdapterStack

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


def _load(loader, path: str, what: str, made_by: str = "", **kwargs):
    """`loader.from_pretrained` whose failures are one line that says what was looked for and what makes it.

    What a command of the project makes (`made_by`) lies in a folder, so that the Hub is not asked for it.
    """
    path = str(path)
    if os.path.isdir(path) and not any(Path(path).iterdir()):
        raise DataError(f"{what}: {path} is an empty folder" + (f"; make it with: {made_by}" if made_by else ""))
    if made_by and not os.path.isdir(path):
        raise DataError(f"{what}: no folder {path!r}; make it with: {made_by}")
    try:
        if loader not in (AutoTokenizer, AutoConfig):
            kwargs["use_safetensors"] = True  # where the Hub has pickles alone, the Hub's conversion is taken
        return loader.from_pretrained(path, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        hint = f"make it with: {made_by}" if made_by else "give a folder or a Hub name that this machine can reach"
        raise DataError(
            f"{what}: no usable checkpoint at {path!r} ({type(error).__name__}: {reason}); {hint}"
        ) from error


def load_tokenizer(
    path: str, special_tokens: dict[str, str] | None = None, made_by: str = ""
) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token; `special_tokens` are added where they are missing (published: [PAD])."""
    tokenizer = _load(AutoTokenizer, path, "tokenizer", made_by)
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
    first = _layers(path, num_layers, what, made_by)
    model = _load(AutoModelForCausalLM, path, what, made_by, dtype=dtype, **first)
    if vocab_size is not None and model.get_input_embeddings().num_embeddings < vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model.to(device).eval()


def load_trunk(
    path: str, num_layers: int | None, device: torch.device, dtype: torch.dtype = torch.float32, made_by: str = ""
) -> PreTrainedModel:
    """The headless first N layers of a model (its last hidden state passes the final norm), in eval mode."""
    first = _layers(path, num_layers, "trunk", made_by)
    return _load(AutoModel, path, "trunk", made_by, dtype=dtype, **first).to(device).eval()


def _layers(path: str, num_layers: int | None, what: str, made_by: str = "") -> dict:
    """The argument that keeps a checkpoint's first N layers; more than it has would come out untrained."""
    if num_layers is None:
        return {}
    have = _load(AutoConfig, path, what, made_by).get_text_config().num_hidden_layers
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


# ------------------------------------------------------------------------------------------------------- value models


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
    model = _load(
        AutoModelForSequenceClassification,
        path,
        "base of the value models",
        spec.made_by,
        dtype=dtype,
        num_labels=1,
        **_layers(path, spec.num_layers, "base of the value models", spec.made_by),
    )
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
            return _load_adapter(base, init_checkpoint, is_trainable=True).to(device)
        torch.nn.init.zeros_(base.score.weight)
        return get_peft_model(base, lora_config(spec.lora, "SEQ_CLS", modules_to_save=["score"])).to(device)


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
    check_adapter_folder(folder, "value model", value_model_command(folder.name, folder))
    _check_trained_for(folder, tokenizer, config.value_model.pooling)
    base = _value_base(config, config.value_model, tokenizer, vocab_size, torch.float32)
    return _load_adapter(base, folder)


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
        check_adapter_folder(folder, f"value model of {name}", value_model_command(name, folder))
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


def _load_adapter(
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


# ------------------------------------------------------------------------------------------------- policies of adapters


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
            model = _load_adapter(model, folder, name=f"adapter{len(loaded)}")
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
        try:
            policy = get_peft_model(model, lora_config(lora))
        except ValueError as error:
            modules = list(lora.target_modules)
            raise DataError(f"lora.target_modules {modules} do not fit {model.name_or_path}: {error}") from error
    return policy, tokenizer


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


# ------------------------------------------------------------------------------------------------------ reward models


def load_sequence_classifier(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32, what: str = "reward model", made_by: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification checkpoint and its tokenizer, both with a padding token (GPT-2 has none of its own)."""
    tokenizer = load_tokenizer(path, made_by=made_by)
    model = _load(AutoModelForSequenceClassification, path, what, made_by, dtype=dtype)
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
        model = _load(
            AutoModelForSequenceClassification,
            path,
            "base model",
            made_by,
            dtype=torch.float32,
            num_labels=1,
            **_layers(path, num_layers, "base model", made_by),
        )
        if model.get_input_embeddings().num_embeddings < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device), tokenizer


def load_encoder(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sentence encoder (headless) and its tokenizer."""
    return _load(AutoModel, path, "encoder", dtype=dtype).to(device).eval(), load_tokenizer(path)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().num_embeddings


def input_embeddings(model: PreTrainedModel) -> torch.Tensor:
    """The input embeddings (V, E), float32 on the CPU."""
    return model.get_input_embeddings().weight.detach().float().cpu()


def merge_adapter(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """The base with a LoRA adapter added into its weights, in eval mode."""
    check_adapter_folder(Path(adapter), "adapter")
    return _load_adapter(base, adapter).merge_and_unload().eval()


def resolved_config(path: str):
    """A checkpoint's configuration."""
    return _load(AutoConfig, path, "configuration")
