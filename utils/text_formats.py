"""Pure string rules: how a row becomes a prompt, what the human said in it, and the text each model is shown.

A data set's configuration names one `Format`; nothing here knows a data set's name. No module of the project is needed
to use these rules but the configuration's dataclasses, and nothing here reads a file or a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from utils.errors import nearest
from utils.specs import DatasetSpec


class RowDropped(Exception):
    """A row that gives no prompt (or no response); the message is the reason, in a few words that can be counted."""


NO_COLUMN = "no usable column"  # the reason of a row that lacks every column its format reads


@dataclass(frozen=True)
class Format:
    """One way in which a data set writes its prompts."""

    prompt_of_row: Callable[[Mapping], str]  # a row of the source -> the data set's prompt; raises RowDropped
    response_of_row: Callable[[Mapping], str]  # a row -> the response that fine-tuning imitates; raises RowDropped
    user_of_prompt: Callable[[str], str]  # the human's words in a prompt, stripped; text without markers comes back
    wrap_user: Callable[[str], str]  # a user's own text -> a prompt like the data set's; raises ValueError if empty
    columns: tuple[str, ...]  # the columns a row may bring its prompt in, for messages


def _text(value: object) -> str:
    """A cell as text; "" for anything else (a missing cell is None, or NaN where a table was read by pandas)."""
    return value if isinstance(value, str) else ""


def _unicode(text: str) -> str:
    """The text itself, if it can be written to a file: JSON can carry half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowDropped("not valid Unicode") from None
    return text


def _first_text(row: Mapping, names: tuple[str, ...]) -> str:
    """The first non-empty text among these columns, or ""."""
    return next((text for text in (_text(row.get(name)) for name in names) if text.strip()), "")


def answer_texts(tokenizer, responses: Sequence[Sequence[int]]) -> list[str]:
    """The texts of answers given as token ids, as rewards read them and files keep them, wherever answers come from:
    without special tokens, and without the white space around them that a length limit or a template leaves."""
    return [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]


# What a response is called in tables that were already split into prompt and response.
RESPONSE_COLUMNS = ("response", "completion", "reference_response", "reference_responses", "summary")

# ---------------------------------------------------------------------------------------------------------- dialogue
# "\n\nHuman: ...\n\nAssistant: ...", as in HH-RLHF.

HUMAN, ASSISTANT = "Human:", "Assistant:"
ASSISTANT_TURN = "Assistant: "  # the prompt ends after the first one (the published rule), its space included


def _dialogue_user(prompt: str) -> str:
    return prompt.strip().removeprefix(HUMAN).removesuffix(ASSISTANT).strip()


def _dialogue_wrap(text: str) -> str:
    body = text.strip()
    user = _dialogue_user(text)
    if not user:
        raise ValueError("the prompt is empty: give the user's text")
    if body.startswith(HUMAN) and body.endswith(ASSISTANT):
        return text
    return f"\n\n{HUMAN} {user}\n\n{ASSISTANT_TURN}"


def _dialogue_prompt(row: Mapping) -> str:
    given = _text(row.get("prompt"))
    chosen = _text(row.get("chosen"))
    if not given.strip() and not chosen.strip():
        if "prompt" in row or "chosen" in row:
            raise RowDropped("empty text")
        raise RowDropped(NO_COLUMN)
    if given.strip():
        prompt = given
    else:
        end = chosen.find(ASSISTANT_TURN)
        if end < 0:
            raise RowDropped("no assistant turn")
        prompt = chosen[: end + len(ASSISTANT_TURN)]
    if not _dialogue_user(prompt):
        raise RowDropped("empty text")
    return _unicode(_dialogue_wrap(prompt) if given.strip() else prompt)


def first_response(dialogue: str) -> str:
    """The assistant's first turn in a dialogue, stripped; "" if it has none."""
    _, found, rest = dialogue.partition(ASSISTANT_TURN)
    return rest.split(f"\n\n{HUMAN}", 1)[0].strip() if found else ""


def last_turn(dialogue: str) -> tuple[str, str]:
    """A dialogue as (everything up to and including the last "Assistant:", the last response), the response stripped.

    Raises:
        RowDropped: it has no assistant turn.
    """
    head, found, response = dialogue.rpartition(f"\n\n{ASSISTANT}")
    if not found:
        raise RowDropped("no assistant turn")
    return f"{head}{found} ", response.strip()


def _dialogue_response(row: Mapping) -> str:
    chosen = _text(row.get("chosen"))
    response = _first_text(row, RESPONSE_COLUMNS) or first_response(chosen)
    if not response.strip() and _text(row.get("prompt")).strip() and ASSISTANT_TURN not in chosen:
        response = chosen  # rows of prompt, chosen, rejected, whose chosen is the response alone
    if not response.strip():
        raise RowDropped("empty response")
    return _unicode(response.strip())


