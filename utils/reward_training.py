"""Training reward models from preference pairs or labelled texts: a linear head on a frozen trunk, or every layer."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from utils import models, pooled_reward
from utils.cached_models import context_length
from utils.errors import UsageError
from utils.files import read_json, write_atomically
from utils.judge import Judge, fit_judge_labels, fit_judge_pairs
from utils.preferences import Conversation, LabelledText, Pair, dataset_of, read_labelled, read_pairs
from utils.rewards import RewardSet, text_before_response
from utils.specs import Config, ObjectiveSpec, RewardTrainingSpec
from utils.text_formats import fill, reward_text

HOLDOUT_LABELS = 1000  # held-out labelled texts: an interval of 1 to 3 points
METRICS = "metrics.json"

Examples = Sequence[Pair] | Sequence[LabelledText]


def read_examples(
    config: Config, spec: ObjectiveSpec, eos: str, data_files: Sequence[str] = ()
) -> tuple[Examples, Examples, dict]:
    """(training examples, held-out examples, how many rows each rule dropped of the training source)."""
    training, dataset, counts = spec.training, dataset_of(config, spec), Counter()
    if training.kind == "preference":
        source, holdout = (
            read_pairs(config, dataset, s, eos=eos, max_rows=rows, data_files=data_files, counts=c)
            for s, rows, c in (
                (training.source, training.max_rows, counts),
                (training.holdout, training.max_holdout_rows, Counter()),
            )
        )
    else:
        source, holdout = (
            read_labelled(config, dataset, spec, s, eos=eos, max_rows=rows, data_files=data_files, counts=c)
            for s, rows, c in (
                (training.source, training.max_rows, counts),
                (training.holdout, training.max_holdout_rows or HOLDOUT_LABELS, Counter()),
            )
        )
    return source, holdout, counts


def sides(examples: Examples) -> tuple[list[Conversation], list[str]]:
    """Conversations and responses to be scored: of each pair the chosen one, then the rejected one."""
    if isinstance(examples[0], Pair):
        return [e.conversation for e in examples for _ in range(2)], [
            r for e in examples for r in (e.chosen, e.rejected)
        ]
    return [e.conversation for e in examples], [e.text for e in examples]


def correct(examples: Examples, logits: np.ndarray) -> np.ndarray:
    """(N,) whether each pair's chosen side, or each text's label, is what the logits of `sides` say; a tie is half."""
    if isinstance(examples[0], Pair):
        margin = logits[::2] - logits[1::2]
    else:
        margin = logits * np.array([1 if e.label else -1 for e in examples])
    return (margin > 0) + 0.5 * (margin == 0)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def accuracy(examples: Examples, logits: np.ndarray) -> dict:
    """Held-out accuracy with its interval; of pairs also on single turns, which is how answers are scored."""
    right = correct(examples, logits)
    report = {"accuracy": float(right.mean()), "interval": wilson(float(right.mean()), len(right)), "n": len(right)}
    single = np.array([isinstance(e, Pair) and e.conversation.single_turn for e in examples])
    if single.any():
        report["single_turn"] = {"accuracy": float(right[single].mean()), "n": int(single.sum())}
    return report


def bag_of_words(source: Examples, holdout: Examples) -> tuple[Judge, float]:
    """A judge that reads words alone, and its accuracy on the same held-out examples."""
    if isinstance(source[0], Pair):
        groups = [e.conversation.first for e in source]
        judge = fit_judge_pairs([e.chosen for e in source], [e.rejected for e in source], groups)
    else:
        judge = fit_judge_labels([e.text for e in source], [e.label for e in source])
    return judge, float(correct(holdout, judge.score(sides(holdout)[1])).mean())


# --------------------------------------------------------------------------------------------------------- linear head


def train_linear(
    config: Config,
    spec: ObjectiveSpec,
    output: Path,
    source: Examples,
    holdout: Examples,
    device: torch.device,
    bf16: bool = False,
) -> dict:
    """Fit a linear head on the frozen trunk's features, save it, and report on the held-out examples.

    Features are kept in <workspace>/reward_models/features, named by their content: a killed run goes on, and another
    penalty costs seconds.
    """
    training, path = spec.training, config.locate(config.base_model.path)
    tokenizer = models.load_tokenizer(path, made_by=config.base_model.made_by)
    trunk = models.load_trunk(path, training.num_layers, device, made_by=config.base_model.made_by)
    fingerprint = pooled_reward.trunk_fingerprint(trunk)

    def features(examples: Examples, desc: str) -> np.ndarray:
        conversations, responses = sides(examples)
        before = [text_before(spec, c, tokenizer) for c in conversations]
        encoded = pooled_reward.encode_texts(tokenizer, before, responses, training.max_length)
        return pooled_reward.cached_features(
            trunk,
            encoded,
            tokenizer.pad_token_id,
            config.default_path("reward_models", "features"),
            key=f"{fingerprint} {training.num_layers} layers",
            desc=f"features of {desc}",
            autocast=bf16,
        )

    inside, outside = features(source, "the training texts"), features(holdout, "the held-out texts")
    weight, bias, l2, cross_validated = fit_head(source, inside, training.l2)
    train_logits, logits = inside @ weight + bias, outside @ weight + bias
    weight, bias, empty_value = pooled_reward.standardised(weight, bias, inside)
    head = pooled_reward.PooledHead(
        weight=weight.astype(np.float32),
        bias=float(bias),
        empty_value=empty_value,
        trunk=config.base_model.path,
        num_layers=training.num_layers,
        max_length=training.max_length,
        fingerprint=fingerprint,
    )
    pooled_reward.save_head(output, head)
    return accuracy(holdout, logits) | {
        "cross_validated": {
            "accuracy": cross_validated,
            "interval": wilson(cross_validated, len(source)),
            "n": len(source),
        },
        "train_accuracy": float(correct(source, train_logits).mean()),
        "l2": l2,
    }


def text_before(spec: ObjectiveSpec, conversation: Conversation, tokenizer) -> str:
    """What a pooled objective's model reads before the response."""
    c, bos, eos = conversation, tokenizer.bos_token or "", tokenizer.eos_token or ""
    return fill(text_before_response(spec), prompt=c.prompt, user=c.user, shown=c.shown, bos=bos, eos=eos)


