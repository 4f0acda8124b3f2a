"""A language model of a few thousand weights, trained from scratch on lines of text: a stand-in for a real base model.

    python docs/examples/small_base.py --texts texts.txt --output_dir base_model      # 15 seconds on one CPU core

One token a word, a Llama of two small layers, an ordinary checkpoint. Each line of the file is one text; in it `\\n`
stands for a line's end. It makes docs/your_own.md run offline in a minute; for anything else take a pretrained model.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import quiet_libraries, run
from utils.errors import DataError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="file with one text per line")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 64 texts (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the texts (default: 0)")
    return parser


def word_tokenizer(texts: list[str]):
    """One token per word of the texts, <s> in front, [PAD] apart from </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for text in texts for word in text.split())
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "<s>", "</s>", "<unk>", *words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if (args.output_dir / "config.json").exists():
        print(f"{args.output_dir} is there; nothing to do (remove it to make it again)")
        return 0
    texts = [line.replace("\\n", "\n") for line in args.texts.read_text().splitlines() if line.strip()]
    if not texts:
        raise DataError(f"{args.texts}: no text in this file")

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet_libraries()
    tokenizer = word_tokenizer(texts)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    batch = tokenizer([text + " </s>" for text in texts], padding=True, padding_side="right", return_tensors="pt")
    ids = batch["input_ids"][:, :64]  # (N, T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)
    for _ in range(args.steps):
        rows = ids[torch.randint(len(ids), (64,))]
        loss = model(input_ids=rows, labels=rows.masked_fill(rows == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output_dir)
    model.eval().save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {model.num_parameters():,} weights, {loss.item():.2f} nats per token at the end")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
