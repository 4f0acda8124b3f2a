"""What reward models and judges are trained on: preference pairs and labelled texts, with the text each model is shown.

A pair's last assistant turn is the response, what comes before it the conversation. How the conversation is shown
follows the data set's `reference_template`: a template of the whole {prompt} is filled with the conversation; a
template of the {user}'s words is filled once per turn, each answer between them closed by the end token. That is what
the reference itself would have read after such a conversation, and a single turn gets exactly its prompt.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from utils.cli import progress
from utils.data import in_hash_range
from utils.errors import DataError
from utils.rows import iter_rows
from utils.specs import Config, DatasetSpec, ObjectiveSpec, SourceSpec
from utils.text_formats import ASSISTANT, RowDropped, format_of, last_turn, shown_to_reference

TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


@dataclass(frozen=True)
class Conversation:
    """What comes before a response: the fields of `ObjectiveSpec.text`, and the first prompt, which splits go by."""

    prompt: str
    user: str
    shown: str
    first: str

    @property
    def single_turn(self) -> bool:
        return self.prompt == self.first


@dataclass(frozen=True)
class Pair:
    conversation: Conversation
    chosen: str
    rejected: str


@dataclass(frozen=True)
class LabelledText:
    conversation: Conversation
    text: str
    label: int


def dataset_of(config: Config, objective: ObjectiveSpec) -> DatasetSpec:
    """The first data set of the configuration that has the objective: its prompts' format is the pairs'."""
    for spec in config.datasets.values():
        if objective.name in spec.objectives:
            return spec
    raise DataError(f"{config.path}: no data set has the objective {objective.name}")


def dialogue_turns(conversation: str) -> list[tuple[str, str]]:
    """A dialogue that waits for an answer, as [(the human's words, the answer)]; the last answer is ""."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + conversation.strip())
    turns: list[list[str]] = []
    for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
        if speaker == "Human":
            if turns and not turns[-1][1]:  # two turns of the human without an answer between them
                turns[-1][0] += "\n\n" + text.strip()
            else:
                turns.append([text.strip(), ""])
        elif turns:
            turns[-1][1] = "\n\n".join(filter(None, (turns[-1][1], text.strip())))
    return [(human, answer) for human, answer in turns]


def conversation_of(spec: DatasetSpec, prompt: str, first: str, eos: str) -> Conversation:
    """The fields of a conversation (see the module's text); `prompt` is the data set's prompt, or a longer dialogue."""
    user = format_of(spec).user_of_prompt(prompt)
    turns = dialogue_turns(prompt)
    if "{prompt}" in spec.reference_template or len(turns) < 2:
        return Conversation(prompt, user, shown_to_reference(spec, prompt), first)
    shown = [shown_to_reference(spec, human) + answer + f"{eos}\n" for human, answer in turns[:-1]]
    return Conversation(prompt, user, "".join(shown) + shown_to_reference(spec, turns[-1][0]), first)


def _responses(row: dict) -> tuple[str, str, str]:
    """(prompt or conversation, chosen response, rejected response) of a row; raises RowDropped."""
    summaries, choice = row.get("summaries"), row.get("choice")
    if isinstance(summaries, (list, tuple)) and len(summaries) == 2 and choice in (0, 1):
        texts = [str(s.get("text") if isinstance(s, dict) else s).strip() for s in summaries]
        return "", texts[choice], texts[1 - choice]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise RowDropped("no text in chosen and rejected")
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        prompt = row["prompt"]
        return "", chosen.removeprefix(prompt).strip(), rejected.removeprefix(prompt).strip()
    (head, chosen), (other, rejected) = last_turn(chosen), last_turn(rejected)
    if head.strip() != other.strip():
        raise RowDropped("the two have different prompts")
    return head, chosen, rejected


def read_pairs(
    config: Config,
    spec: DatasetSpec,
    source: SourceSpec,
    *,
    eos: str = "",
    max_rows: int | None = None,
    data_files: Sequence[str] = (),
    counts: Counter | None = None,
) -> list[Pair]:
    """The source's preference pairs in their order, without those whose two sides are equal or answer other prompts.

    Args:
        source: its hash range is that of the first prompt, so a split shares no prompt with another.
        counts: filled with how many rows each rule dropped.
    """
    format_, pairs = format_of(spec), []
    counts = Counter() if counts is None else counts
    for row in progress(iter_rows(source, config, data_files), desc="rows", unit="row"):
        if max_rows is not None and len(pairs) >= max_rows:
            break
        try:
            first = format_.prompt_of_row(row)
            head, chosen, rejected = _responses(row)
        except RowDropped as dropped:
            counts[str(dropped)] += 1
            continue
        if not in_hash_range(first, source):
            continue
        if chosen == rejected:
            counts["the two are equal"] += 1
            continue
        head = head if len(dialogue_turns(head)) > 1 else first
        pairs.append(Pair(conversation_of(spec, head, first, eos), chosen, rejected))
    if not pairs:
        raise DataError(
            f"no preference pairs in {source.files or source.hub or data_files} ({dict(counts) or 'no rows'})"
        )
    return pairs


def read_labelled(
    config: Config,
    spec: DatasetSpec,
    objective: ObjectiveSpec,
    source: SourceSpec,
    *,
    eos: str = "",
    max_rows: int | None = None,
    data_files: Sequence[str] = (),
    counts: Counter | None = None,
) -> list[LabelledText]:
    """The source's labelled texts in their order, each shown as the answer to a prompt of the data set.

    A text that is a dialogue, or whose row has a `prompt`, brings its own. For any other a prompt is drawn, by the text
    alone: a reward of answers has to hold whatever was asked, and shown after one fixed prompt, a head may lean on
    states that other prompts change. A template without the prompt needs none.
    """
    training = objective.training
    drawn: list[str] | None = None if re.search(r"\{(prompt|user|shown)\}", objective.text) else [""]
    counts = Counter() if counts is None else counts
    texts = []
    for row in iter_rows(source, config, data_files):
        if max_rows is not None and len(texts) >= max_rows:
            break
        missing = [c for c in (training.text_column, training.label_column) if c not in row]
        if missing:
            raise DataError(
                f"no column {' and no '.join(map(repr, missing))} for {objective.name}; the rows have "
                f"{', '.join(map(repr, row))} (objectives.{objective.name}.training.text_column, label_column)"
            )
        text, label = str(row[training.text_column] or "").strip(), str(row[training.label_column]).strip().lower()
        if label not in TRUE + FALSE:
            raise DataError(f"a label of {objective.name} is {label!r}; expected 0 or 1, or true or false")
        try:
            prompt, text, first = _own_prompt(spec, row, text)
        except RowDropped as dropped:
            counts[str(dropped)] += 1
            continue
        if not in_hash_range(first or text, source):
            continue
        if not prompt:
            drawn = _prompts(config, spec) if drawn is None else drawn
            prompt = first = random.Random(text).choice(drawn)  # a string seeds by its SHA-512, the same everywhere
        conversation = conversation_of(spec, prompt, first, eos) if prompt else Conversation("", "", "", text)
        texts.append(LabelledText(conversation, text, int(label in TRUE)))
    if len({t.label for t in texts}) < 2:
        raise DataError(
            f"the labelled texts of {objective.name} must have both labels, found {len(texts)} texts ({dict(counts)})"
        )
    return texts


def _own_prompt(spec: DatasetSpec, row: dict, text: str) -> tuple[str, str, str]:
    """(conversation or "", response, first prompt or "") of a labelled text; raises RowDropped."""
    if not text:
        raise RowDropped("empty text")
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        prompt = format_of(spec).prompt_of_row(row)
        return prompt, text.removeprefix(row["prompt"].strip()).strip(), prompt
    dialogue = f"\n\n{text}"
    if len(dialogue_turns(dialogue)) and f"\n\n{ASSISTANT}" in dialogue:
        first = format_of(spec).prompt_of_row({"chosen": dialogue})
        head, response = last_turn(dialogue)
        return head if len(dialogue_turns(head)) > 1 else first, response, first
    return "", text, ""


def _prompts(config: Config, spec: DatasetSpec) -> list[str]:
    """Some prompts of the data set's training split."""
    source, prompts = spec.splits["train"], []
    for row in iter_rows(source, config):
        try:
            prompt = format_of(spec).prompt_of_row(row)
        except RowDropped:
            continue
        if in_hash_range(prompt, source):
            prompts.append(prompt)
        if len(prompts) == 1000:
            break
    return list(dict.fromkeys(prompts)) or [format_of(spec).wrap_user("Tell me something.")]
