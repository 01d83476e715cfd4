"""Which keys of a record and of its turns hold something that is not read: they are counted."""

from typing import Any

from medusa_exp.data.forms import FORMS, LABELLED
from medusa_exp.data.records import IDS, SYSTEMS, at
from medusa_exp.data.trees import TREE_KEYS, has_nested, is_tree
from medusa_exp.data.turn_lists import (
    ASKED_AND_SAID,
    LISTS,
    ROLE_KEYS,
    WHAT,
    WORDS,
    is_turn,
    listed,
)
from medusa_exp.data.turns import (
    CALLS,
    CHANNELS,
    LABELS,
    PICTURES,
    REASONING,
    SPEAKERS,
    TOOLS,
    USED,
    WHO,
    Record,
    Unusable,
    from_json_text,
    is_held,
    name_in,
    role_called,
    said_in,
    texts_of,
)

_OTHER_WORDS = {*SPEAKERS, *WORDS}
_OF_TURNS = {
    *("from", "role", "value", "content", "channel", "isThought"),
    *(*USED, *PICTURES, *SPEAKERS, *WORDS, *ROLE_KEYS, *ASKED_AND_SAID),
}
"""Keys of turns that may be read."""


def unused_keys(record: Any, form: str, keys: tuple[str, ...]) -> set[str]:
    """Return the keys of a record and (`messages[].name`) of its turns that hold what is not read.

    `keys` are those of its form.
    """
    if isinstance(record, list):
        return {f"[].{key}" for key in _beside(listed(record))}
    of_record = {"id"} if form == "messages" else {*IDS}
    of_record |= set() if form == "columns" else {*SYSTEMS, *TOOLS, *PICTURES}
    if form in LABELLED:
        of_record |= {key for key in LABELS if isinstance(record.get(key), bool)}
    found = _held_keys(record, {*keys, *of_record})
    if form == "columns":
        found |= _beside_paths(record, keys)
    for key in set() if form in ("mapping", "replies") else set(keys) & record.keys():
        found |= {f"{key}[].{name}" for name in _beside(_list_in(record, key))}
        if form == "body" and isinstance(request := from_json_text(record[key]), dict):
            of_chat = (*FORMS["messages"].keys, *FORMS["contents"].keys)
            found |= {f"{key}.{name}" for name in unused_keys(request, "contents", of_chat)}
    return found


def _beside_paths(record: Record, paths: tuple[str, ...]) -> set[str]:
    """Return the keys of records and turns that stand below paths into a record, and are not read.

    Those in lists of records are not looked at.
    """
    found = set()
    for path in {path for path in paths if "." in path and path not in record}:
        found |= {f"{path}[].{name}" for name in _beside(listed(at(record, path)))}
        above = path.rpartition(".")[0]
        if isinstance(place := from_json_text(at(record, above)), dict):
            names = _held_keys(place, set())
            found |= {f"{above}.{n}" for n in names if not _is_on_way(f"{above}.{n}", paths)}
    return found


def _is_on_way(place: str, paths: tuple[str, ...]) -> bool:
    return any(f"{path}.".startswith(f"{place}.") for path in paths)


def _beside(turns: Any) -> set[str]:
    """Return the keys of turns that are not read, or say otherwise than the key that counts."""
    if not isinstance(turns, list):
        return set()
    is_of_branches = is_tree(turns) or has_nested(turns)
    found = _not_read(turns, _OF_TURNS | ({*TREE_KEYS} if is_of_branches else set()))
    for turn in turns:
        found |= _passed_over(turn) if isinstance(turn, dict) else set()
    return found


def _passed_over(turn: Record) -> set[str]:
    """Return the keys of a turn for who speaks, or what, in place of which `_usual` takes others.

    Unless they say the same.
    """
    who, what, roles = (
        [key for key in keys if is_held(turn.get(key))] for keys in (WHO, WHAT, ROLE_KEYS)
    )
    found = {
        key
        for first, *others in filter(None, (who, what))
        for key in _OTHER_WORDS & {*others}
        if _plain(turn[key]) != _plain(turn[first])
    }
    asked = [key for key in ASKED_AND_SAID if is_held(turn.get(key))]
    is_beside = bool(who or what or {*roles} - {"system"})
    found |= set(asked if is_beside or len(asked) == 1 else ())
    return found | set(roles and (roles if who else what))


def _plain(value: Any) -> Any:
    """Return what is said, in whatever form: the role of a name, the text of parts."""
    try:
        return role_called(texts_of(said_in(value))[1].strip())
    except Unusable:
        return value


def _list_in(record: Record, key: str) -> Any:
    """Return what stands under a key as forms read it: turns may be JSON in a text, or one."""
    inner = listed(record[key])
    inner = [inner] if is_turn(inner) else inner
    is_of_turns = isinstance(inner, list) and bool(inner) and is_turn(inner[0])
    return inner if key in LISTS or is_of_turns else record[key]


def _not_read(turns: list[Any], used: set[str]) -> set[str]:
    """Return the keys of turns that hold what is not read; `used` are those that are."""
    turns = [turn for turn in turns if isinstance(turn, dict)]
    found = {key for turn in turns for key in _held_keys(turn, {*used, "name"})}
    # A tool's name is read; and what is the assistant's alone is read of its turns alone.
    for turn in turns:
        if is_held(turn.get("channel")) and turn["channel"] not in CHANNELS:
            found.add("channel")
        role = role_called(name_in(turn))
        if role != "tool" and "name" not in used and is_held(turn.get("name")):
            found.add("name")
        if role in ("user", "system", "tool"):
            found |= {key for key in (*REASONING, *CALLS) if is_held(turn.get(key))}
            found |= {key for key in ("train", "training", "loss") if turn.get(key) is True}
    return found


def _held_keys(record: Record, used: set[str]) -> set[str]:
    """Return keys that are not used and not empty: in a table, all records have all keys."""
    return {k for k, v in record.items() if k not in used and is_held(v)}
