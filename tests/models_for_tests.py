"""Small random models of the architectures that the decoder supports."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

VOCAB = 61

_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=96,
)

CONFIGS = {
    "llama_grouped_tied": LlamaConfig(**_SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "llama_full": LlamaConfig(**_SMALL, num_key_value_heads=4, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, n_embd=32, n_layer=3, n_head=4, n_positions=96
    ),
    "gpt_neox": GPTNeoXConfig(**_SMALL),
    "qwen2": Qwen2Config(**_SMALL, num_key_value_heads=2),
    "mistral": MistralConfig(**_SMALL, num_key_value_heads=2, sliding_window=None),
}
WINDOWED = {"mistral_window": MistralConfig(**_SMALL, num_key_value_heads=2, sliding_window=12)}


def _spread(model, seed: int):
    """Random weights of a size that makes the distributions uneven, so that an error shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(
                    0.0,
                    0.25 if "embed" in name or "wte" in name or "score" in name or "lm_head" in name else 0.12,
                    generator=generator,
                )
    return model.eval()


def causal_lm(name: str, seed: int = 0, dtype=torch.float64):
    return _spread(AutoModelForCausalLM.from_config((CONFIGS | WINDOWED)[name]), seed).to(dtype)


def value_model(name: str, seed: int = 1, dtype=torch.float64, layers: int = 2, pooling: str = "last"):
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict())
    config.num_labels, config.num_hidden_layers, config.pad_token_id = 1, layers, None
    config.value_pooling = pooling
    return _spread(AutoModelForSequenceClassification.from_config(config), seed).to(dtype)