# ------------------------------------------------------------------------------------------------------- instruction
# One line that asks for the summary of a post, as in the TL;DR experiments.

INSTRUCTION = "### Instruction: Generate a one-sentence summary of this post. ### Input: "
ANSWER = " ### Response: "


def _one_line(text: str) -> str:
    return re.sub(r"\r\n?|\n", " ", text)


def _instruction_user(prompt: str) -> str:
    return prompt.strip().removeprefix(INSTRUCTION.strip()).removesuffix(ANSWER.strip()).strip()


def _instruction_wrap(text: str) -> str:
    user = _instruction_user(text)
    if not user:
        raise ValueError("the prompt is empty: give the post")
    if text.startswith(INSTRUCTION) and text.rstrip().endswith(ANSWER.strip()):
        return text
    return f"{INSTRUCTION}{_one_line(user)}{ANSWER}"


def post_of_query(query: str) -> str:
    """The post in a TL;DR query (SUBREDDIT: ... TITLE: ... POST: ... TL;DR:), or "" if it has none."""
    start = re.search(r"(?:^|\n)POST:", query)
    if not start:
        return ""
    post = query[start.end() :]
    end = re.search(r"\n\s*TL;DR:\s*$", post)
    return (post[: end.start()] if end else post).strip()


def _instruction_prompt(row: Mapping) -> str:
    given = _text(row.get("prompt"))
    if given.strip():
        if not _instruction_user(given):
            raise RowDropped("empty text")
        return _unicode(_instruction_wrap(given))
    info = row.get("info")
    if isinstance(info, Mapping):
        post = _text(info.get("post"))
    elif "post" in row:
        post = _text(row["post"])
    elif "query" in row:
        post = post_of_query(_text(row["query"]))
    elif "prompt" in row:
        post = ""
    else:
        raise RowDropped(NO_COLUMN)
    if not post.strip():
        raise RowDropped("no post")  # e.g. the news articles among the validation rows
    return _unicode(f"{INSTRUCTION}{_one_line(post)}{ANSWER}")


def _instruction_response(row: Mapping) -> str:
    summaries, choice = row.get("summaries"), row.get("choice")
    if isinstance(summaries, (list, tuple)) and isinstance(choice, int) and 0 <= choice < len(summaries):
        chosen = summaries[choice]
        response = _text(chosen.get("text") if isinstance(chosen, Mapping) else chosen)
    else:
        response = _first_text(row, (*RESPONSE_COLUMNS, "chosen"))
    if not response.strip():
        raise RowDropped("empty response")
    return _unicode(response.strip())


# ---------------------------------------------------------------------------------------------------- what is offered

FORMATS: dict[str, Format] = {
    "dialogue": Format(
        _dialogue_prompt, _dialogue_response, _dialogue_user, _dialogue_wrap, columns=("chosen", "prompt")
    ),
    "instruction": Format(
        _instruction_prompt,
        _instruction_response,
        _instruction_user,
        _instruction_wrap,
        columns=("info.post", "post", "query", "prompt"),
    ),
}


def format_of(spec: DatasetSpec) -> Format:
    """The format of a data set; `load_config` has seen that there is one."""
    return FORMATS[spec.prompt_format]


def fill(template: str, **fields: str) -> str:
    """Put the fields into a template in one pass, so that braces in a field stay what they are.

    Raises:
        ValueError: the template has a field that is not given.
    """

    def value(match: re.Match) -> str:
        if match[1] not in fields:
            raise ValueError(f"template {template!r} has an unknown field {match[0]}; {nearest(match[1], fields)}")
        return fields[match[1]]

    return re.sub(r"\{(\w+)\}", value, template)


def shown_to_reference(spec: DatasetSpec, prompt: str) -> str:
    """What the reference reads for a prompt: `reference_template` with {prompt} and {user}."""
    return fill(spec.reference_template, prompt=prompt, user=format_of(spec).user_of_prompt(prompt))


def reward_text(template: str, *, prompt: str, user: str, shown: str, response: str, bos: str, eos: str) -> str:
    """What a reward model reads: `ObjectiveSpec.text` with its fields; bos and eos may be None (then empty)."""
    return fill(template, prompt=prompt, user=user, shown=shown, response=response, bos=bos or "", eos=eos or "")


def prompt_hash(prompt: str) -> float:
    """A number in [0, 1) that depends on the human's words alone: the same on every machine and in every format.

    `prompt` is a prompt of any format or the user's text itself; both give the same number. Case and white space do
    not count, so that near-copies of a prompt fall on the same side of a split.
    """
    text, before = prompt, None
    while text != before:
        before = text
        for fmt in FORMATS.values():
            text = fmt.user_of_prompt(text)
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits are exact in a float, so 1.0 is never reached
