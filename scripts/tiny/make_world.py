"""Make the tiny world: the files of its two data sets and a base model trained from scratch on its language.

    python scripts/tiny/make_world.py            # workspaces/tiny; about half a minute on 2 CPU cores

Deterministic, offline, and skipped when it is complete. Ends with the base model's cross-entropy beside the
generator's entropy, which no model can beat.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import quiet_libraries, run

VERSION = 5  # of what is made; another number makes the world again
NUM_TEST_PROMPTS, NUM_POSTS, NUM_TEST_POSTS = 120, 600, 120
NUM_HUMOR = {"train": 5000, "test": 500}
ANSWER_WORDS = 16
SPECIAL = ("[PAD]", "<s>", "</s>", "<unk>")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="make the tiny world: data files and a base model trained from scratch")
    parser.add_argument("--config", default="configs/tiny.yaml", help="configuration whose workspace is filled")
    parser.add_argument("--workspace", help="folder to fill (default: the configuration's)")
    parser.add_argument("--steps", type=int, default=800, help="training steps of the base model (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the training (default: 0)")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    from utils.config import load_config

    workspace = load_config(args.config, args.workspace).workspace
    settings = {"version": VERSION, "steps": args.steps, "seed": args.seed}
    report_file = workspace / "world" / "report.json"
    if report_file.exists() and json.loads(report_file.read_text())["settings"] == settings:
        print(f"the tiny world is complete: {workspace}")
        print(describe(json.loads(report_file.read_text())))
        return 0
    import torch

    torch.set_num_threads(1)  # as fast as more at this size, and the same sums on every machine
    report = make_world(workspace, **settings)
    print(f"made the tiny world: {workspace}")
    print(describe(report))
    return 0


def describe(report: dict) -> str:
    lines = [
        f"base model on {name} (test prompts): cross-entropy {r['cross_entropy']:.3f} nats per answer token, "
        f"the generator's own {r['generator']:.3f} on the same answers"
        for name, r in report.items()
        if isinstance(r, dict) and "generator" in r
    ]
    return "\n".join([*lines, f"the generator's entropy {report['entropy']:.3f} ({report['seconds']:.0f} s to make)"])


def make_world(workspace: Path, *, steps: int = 800, seed: int = 0, version: int = VERSION) -> dict:
    """Write `base_model/` and `world/` below the workspace, each moved into place when it is whole, and return the
    report that `world/report.json` holds."""
    start = time.monotonic()
    workspace = Path(workspace)
    draft = workspace / ".world.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    texts = write_data(draft / "world", seed)
    model, tokenizer, report = train_base(texts, steps, seed)
    quiet_libraries()
    model.save_pretrained(draft / "base_model")
    tokenizer.save_pretrained(draft / "base_model")
    report["seconds"] = time.monotonic() - start
    report["settings"] = {"version": version, "steps": steps, "seed": seed}
    (draft / "world" / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for name in ("base_model", "world"):  # the report, the mark of completeness, arrives last
        shutil.rmtree(workspace / name, ignore_errors=True)
        (draft / name).rename(workspace / name)
    draft.rmdir()
    return report


# ------------------------------------------------------------------------------------------------------------ the data


def write_data(folder: Path, seed: int) -> dict[str, list[str]]:
    """The data sets' files; returns the user texts of each data set and split."""
    import numpy as np

    from utils import tiny_world as tiny

    rng = np.random.default_rng([seed, 1])
    prompts = [tiny.all_prompts()[i] for i in rng.permutation(len(tiny.all_prompts()))]
    posts = list(dict.fromkeys(tiny.make_post(rng) for _ in range(2 * NUM_POSTS)))[: NUM_POSTS + NUM_TEST_POSTS]
    texts = {
        "anthropic/train": prompts[NUM_TEST_PROMPTS:],
        "anthropic/test": prompts[:NUM_TEST_PROMPTS],
        "summary/train": posts[NUM_TEST_POSTS:],
        "summary/test": posts[:NUM_TEST_POSTS],
    }

    def answers(users):
        return [tiny.words_of(a) for a in tiny.sample_answers([tiny.subject_of(u) for u in users], rng, ANSWER_WORDS)]

    for split in ("train", "test"):
        # chosen and rejected are two plain answers in no order of merit: fine-tuning leaves the language alone.
        users = texts[f"anthropic/{split}"]
        rows = zip(users, answers(users), answers(users), strict=True)
        write_jsonl(
            folder / f"anthropic/{split}.jsonl.gz",
            [{"chosen": tiny.dialogue(u, a), "rejected": tiny.dialogue(u, b)} for u, a, b in rows],
        )
        users = texts[f"summary/{split}"]
        write_csv(folder / f"summary/{split}.csv.gz", {"post": users, "summary": answers(users)})

        # Labelled dialogues for humor: about as many answers that rhyme with the subject as that do not.
        users = texts[f"anthropic/{split}"]
        users = [users[i] for i in rng.integers(len(users), size=NUM_HUMOR[split])]
        lines = answers(users)
        score = tiny.humor_reward(users, lines)
        low, high = np.quantile(score, [0.4, 0.6])
        rows = [(u, a, s) for u, a, s in zip(users, lines, score, strict=True) if s <= low or s >= high]
        write_csv(
            folder / f"humor/{split}.csv.gz",
            {"text": [tiny.dialogue(u, a) for u, a, _ in rows], "humor": [int(s >= high) for *_, s in rows]},
        )
    return texts


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0))  # no time of day in the file: the same bytes every time


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_csv(path: Path, columns: dict[str, list]) -> None:
    import csv

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_bytes(path, text.getvalue().encode())


