"""What a model's passes cost: parameters, floating-point operations, bytes. Arithmetic on shapes; no model is made.

A multiplication and an addition are two operations. Counted are matrix products, which are nearly all of it: a matrix
of p parameters costs 2 p per token, and attention 4 * heads * head size per pair of a query and a key that it sees
(scores and mixing). Norms, rotary embeddings, softmax and the look-up of embeddings are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A transformer as far as its costs go.

    Attributes:
        layers: of the decoder (or of an encoder alone).
        encoder_layers: of an encoder-decoder's encoder; its decoder layers then also attend to the encoder.
        mlp_matrices: hidden x mlp matrices of a layer: 3 where the MLP is gated, else 2.
        causal: whether a token sees only what is before it.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    mlp_matrices: int
    vocab: int
    encoder_layers: int = 0
    causal: bool = True


def shape_of(config: Any) -> Shape:
    """The shape behind a transformers configuration (a `Shape` is itself).

    Raises:
        ValueError: an architecture whose names are not known here.
    """
    if isinstance(config, Shape):
        return config
    if not config.is_encoder_decoder:
        config = config.get_text_config()
    kind = config.model_type
    if kind == "distilbert":
        heads, size = config.n_heads, config.dim // config.n_heads
        return Shape(config.n_layers, config.dim, heads, heads, size, config.hidden_dim, 2, config.vocab_size,
                     causal=False)  # fmt: skip
    if kind == "bart":
        heads, size = config.decoder_attention_heads, config.d_model // config.decoder_attention_heads
        return Shape(config.decoder_layers, config.d_model, heads, heads, size, config.decoder_ffn_dim, 2,
                     config.vocab_size, encoder_layers=config.encoder_layers)  # fmt: skip
    if kind == "gpt2":
        heads, mlp = config.n_head, config.n_inner or 4 * config.n_embd
        return Shape(config.n_layer, config.n_embd, heads, heads, config.n_embd // heads, mlp, 2, config.vocab_size)
    gated = {"llama": True, "mistral": True, "qwen2": True, "qwen3": True, "gpt_neox": False, "bert": False}
    if kind not in gated:
        known = ", ".join((*gated, "gpt2", "bart", "distilbert"))
        raise ValueError(f"no costs of a {kind!r} model are known; known: {known}")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        config.num_hidden_layers, config.hidden_size, heads, getattr(config, "num_key_value_heads", 0) or heads, size,
        config.intermediate_size, 3 if gated[kind] else 2, config.vocab_size, causal=kind != "bert",
    )  # fmt: skip


def layer_parameters(shape: Shape) -> int:
    """Matrix parameters of a layer, its cross-attention apart: queries, output, keys, values, MLP."""
    attention = shape.hidden * shape.head_size * (2 * shape.heads + 2 * shape.kv_heads)
    return attention + shape.mlp_matrices * shape.hidden * shape.mlp


def matrix_parameters(config: Any, *, num_layers: int | None = None, head: bool = False) -> int:
    """Parameters that a pass multiplies by: what it reads of the weights. `head`: the language-modelling head too."""
    shape = shape_of(config)
    layers = shape.layers if num_layers is None else num_layers
    cross = 4 * shape.hidden * shape.hidden * layers if shape.encoder_layers else 0
    return (layers + shape.encoder_layers) * layer_parameters(shape) + cross + head * shape.hidden * shape.vocab


def attention_pairs(tokens: float, context: float = 0, *, causal: bool = True) -> float:
    """Pairs of a query and a key that it sees: `tokens` new ones behind `context` others, each seeing itself too."""
    return tokens * context + (tokens * (tokens + 1) / 2 if causal else tokens * tokens)


def attention_flops(config: Any, pairs: float, *, num_layers: int | None = None) -> float:
    """Operations of the scores and the mixing of `pairs` of queries and keys, in every layer."""
    shape = shape_of(config)
    return 4 * (shape.layers if num_layers is None else num_layers) * shape.heads * shape.head_size * pairs


def forward_flops(
    config: Any, tokens: float, context: float = 0, *, num_layers: int | None = None, head_tokens: float = 0
) -> float:
    """Operations of a forward pass over one sequence's new tokens.

    Args:
        config: a transformers configuration or a `Shape`.
        tokens: that are read; context: tokens before them whose keys and values are cached.
        num_layers: only the first so many layers (default: all).
        head_tokens: tokens whose logits over the vocabulary are made.
    """
    shape = shape_of(config)
    linear = 2 * matrix_parameters(shape, num_layers=num_layers) * tokens
    if shape.encoder_layers:  # encoder, then decoder over as many tokens
        own = attention_flops(shape, attention_pairs(tokens))
        across = attention_flops(shape, tokens * tokens)
        inside = attention_flops(shape, tokens * tokens, num_layers=shape.encoder_layers)
        attention = own + across + inside
    else:
        pairs = attention_pairs(tokens, context, causal=shape.causal)
        attention = attention_flops(shape, pairs, num_layers=num_layers)
    return linear + attention + 2 * shape.hidden * shape.vocab * head_tokens


def adapter_parameters(config: Any, rank: int, *, num_layers: int | None = None) -> int:
    """Parameters of a LoRA adapter on every matrix of every layer: rank * (inputs + outputs) each."""
    shape = shape_of(config)
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sides = 2 * (shape.hidden + wide) + 2 * (shape.hidden + narrow) + shape.mlp_matrices * (shape.hidden + shape.mlp)
    return rank * sides * (shape.layers if num_layers is None else num_layers)


def training_flops(config: Any, tokens: float, *, num_layers: int | None = None, rank: int | None = None) -> float:
    """Operations of a forward and a backward pass over one sequence.

    A product's backward pass costs as much again for each of its two sides that needs a gradient: 3 forward passes in
    all for trained weights and for attention, 2 for frozen weights, under a LoRA adapter of `rank`, whose own cost 3.
    """
    forward = forward_flops(config, tokens, num_layers=num_layers)
    if rank is None:
        return 3 * forward
    frozen = 2 * matrix_parameters(config, num_layers=num_layers) * tokens
    return 3 * forward - frozen + 3 * 2 * adapter_parameters(config, rank, num_layers=num_layers) * tokens


def cache_bytes(config: Any, tokens: float, *, num_layers: int | None = None, width: int = 2) -> float:
    """Bytes of the keys and values of so many tokens; `width` bytes a number."""
    shape = shape_of(config)
    layers = shape.layers if num_layers is None else num_layers
    return 2 * layers * shape.kv_heads * shape.head_size * tokens * width
