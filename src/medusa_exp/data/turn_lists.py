"""Lists of turns in all the words that files have for who speaks and what is said."""

from typing import Any

from medusa_exp.data.turns import USED, decoded, first_held

Record = dict[str, Any]

SPEAKERS = ("sender", "speaker", "author")
WORDS = ("parts", "text", "utterance")
WHO, WHAT = ("from", "role", *SPEAKERS), ("value", "content", *WORDS)
"""Keys of a turn, the first of which counts."""
ROLE_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot"),
}
"""Names of roles that are keys of texts themselves."""
ROLE_KEYS = ("system", *ROLE_NAMES["user"], *ROLE_NAMES["assistant"])


def is_turn(value: Any) -> bool:
    """Tell a message that stands for itself from a record."""
    if not isinstance(value, dict):
        return False
    of_turns = {"from", "role", "value", "content", "name", *USED, *SPEAKERS, *WORDS}
    named = value.keys() & {"from", "role", *SPEAKERS}
    said = value.keys() & {"value", "content", *WORDS}
    return bool(named and said) and value.keys() <= of_turns


def get(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


def turns_of(value: Any) -> list[Any] | None:
    """Return the turns of a list of them, or of a single one; None for all else."""
    value = decoded(value)
    if is_turn(value):
        value = [value]
    if not isinstance(value, list) or not value:
        return None
    if is_alternation(value):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(value)]
    return [turn for item in value for turn in _usual(item)]


def is_alternation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)


def _usual(item: Any) -> list[Any]:
    """Return turns of role and content of an item that says both in other words."""
    if isinstance(item, list) and is_alternation(item) and len(item) == 2:
        return [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
    if not isinstance(item, dict):
        return [item]
    if item.keys() & {"value", "content"} and item.keys() & {"from", "role"}:
        return [item]
    role, said = first_held(item, WHO), first_held(item, WHAT)
    if role is not None and said is not None:
        return [{**item, "role": role, "content": bare(said)}]
    names = [key for key, value in item.items() if value is not None and key in ROLE_KEYS]
    if role is None and names:
        # What stands beside the texts is looked at in each turn: it may be of any.
        beside = {key: value for key, value in item.items() if key not in ROLE_KEYS}
        return [{**beside, "role": key, "content": item[key]} for key in names]
    return [item]


def bare(parts: Any) -> Any:
    """Return parts, as a list has them, with the bare text of those that have nothing else."""
    if not isinstance(parts, list):
        return parts
    return [
        part["text"] if isinstance(part, dict) and part.keys() == {"text"} else part
        for part in parts
    ]
