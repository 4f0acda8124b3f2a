"""The paper's models made small: random weights, and the published architectures, tokenizer classes and quirks."""

import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BartTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from utils.config import REPOSITORY

TEXT = (
    "\n\nHuman: How do I bake a loaf of bread?\n\nAssistant: Mix flour, water, salt and yeast, wait, and bake it.",
    "### Instruction: Generate a one-sentence summary of this post. ### Input: my neighbour's dog barks ### Response: ",
    "the dog of my neighbour barks at night and I do not know how to ask them for silence",
)


def merges(pre_tokenizer, special: list[str], size: int, alphabet=()) -> tuple[dict, list]:
    """Vocabulary and merges of a byte-pair encoding of the made-up text, as the tokenizer classes take them."""
    inner = Tokenizer(token_models.BPE(unk_token=special[0]))
    inner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    model = json.loads(inner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama_tokenizer(extra: str = "") -> LlamaTokenizer:
    """<s> in front, a word's space as a mark before it, bytes for what is unknown, and no padding token.

    `extra` shifts the ids of all tokens behind it: another vocabulary.
    """
    special = ["<unk>", "<s>", "</s>", *([extra] if extra else []), *(f"<0x{i:02X}>" for i in range(256))]
    vocab, pairs = merges(pre_tokenizers.Metaspace(), special, 360)
    return LlamaTokenizer(vocab=vocab, merges=pairs, add_bos_token=True, add_eos_token=False, legacy=False)


def byte_level(special: list[str], size: int) -> tuple[dict, list]:
    return merges(pre_tokenizers.ByteLevel(add_prefix_space=False), special, size, pre_tokenizers.ByteLevel.alphabet())


def spread(model, seed: int):
    """Random weights of a size at which outputs differ clearly from text to text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15, generator=generator)
    return model.eval()


def save_llama(folder: Path, tokenizer=None, *, kv_heads: int = 4, seed: int = 0) -> None:
    """Llama-2 (kv_heads 4 of 4) or TinyLlama (grouped: 2 of 4); the vocabulary is the tokenizer's, without [PAD]."""
    tokenizer = tokenizer or llama_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    spread(LlamaForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_gpt2_reward(folder: Path, seed: int) -> None:
    """A scalar head, and no padding token in the model or the tokenizer; 1,024 positions."""
    vocab, pairs = byte_level(["<|endoftext|>"], 320)
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=pairs, model_max_length=1024)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=1024, num_labels=1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    assert config.pad_token_id is None and tokenizer.pad_token is None
    spread(GPT2ForSequenceClassification(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_distilbert(folder: Path, seed: int) -> None:
    """Lower-cased word pieces between [CLS] and [SEP], two labels, 512 positions."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [
        *letters,
        *(f"##{c}" for c in letters),
        *"?!.,:;'#-",
        "human",
        "assistant",
        "dog",
        "bread",
        "##ing",
        "the",
    ]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    tokenizer = DistilBertTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=512)
    config = DistilBertConfig(vocab_size=len(words), dim=32, hidden_dim=48, n_layers=2, n_heads=2, pad_token_id=0)
    spread(DistilBertForSequenceClassification(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_bart(folder: Path, seed: int) -> None:
    """Reads its logits at the last </s>; a text's own `</s></s>` are tokens, and the ends of a batch must agree."""
    vocab, pairs = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 320)
    tokenizer = BartTokenizer(vocab=vocab, merges=pairs, model_max_length=1024)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=1024,
        id2label={0: "made up", 1: "faithful"}, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    spread(BartForSequenceClassification(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_all(folder: Path) -> Path:
    """Every model that configs/paper_7b.yaml names, and a copy of it in which only the values of `path:` differ."""
    makers = {
        "meta-llama/Llama-2-7b-hf": lambda f: save_llama(f),
        "TinyLlama/TinyLlama_v1.1": lambda f: save_llama(f, kv_heads=2, seed=1),
        "Ray2333/gpt2-large-helpful-reward_model": lambda f: save_gpt2_reward(f, 2),
        "Ray2333/gpt2-large-harmless-reward_model": lambda f: save_gpt2_reward(f, 3),
        "mohameddhiab/humor-no-humor": lambda f: save_distilbert(f, 4),
        "Tristan/gpt2_reward_summarization": lambda f: save_gpt2_reward(f, 5),
        "CogComp/bart-faithful-summary-detector": lambda f: save_bart(f, 6),
    }
    lines = []
    for line in (REPOSITORY / "configs/paper_7b.yaml").read_text().splitlines():
        head, key, value = line.partition(" path: ")
        if key:
            name = value.strip()
            makers.pop(name)(folder / name)
            line = f"{head}{key}{folder / name}"
        lines.append(line)
    assert not makers, f"not in the configuration: {list(makers)}"
    file = folder / "paper_small.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def without_paths(value):
    """A configuration as plain data with every `path` taken out."""
    if isinstance(value, dict):
        return {k: without_paths(v) for k, v in value.items() if k != "path"}
    return [without_paths(v) for v in value] if isinstance(value, list) else value


def plain(file: Path) -> dict:
    return yaml.safe_load(file.read_text())
