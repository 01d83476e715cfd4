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
from itertools import islice
from pathlib import Path

import msgspec
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.faults import DataError
from medusa_exp.data.messages import Conversation, Message
from medusa_exp.data.template import REFUSED, ChatTemplate
from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_MAX_CATEGORIES = 16
_FAR_TIMES = 4
"""Where a prompt is so many times too long, and would be without the reasoning in it, later ones of
its conversation are not tried: each has all that stands before it, but for what templates leave
out of earlier turns. To render each of thousands would take a time that is quadratic in turns."""
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
    template, max_tokens = ChatTemplate(tokenizer), max(0, max_tokens)
    left_out: Counter[str] = Counter()
    found = (
        prompt
        for conversation in conversations
        for prompt in _prompts_in(
            _Asked(conversation, tokenizer, template), max_tokens, has_room, left_out
        )
    )
    prompts = list(islice(found, num_prompts))
    for reason, count in left_out.items():
        log.warning("data: prompts left out: %d (%s)", count, reason)
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


def _prompts_in(
    asked: "_Asked", max_tokens: int, has_room: HasRoom, left_out: Counter[str]
) -> Iterator[Prompt]:
    """Yield the prompts of a conversation that fit; count the others, by why they do not."""
    too_long = f"more than {max_tokens} tokens"
    for number, turn in enumerate(asked.turns):
        try:
            prompt = asked.prompt(turn)
        except DataError:
            left_out[REFUSED] += 1
            continue
        if len(prompt.input_ids) > max_tokens:
            left_out[too_long] += 1
            if asked.is_longer_from_here_on(prompt, turn, _FAR_TIMES * max_tokens):
                left_out[too_long] += len(asked.turns) - number - 1
                return
        elif not has_room(len(prompt.input_ids)):
            left_out[NO_ROOM] += 1
        else:
            yield prompt


class _Asked:
    """The turns of a conversation that are to be answered, and their prompts."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
    ) -> None:
        self._conversation, self._tokenizer = conversation, tokenizer
        self._template = template.with_tools(conversation.tools)
        roles = [message.role for message in conversation.messages]
        self.turns = [turn for turn, role in enumerate(roles) if role == "assistant" and turn]

    def prompt(self, turn: int) -> Prompt:
        """Return all that stands before a turn.

        Raises:
            DataError: the template refuses it.
        """
        conversation = self._conversation
        text, ids = self._rendered(conversation.messages[:turn])
        return Prompt(f"{conversation.id}#{turn}", category_of(conversation.id), text, ids)

    def is_longer_from_here_on(self, prompt: Prompt, turn: int, num_tokens: int) -> bool:
        """Have this prompt and all later ones more than so many tokens?"""
        messages = self._conversation.messages[:turn]
        if len(prompt.input_ids) <= num_tokens or not any(m.reasoning for m in messages):
            return len(prompt.input_ids) > num_tokens
        shorter = [msgspec.structs.replace(message, reasoning="") for message in messages]
        try:
            return len(self._rendered(shorter)[1]) > num_tokens
        except DataError:
            return False

    def _rendered(self, messages: list[Message]) -> tuple[str, list[int]]:
        text = self._template.prompt(messages)
        return text, self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def category_of(conversation_id: str) -> str:
    """Return an id without its running number: arithmetic-000123 is of category arithmetic.

    The digest that stands for the id of a chat without one has no kind in it.
    """
    if re.fullmatch(r"sha256-[0-9a-f]{16}", conversation_id):
        return "all"
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


_NOT_READ = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises of a text that is no JSON, not UTF-8, or nested too deeply."""


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
    except _NOT_READ:
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
    except _NOT_READ as error:
        raise DataError(f"{place} is no question: {error}.") from error
    if not record.turns:
        raise DataError(f"{place} is no question: turns is empty.")
    return Question(str(record.question_id), record.category, tuple(record.turns))
