"""Prompts for decoding: from conversations, or from a file of questions.

A file of questions has one of two forms: the question.jsonl of MT-bench and Spec-Bench
(`question_id`, `category`, `turns`), or plain text, a question a line.
"""

import logging
import re
from codecs import BOM_UTF8 as BOM
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.template import ChatTemplate
from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_MAX_CATEGORIES = 16
_FAR_TIMES = 4
"""A prompt that is so many times too long has no shorter ones behind it, in thousands of turns."""
HasRoom = Callable[[int], bool]
"""Says whether the model has positions for a prompt of so many tokens and a response to it."""
NO_ROOM = "no room before the model's positions turn otherwise"
"""Why a prompt shorter than the model's limit is left out (LongRoPE)."""


@dataclass(frozen=True)
class Prompt:
    """All that stands before one of the assistant's turns."""

    prompt_id: str
    category: str
    text: str
    input_ids: list[int]


def prompts_of(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    num_prompts: int,
    has_room: HasRoom = lambda _: True,
) -> list[Prompt]:
    """Return prompts for the first assistant turns whose prompts have at most `max_tokens`.

    Of a length, too, that leaves room for a response (`has_room`).

    Raises:
        UserError: no turn's has.
    """
    template = ChatTemplate(tokenizer)
    left_out: Counter[str] = Counter()
    prompts: list[Prompt] = []
    for conversation in conversations:
        for prompt in _of_conversation(conversation, tokenizer, template, left_out):
            if len(prompts) == num_prompts:
                break
            if len(prompt.input_ids) > max_tokens:
                left_out[f"more than {max_tokens} tokens"] += 1
            elif not has_room(len(prompt.input_ids)):
                left_out[NO_ROOM] += 1
            else:
                prompts.append(prompt)
            if len(prompt.input_ids) > _FAR_TIMES * max_tokens:
                break  # each is longer than the one before
        if len(prompts) == num_prompts:
            break
    for reason, count in left_out.items():
        log.warning("data: prompts left out: %s: %d", reason, count)
    if not prompts and not left_out:
        raise UserError("no held-out prompt is left: no conversation has a turn to be answered.")
    if not prompts:
        longer = "" if {*left_out} == {NO_ROOM} else ", or raise dataset.max_length"
        why = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise UserError(
            f"no held-out prompt is left ({why}). decode.max_new_tokens leaves {max_tokens} tokens "
            f"to a prompt: lower it{longer}."
        )
    return _merge_many_categories(prompts)


def _of_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    left_out: Counter[str],
) -> Iterator[Prompt]:
    category = category_of(conversation.id)
    template = template.with_tools(conversation.tools)
    for turn, message in enumerate(conversation.messages):
        if message.role != "assistant" or turn == 0:
            continue
        try:
            text = template.prompt(conversation.messages[:turn])
        except DataError:
            left_out["refused by the chat template"] += 1
            continue
        input_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        yield Prompt(f"{conversation.id}#{turn}", category, text, input_ids)


def category_of(conversation_id: str) -> str:
    """Return an id without its running number: arithmetic-000123 is of category arithmetic."""
    return re.sub(r"[-_#]?\d+$", "", conversation_id) or "all"


def _merge_many_categories(prompts: list[Prompt]) -> list[Prompt]:
    """Put all in one category where ids are names rather than numbered kinds."""
    if len({prompt.category for prompt in prompts}) <= _MAX_CATEGORIES:
        return prompts
    return [replace(prompt, category="all") for prompt in prompts]


@dataclass(frozen=True)
class Question:
    """What a user asks, one turn after another."""

    question_id: str
    category: str
    turns: tuple[str, ...]


class _QuestionLine(msgspec.Struct):
    question_id: int | str
    turns: list[str]
    category: str = "all"


def is_question_file(path: Path) -> bool:
    """Tell whether a file holds questions rather than conversations."""
    if path.suffix == ".txt":
        return True
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        lines = (line.removeprefix(BOM) for line in file)
        first = next((line for line in lines if line.strip()), b"")
    try:
        return "turns" in msgspec.json.decode(first, type=dict)
    except msgspec.MsgspecError:
        return False


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions.

    Raises:
        DataError: naming the file and the line that is no question, or a file without any.
    """
    if path.suffix == ".txt":
        # Not str.splitlines, which ends lines at marks inside of a text too.
        lines = [line.strip() for line in _text(path).split("\n")]
        questions = [
            Question(str(number), "all", (line,)) for number, line in enumerate(lines, 1) if line
        ]
    else:
        decoder = msgspec.json.Decoder(_QuestionLine)
        questions = [
            _question(decoder, line, f"{path}, line {number}")
            for number, line in enumerate(path.read_bytes().removeprefix(BOM).splitlines(), 1)
            if line.strip()
        ]
    if not questions:
        raise DataError(f"{path} holds no question.")
    return questions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error


def _question(decoder: msgspec.json.Decoder[_QuestionLine], line: bytes, place: str) -> Question:
    try:
        record = decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise DataError(f"{place} is no question: {error}.") from error
    if not record.turns:
        raise DataError(f"{place} is no question: turns is empty.")
    return Question(str(record.question_id), record.category, tuple(record.turns))
