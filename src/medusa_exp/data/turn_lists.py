"""Lists of turns in all the words that files have for who speaks and what is said."""

from collections.abc import Mapping
from typing import Any

from medusa_exp.data.trees import branch_in
from medusa_exp.data.turns import (
    CALLS,
    REASONING,
    ROLE_OF,
    ROLES,
    TWO_SYSTEMS,
    USED,
    WHO,
    Record,
    Unusable,
    as_parts,
    first_filled,
    from_json_text,
    is_held,
    name_in,
    role_called,
    said_in,
    thought_alone,
)

WORDS = ("parts", "text", "utterance")
WHAT = ("value", "content", *WORDS)
"""Keys of what is said in a turn, the first of which counts."""
TALKS = ("conversation", "chat_messages", "dialog", "dialogue", "internal")
LISTS = ("conversations", "messages", *TALKS, "contents", "conversation_a", "conversation_b")
"""Keys of lists of turns, and of nothing else."""
WRAPPERS = ("body", "params", "request")
"""Keys of a record within a record, which holds such lists."""
ROLE_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot"),
}
"""Names of roles that are keys of texts themselves."""
ROLE_KEYS = ("system", *ROLE_NAMES["user"], *ROLE_NAMES["assistant"])
ASKED_AND_SAID = {"input": "user", "output": "assistant"}
"""Keys of an item that is a question and its answer -> whose each is."""
_TYPES = ("human", "ai", "system", "tool", "function")
"""LangChain's names of roles, under `type`."""


def is_turn(value: Any) -> bool:
    """Tell a message from a record: is it one by its keys, all of which are a turn's?

    This is to be asked where either may stand; of what stands in a list, `names_a_turn` is enough.
    """
    return names_a_turn(value) and value.keys() <= {*WHO, *WHAT, "name", *USED}


def get(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


def listed(value: Any) -> Any:
    """Return the list that turns stand in, in one of the ways to write it; all else as it is.

    It may be JSON in a text, a list of such texts, or an object of columns of one length.
    LangChain's messages get a role and a content.
    """
    value = from_json_text(value)
    if isinstance(value, dict):
        value = _rows_of(value)
    if not isinstance(value, list) or not value:
        return value
    if isinstance(value[0], str):
        inner = [from_json_text(item) for item in value]
        value = inner if all(map(names_a_turn, inner)) else value
    return [flat(item) for item in value]


def _rows_of(columns: Record) -> Any:
    """Return as turns the columns that some tables make of a list of them: {"from": [...], ...}."""
    lists = list(columns.values())
    if not names_a_turn(columns) or not all(isinstance(column, list) for column in lists):
        return columns
    if len({len(column) for column in lists}) > 1:
        return columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def names_a_turn(value: Any) -> bool:
    """Does an object say who speaks, and what, whatever else it says? Of a list, turns do."""
    return isinstance(value, dict) and bool(value.keys() & {*WHO}) and bool(value.keys() & {*WHAT})


def flat(item: Any) -> Any:
    """Return a turn of LangChain's form, {type, content} or {type, data}, with role and content.

    It has no other key for who speaks, so both questions above are to be asked of what is returned.
    One with a role whose type is "message", as OpenAI's Responses have it, is returned without it.
    """
    if names_a_turn(item) and item.get("type") == "message":
        return {key: value for key, value in item.items() if key != "type"}
    if not isinstance(item, dict) or item.get("type") not in _TYPES or item.keys() & {*WHO}:
        return item
    data = item.get("data")
    inner = data if isinstance(data, dict) else item
    if not inner.keys() & {"content", *CALLS}:
        return item
    beside = {key: value for key, value in item.items() if inner is item or key != "data"}
    turn = {**beside, **inner, "role": item["type"]}
    del turn["type"]
    return turn


def known_names(role_map: Mapping[str, str]) -> dict[str, str]:
    """Return names, each of a role in some files alone, with one of the role that all know."""
    roles = reversed({**ROLE_OF, **role_map}.items())
    known = {role: name for name, role in roles if ROLE_OF.get(name) == role}
    return {name: known[role] for name, role in role_map.items() if role in known}


def renamed(record: Any, names: Mapping[str, str], depth: int = 3) -> Any:
    """Return a record, or a list of turns, whose turns say who speaks by other names.

    So do lists of turns within a record of the record, and those in texts: but a context stays one.
    """
    if not names or depth == 0:
        return record
    if isinstance(record, list):
        return [_renamed_turn(turn, names) for turn in record]
    if not isinstance(record, dict) or is_turn(record):
        return _renamed_turn(record, names)
    texts = {"context", "input"} if is_held(record.get("instruction")) else {"context"}
    lists = {key: v if key in texts else _of_names(key, v, names) for key, v in record.items()}
    return {key: renamed(value, names, depth - 1) for key, value in lists.items()}


def _of_names(key: str, value: Any, names: Mapping[str, str]) -> Any:
    """Return the turns of a value under a key, if they are what its text is; all else as it is."""
    if key in LISTS:
        return listed(value)
    if not isinstance(value, str):
        return value
    inner = from_json_text(value)
    if isinstance(inner, dict):
        return inner if key in WRAPPERS else value
    turns = listed(inner)
    if not isinstance(turns, list) or not all(map(names_a_turn, turns)):
        return value
    said = [first_filled(turn, WHO) for turn in turns]
    known = [role_called(name, names) for name in said]
    is_talk = said != known and all(role_called(name) in ROLES for name in known)
    return turns if is_talk else value


def _renamed_turn(turn: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    return turn | {key: role_called(turn[key], names) for key in WHO if key in turn}


def turns_of(value: Any) -> list[Any] | None:
    """Return the turns of a list of them, or of a single one; None for all else.

    Of a tree of messages, they are those of one branch.
    Telegram's notes of what was done, as joining a group, are no turns.
    """
    value = listed(value)
    if is_turn(value):
        value = [value]
    if isinstance(value, list):
        value = [v for v in value if not (get(v, "type") == "service" and get(v, "action"))]
    if not isinstance(value, list) or not value:
        return None
    if is_alternation(value):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(value)]
    items = _with_one_system(branch_in(value))
    return with_thoughts([turn for item in items for turn in _usual(item)])


def is_alternation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)


