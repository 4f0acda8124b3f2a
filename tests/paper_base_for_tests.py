"""A base model like the paper's, made small: a random Llama whose tokenizer has <s> </s> <unk> and no padding token."""

from pathlib import Path

import yaml

from utils.config import REPOSITORY, load_config

TEXT = (
    "\n\nHuman: How do I bake a loaf of bread?\n\nAssistant: Mix flour, water, salt and yeast, wait, and bake it.",
    "### Instruction: Generate a one-sentence summary of this post. ### Input: my neighbour's dog barks ### Response: ",
)


def build_tokenizer():
    """Byte-level BPE of 300 tokens trained on made-up text; <s> in front of a text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_base(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def paper_config(folder: Path, base: Path, workspace: Path, **dataset_entries):
    """The paper's configuration over another base, with entries of its data sets replaced; written into `folder`."""
    data = yaml.safe_load((REPOSITORY / "configs/paper_7b.yaml").read_text())
    data["base_model"]["path"] = str(base)
    data["workspace"] = str(workspace)
    for spec in data["datasets"].values():
        spec.update(dataset_entries)
    file = folder / "paper_small.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_config(file)
