"""What a raw chat holds beside its turns: ids, system texts, and keys that do not say the same."""

from dataclasses import dataclass, field
from typing import Any

from medusa_exp.data.turn_lists import WHAT, Record, bare, get, turns_of
from medusa_exp.data.turns import (
    Unusable,
    decoded,
    fields_of,
    first_held,
    is_held,
    is_switched_on,
    reasoning_of,
    role_called,
    texts_of,
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


class Ambiguous(Exception):
    """A raw chat that may be read in several ways; its text says in which."""


@dataclass(frozen=True)
class Chat:
    """A raw chat as turns, with the system text that stood beside them."""

    turns: list[Any]
    system: Any = None
    tools_in: Record = field(default_factory=dict)
    """The record within the record that they stand in, with what else holds for all of it."""


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
        inner = decoded(get(record, first))
    return at(inner, rest) if dot else inner


def system_in(record: Any) -> Any:
    """Return the system text beside the turns."""
    said = [key for key in SYSTEMS if is_held(get(record, key))]
    check_alike(record, said)
    value = record[said[0]] if said else get(record, "system")
    inner = decoded(value)
    if not (isinstance(inner, dict) and is_held(inner)):
        return None if isinstance(inner, dict) else value
    found = first_held(inner, ("parts", "content", "text", "value"))
    if found is None:
        raise Unusable(BAD_SYSTEM, f"its keys are {', '.join(map(str, inner))}")
    return bare(found)


def check_alike(record: Record, keys: list[str]) -> None:
    """Refuse a record in which several keys may be meant, unless they hold the same."""
    if len(keys) > 1 and any(record[key] != record[keys[0]] for key in keys):
        raise Ambiguous(f"the keys {' and '.join(keys)}")


def check_same_talk(talks: Record, system: Any) -> None:
    """Refuse a record with two lists of turns, unless they say the same: the first would count."""
    held = {key: turns for key, turns in talks.items() if isinstance(turns, list) and turns}
    said = [_said_in(turns, system) for turns in held.values()] if len(held) > 1 else []
    if any(one != said[0] for one in said):
        raise Ambiguous(f"the keys {' and '.join(held)}")


def _said_in(turns: list[Any], system: Any) -> list[Any]:
    """Return all that turns say, after the system text beside them, which one list may repeat."""
    found = [_all_said(turn) for turn in turns_of(turns) or []]
    before = [_all_said({"role": "system", "content": system})] if is_held(system) else []
    return found if found[:1] == before else before + found


def _all_said(turn: Any) -> Any:
    """Return what is read of a turn, in whatever form it stands there."""
    if not isinstance(turn, dict):
        return turn
    role, said = role_called(first_held(turn, ("from", "role"))), first_held(turn, WHAT)
    try:
        thought, said = texts_of(bare(said))
    except Unusable:
        thought = ""
    if role != "assistant":
        return role, said, fields_of(turn, role, is_row=True)
    of_assistant = (reasoning_of(turn) or thought, is_switched_on(turn))
    return role, said, fields_of(turn, role, is_row=True), *of_assistant
