"""Files of questions in; what to ask, turn by turn, out.

Two forms: the question.jsonl of MT-bench and Spec-Bench (`question_id`, `category`, `turns`), and
plain text, a question a line.
"""

from codecs import BOM_UTF8 as BOM
from dataclasses import dataclass
from pathlib import Path

import msgspec

from medusa_exp.data.conversations import DataError


@dataclass(frozen=True)
class Question:
    """What a user asks, one turn after another."""

    question_id: str
    category: str
    turns: tuple[str, ...]


class _Record(msgspec.Struct):
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
        decoder = msgspec.json.Decoder(_Record)
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


def _question(decoder: msgspec.json.Decoder[_Record], line: bytes, place: str) -> Question:
    try:
        record = decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise DataError(f"{place} is no question: {error}.") from error
    if not record.turns:
        raise DataError(f"{place} is no question: turns is empty.")
    return Question(str(record.question_id), record.category, tuple(record.turns))