# ------------------------------------------------------------------------------------------------------ the base model


def build_tokenizer():
    """One token per word, whatever stands between words; <s> in front, [PAD] apart from </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from utils import tiny_world as tiny
    from utils.text_formats import FORMATS

    frames = [
        tiny.dialogue("", ""),
        FORMATS["instruction"].wrap_user(tiny.WORDS[0]),
        *tiny.OPENERS,
        *tiny.CLOSERS,
        *tiny.POST_OPENERS,
        *tiny.POST_LINKS,
    ]
    words = dict.fromkeys(word for text in (*frames, " ".join(tiny.WORDS)) for word in text.split())
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="[PAD]",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def train_base(texts: dict[str, list[str]], steps: int, seed: int):
    """A Llama of three small layers, trained from scratch on fresh answers to the training prompts of both data sets.

    Returns the model, the tokenizer and a report: the generator's entropy and, per data set, the cross-entropy of the
    model and of the generator on fresh answers to test prompts, in nats per token.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils import tiny_world as tiny
    from utils.text_formats import FORMATS

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    word_ids = np.array([*tokenizer.convert_tokens_to_ids(list(tiny.WORDS)), tokenizer.eos_token_id])  # (W + 1,)
    show = {"anthropic": lambda user: tiny.dialogue(user, ""), "summary": FORMATS["instruction"].wrap_user}
    pools = {  # prompts as (subject, ids)
        key: [(tiny.subject_of(user), tokenizer(show[key.split("/")[0]](user))["input_ids"]) for user in users]
        for key, users in texts.items()
    }

    def batch(pool, size, rng):
        """Right-padded prompts with fresh answers: ids (B, T) and the mask of the answers' tokens (B, T)."""
        picked = [pools[pool][i] for i in rng.integers(len(pools[pool]), size=size)]
        answers = tiny.sample_answers([subject for subject, _ in picked], rng, ANSWER_WORDS)
        rows = [prompt + word_ids[answer].tolist() for (_, prompt), answer in zip(picked, answers, strict=True)]
        ids = torch.full((size, max(map(len, rows))), tokenizer.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, (row, (_, prompt)) in enumerate(zip(rows, picked, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, len(prompt) : len(row)] = True
        log_probs = [tiny.log_prob(subject, answer) for (subject, _), answer in zip(picked, answers, strict=True)]
        return ids, mask, -sum(log_probs) / int(mask.sum())

    def answer_loss(ids, mask):
        logits = model(input_ids=ids[:, :-1], attention_mask=(ids[:, :-1] != tokenizer.pad_token_id)).logits
        return torch.nn.functional.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]])

    rng = np.random.default_rng([seed, 2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        # One data set at a time: their prompts differ in length, and padding would double the work.
        ids, mask, _ = batch("summary/train", 32, rng) if step % 2 else batch("anthropic/train", 64, rng)
        loss = answer_loss(ids, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if sys.stderr.isatty() and step % 50 == 0:
            print(f"\rbase model: step {step}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    model.eval()
    with torch.inference_mode():
        report = {"entropy": tiny.entropy_per_token(ANSWER_WORDS + 1)}
        for name in show:
            ids, mask, generator = batch(f"{name}/test", 1000, np.random.default_rng([seed, 3]))
            report[name] = {"cross_entropy": answer_loss(ids, mask).item(), "generator": generator}
    return model, tokenizer, report


if __name__ == "__main__":
    raise SystemExit(run(main))