def fit_head(source: Examples, features: np.ndarray, l2: float) -> tuple[np.ndarray, float, float, float]:
    """Weight (H,), intercept, the penalty used, and the accuracy on held-out fifths of the training prompts.

    `l2` of 0 has the penalty chosen on those fifths. They are many more examples than the held-out ones, and a penalty
    fixed beforehand leaves their accuracy as honest.
    """
    groups = [e.conversation.first if isinstance(e, Pair) else e.text for e in source]
    if isinstance(source[0], Pair):
        chosen, rejected = features[::2], features[1::2]
        x, y = (chosen - rejected).astype(np.float64), np.ones(len(source))

        def fit(rows, l2):
            return pooled_reward.fit_bradley_terry(chosen[rows], rejected[rows], l2)
    else:
        x, y = features.astype(np.float64), np.array([e.label for e in source], np.float64)

        def fit(rows, l2):
            return pooled_reward.fit_labels(x[rows], y[rows], l2)

    l2 = l2 or pooled_reward.choose_l2(fit, x, y, groups)
    margins = pooled_reward.held_out_margins(fit, x, y, groups, l2)
    return *fit(np.arange(len(source)), l2), l2, float(((margins > 0) + 0.5 * (margins == 0)).mean())


# ---------------------------------------------------------------------------------------------------------- full model


