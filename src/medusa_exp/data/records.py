"""What a raw chat holds beside its turns: ids, system texts, and keys that do not say the same."""

from dataclasses import dataclass, field
from typing import Any

from medusa_exp.data.turn_lists import WHAT, get, role_in, turns_of
from medusa_exp.data.turns import (
    Record,
    Unusable,
    fields_of,
    first_filled,
    from_json_text,
    has_calls,
    is_caller,
    is_held,
    is_switched_on,
    name_in,
    reasoning_of,
    texts_of,
    with_calls,
)

BAD_SYSTEM = "a system text in an unknown form"
IDS = (
    "id",
    "custom_id",
    "conversation_id",
    "conversation_hash",
    "message_tree_id",
    "prompt_id",
    "uuid",
)
SYSTEMS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")


NOT_ALIKE = ", which do not say the same"


class Ambiguous(Exception):
    """A raw chat that may be read in several ways: what is so, and what to do."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


@dataclass(frozen=True)
class Chat:
    """A raw chat as turns, with the system text that stood beside them."""

    turns: list[Any]
    system: Any = None
    tools_in: Record = field(default_factory=dict)
    """The record within the record that they stand in, with what else holds for all of it."""
    more: tuple[str, ...] = ()
    """Keys that were read, which usually are not in its form."""
    passed_over: tuple[str, ...] = ()
    """Keys that were not read, which usually are."""
    reasoning: str = ""
    """What was thought before the last answer, where dataset.columns names its key."""


def id_in(record: Any) -> Any:
    """Return what a record calls itself, or None."""
    return next((record[key] for key in IDS if get(record, key) not in (None, "")), None)


def at(record: Any, path: str) -> Any:
    """Follow a path into a record; a key that has the dots itself comes first."""
    if (value := get(record, path)) is not None:
        return value
    first, dot, rest = path.partition(".")
    if isinstance(record, list) and first.isdigit() and int(first) < len(record):
        inner = record[int(first)]
    else:
        inner = from_json_text(get(record, first))
    return at(inner, rest) if dot else inner


def has(record: Any, path: str) -> bool:
    """Is there such a path in a record, whatever stands at its end?"""
    if isinstance(record, dict) and path in record:
        return True
    first, dot, rest = path.partition(".")
    return has(at(record, first), rest) if dot else at(record, path) is not None


def system_in(record: Any) -> Any:
    """Return the system text beside the turns."""
    said = [key for key in SYSTEMS if is_held(get(record, key))]
    check_alike(record, said)
    return system_text(record[said[0]] if said else get(record, "system"))


def system_text(value: Any) -> Any:
    """Return a system text, or the parts of one, of what stands under its key.

    A text stays one though it is JSON, as it would be in a turn, unless that is parts of a text.

    Raises:
        Unusable: it is an object of other keys than those of texts.
    """
    inner = from_json_text(value)
    if isinstance(inner, list) and all(isinstance(part, dict) and "text" in part for part in inner):
        return inner
    is_of_parts = isinstance(inner, dict) and {"parts"} <= inner.keys() <= {"parts", "role"}
    if isinstance(value, str) and not is_of_parts:
        return value if is_held(value) else None
    if not (isinstance(inner, dict) and is_held(inner)):
        return None if isinstance(inner, dict) else value
    found = first_filled(inner, ("parts", "content", "text", "value"))
    if found is None:
        raise Unusable(BAD_SYSTEM, f"its keys are {', '.join(map(str, inner))}")
    return found


def check_alike(record: Record, keys: list[str], columns: str = "") -> None:
    """Refuse a record in which several keys may be meant, unless they hold the same.

    `columns` is what dataset.columns would say of it, with KEY in the place of these.

    Raises:
        Ambiguous: they do not; says how to choose.
    """
    if len(keys) > 1 and any(record[key] != record[keys[0]] for key in keys):
        raise _clash(keys, columns)


def _clash(keys: list[str], columns: str) -> Ambiguous:
    what = f"can be read by the keys {' and '.join(keys)}{NOT_ALIKE}"
    choices = [f"'dataset.columns={{{columns.replace('KEY', key)}}}'" for key in keys]
    return Ambiguous(what, f"Choose: {' or '.join(choices)}." if columns else "")


def columns_in(record: Record, columns: str, beside: tuple[str, ...] = ()) -> str:
    """Return what dataset.columns would say to read all that a record holds.

    It is empty where they cannot: keys `beside` those hold something that belongs to the question.
    """
    if any(is_held(record.get(key)) for key in beside):
        return ""
    systems = [key for key in SYSTEMS if is_held(record.get(key))]
    return f"{columns}, system: {systems[0]}" if systems else columns


def check_same_talk(talks: Record, system: Any, columns: str) -> None:
    """Refuse a record with two lists of turns, unless they say the same: the first would count."""
    held = {key: turns for key, turns in talks.items() if isinstance(turns, list) and turns}
    said = [_said_in(turns, system) for turns in held.values()] if len(held) > 1 else []
    if any(one != said[0] for one in said):
        raise _clash([*held], columns)


def _said_in(turns: list[Any], system: Any) -> list[Any]:
    """Return all that turns say, after the system text beside them, which one list may repeat."""
    found = [all_said(turn) for turn in turns_of(turns) or []]
    before = [all_said({"role": "system", "content": system})] if is_held(system) else []
    return found if found[:1] == before else before + found


def all_said(turn: Any) -> Any:
    """Return what is read of a turn, in whatever form it stands there."""
    if not isinstance(turn, dict):
        return turn
    role, said = role_in(turn), first_filled(turn, WHAT)
    try:
        if is_caller(name_in(turn)):
            turn, said = with_calls(turn), ""
        thought, said = texts_of("" if said is None and has_calls(turn) else said)
    except Unusable:
        thought = ""
    if role != "assistant":
        return role, said, fields_of(turn, role, is_row=True)
    of_assistant = (reasoning_of(turn) or thought, is_switched_on(turn))
    return role, said, fields_of(turn, role, is_row=True), *of_assistant