def _with_one_system(items: list[Any]) -> list[Any]:
    """Return items, each a question and its answer, without a system text that they repeat.

    Raises:
        Unusable: a later one differs.
    """
    found: list[Any] = []
    system: Any = None
    for item in items:
        if isinstance(item, dict) and "system" in item and len(_names_in(item)) > 1:
            own = item["system"]
            is_blank = isinstance(own, str) and not own.strip()
            if is_blank or not is_held(own) or own == system:
                item = {key: value for key, value in item.items() if key != "system"}
            elif system is not None:
                raise Unusable(TWO_SYSTEMS, f"they are {system!r:.40} and {own!r:.40}")
            else:
                system = own
        found.append(item)
    return found


def _usual(item: Any) -> list[Any]:
    """Return turns of role and content of an item that says both in other words."""
    if isinstance(item, list) and is_alternation(item) and len(item) == 2:
        return [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
    if not isinstance(item, dict):
        return [item]
    item = _without_objects(item)
    role, said = first_filled(item, WHO), first_filled(item, WHAT)
    is_usual = said is first_filled(item, ("value", "content"))
    if is_usual and item.keys() & {"value", "content"} and item.keys() & {"from", "role"}:
        return [item]
    if (
        is_usual
        and role is not None
        and is_held(item.get("value"))
        and is_held(item.get("content"))
    ):
        return [{**item, "role": role}]  # which are to be the same
    if role is not None and said is not None:
        return [{**item, "role": role, "content": said if is_usual else as_parts(said)}]
    names = _names_in(item)
    if role is None and names:
        # What stands beside the texts is looked at in each turn: it may be of any.
        beside = {key: value for key, value in item.items() if key not in names}
        return [{**beside, "role": ASKED_AND_SAID.get(k, k), "content": item[k]} for k in names]
    return [item]


def _names_in(item: Record) -> list[str]:
    """Return the keys of an item that are roles, and of texts, in the order that they are said."""
    names = [key for key, value in item.items() if value is not None and key in ROLE_KEYS]
    names.sort(key="system".__ne__)
    if names in ([], ["system"]) and all(item.get(key) is not None for key in ASKED_AND_SAID):
        names += ASKED_AND_SAID
    return names


def _without_objects(turn: Record) -> Record:
    """Return a turn with texts for objects that hold one; what a tool says may be an object."""
    objects = {key: turn[key] for key in WHAT if isinstance(turn.get(key), dict)}
    if not objects or role_called(first_filled(turn, WHO)) == "tool":
        return turn
    return {**turn, **{key: said_in(value) for key, value in objects.items()}}


def with_thoughts(turns: list[Any]) -> list[Any]:
    """Return the turns, those of thought alone as the reasoning of the one that follows."""
    thoughts = [thought_alone(turn) for turn in turns]
    if not any(thoughts):
        return turns
    found: list[Any] = []
    before = ""
    for turn, thought in zip(turns, thoughts, strict=True):
        if thought is not None:
            before = f"{before}\n{thought}" if before else thought
            continue
        has_own = any(is_held(get(turn, key)) for key in REASONING)
        if before and role_in(turn) == "assistant" and not has_own:
            turn = {**turn, REASONING[0]: before}
        elif before:
            found.append({"role": "assistant", "content": "", REASONING[0]: before})
        before = ""
        found.append(turn)
    if before:
        found.append({"role": "assistant", "content": "", REASONING[0]: before})
    return found


def role_in(turn: Any) -> Any:
    """Return whose a turn is, by the names that are known everywhere."""
    return role_called(name_in(turn)) if isinstance(turn, dict) else None