def train_full(
    config: Config,
    spec: ObjectiveSpec,
    output: Path,
    source: Examples,
    holdout: Examples,
    device: torch.device,
    bf16: bool = False,
    report_to: str = "none",
) -> dict:
    """Fine-tune the base's first layers with a scalar head, save a sequence-classification checkpoint, and report.

    Pairs go to TRL's RewardTrainer (Bradley-Terry), labelled texts to transformers' Trainer (binary cross-entropy).
    `output` is to be a folder that is thrown away where this fails (`files.whole_folder`); a killed run starts again.

    Raises:
        DataError: rewards that are no finite numbers, since the training diverged.
    """
    training = spec.training
    model, tokenizer = models.new_sequence_classifier(
        config.locate(config.base_model.path), device, num_layers=training.num_layers, seed=training.seed,
        special_tokens=config.base_model.special_tokens, made_by=config.base_model.made_by,
    )  # fmt: skip
    limit = min(training.max_length, context_length(model) or training.max_length)
    conversations, responses = sides(source)
    rows = tokenizer(
        [full_text(spec, c, r, tokenizer) for c, r in zip(conversations, responses, strict=True)],
        truncation=True,
        max_length=limit,
    )["input_ids"]
    settings = {
        "output_dir": str(output / "trainer"),
        "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.lr,
        "num_train_epochs": training.num_epochs,
        "seed": training.seed,
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",
        "report_to": report_to,
        "logging_strategy": "no" if report_to == "none" else "steps",
        "logging_steps": 50,
        "activation_checkpointing": False,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    trainer = (_pair_trainer if isinstance(source[0], Pair) else _label_trainer)(
        model, tokenizer, source, rows, settings
    )
    trainer.train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    shutil.rmtree(output / "trainer", ignore_errors=True)
    trained = dataclasses.replace(
        spec, kind="classifier", path=str(output.absolute()), label=0, sign=1.0, max_length=limit
    )
    rewards = RewardSet(
        dataclasses.replace(config, objectives={**config.objectives, spec.name: trained}),
        dataset_of(config, spec),
        [spec.name],
        device,
    )
    conversations, responses = sides(holdout)
    fields = zip(*((c.prompt, c.user, c.shown) for c in conversations), strict=True)
    return accuracy(holdout, rewards.score_texts(*map(list, fields), responses)[spec.name])


def full_text(spec: ObjectiveSpec, conversation: Conversation, response: str, tokenizer) -> str:
    """What a classifier reads."""
    c = conversation
    return reward_text(
        spec.text,
        prompt=c.prompt,
        user=c.user,
        shown=c.shown,
        response=response,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
    )


def _pair_trainer(model, tokenizer, source, rows, settings):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = Dataset.from_dict({"chosen_ids": rows[::2], "rejected_ids": rows[1::2]})
    arguments = RewardConfig(**settings, max_length=None)
    return RewardTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)


def _label_trainer(model, tokenizer, source, rows, settings):
    from transformers import Trainer, TrainingArguments

    from utils.batching import pad_right

    model.config.problem_type = "multi_label_classification"  # binary cross-entropy on the one logit
    examples = [{"input_ids": ids, "label": float(e.label)} for ids, e in zip(rows, source, strict=True)]

    def collate(batch):
        ids, mask = pad_right([b["input_ids"] for b in batch], tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([[b["label"]] for b in batch])}

    arguments = TrainingArguments(**settings, remove_unused_columns=False)
    return Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)


# -------------------------------------------------------------------------------------------------------------- report


def write_metrics(output: Path, metrics: dict) -> None:
    """metrics.json, written last: it marks a complete folder."""
    write_atomically(output / METRICS, json.dumps(metrics, indent=1) + "\n")


def read_metrics(output: Path) -> dict:
    """What an earlier run reported, or {}."""
    return read_json(output / METRICS) or {}


def summary(name: str, metrics: dict) -> str:
    """One line for the terminal."""
    low, high = metrics["interval"]
    single, crossed = metrics.get("single_turn"), metrics.get("cross_validated")
    parts = [
        f"{name}: held-out accuracy {metrics['accuracy']:.1%} (95 % {low:.1%} to {high:.1%}, n {metrics['n']})",
        *([f"single turns {single['accuracy']:.1%} (n {single['n']})"] if single else []),
        f"bag of words {metrics['bag_of_words']:.1%}",
        *([f"cross-validated {crossed['accuracy']:.1%} (n {crossed['n']})"] if crossed else []),
        f"{metrics['seconds']:.0f} s",
    ]
    return ", ".join(parts)


def arguments_of(training: RewardTrainingSpec, bf16: bool, data_files: Sequence[str]) -> dict:
    """What a run is known by."""
    plain = json.loads(json.dumps(dataclasses.asdict(training)))
    return plain | {"bf16": bf16, "data_files": [str(f) for f in data_files]}


def check_head(config: Config, spec: ObjectiveSpec) -> None:
    """Raise a UsageError where the head is not of the kind that the configuration will look for."""
    kind = {"linear": "pooled", "full": "classifier"}[spec.training.head]
    if spec.kind != kind:
        raise UsageError(
            f"--head {spec.training.head} makes a reward model of kind {kind!r}, but objectives.{spec.name}.kind in "
            f"{config.path} is {spec.kind!r}; change it there, or give an --output_dir of its own"
        )
