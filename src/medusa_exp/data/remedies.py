"""Which `dataset.columns` and `dataset.role_map` would read a record that cannot be read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from medusa_exp.data.messages import Conversation
from medusa_exp.data.pairs import ASKED, REPLIES
from medusa_exp.data.parsing import UNKNOWN_ROLE, ChatParser, value_of
from medusa_exp.data.raw_chats import RawChat
from medusa_exp.data.records import SYSTEMS, Ambiguous, system_text
from medusa_exp.data.turn_lists import ROLE_NAMES, WHAT, names_a_turn, role_in
from medusa_exp.data.turns import Unusable, is_held, texts_of

_OF_QUESTION = {*ASKED, *ROLE_NAMES["user"], "problem"}
_SOLVED = ("solution", "generated_solution")
_OF_ANSWER = {
    *(*REPLIES, *ROLE_NAMES["assistant"], *_SOLVED),
    *("target", "chosen", "preferred_output"),
}
_GUESSED = {"suggestions", "predictions"}
"""Keys of what a machine proposes to those who write the answers: never one."""
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w-]*|\d+")
"""A key that can be written in a path on the command line as it is."""
_PLAIN_NAME = re.compile(r"(?!(?:true|false|null)$)[A-Za-z_](?:[\w .-]*\w)?", re.ASCII | re.I)
"""A name that can be written as a key of dataset.role_map on the command line."""
_ANSWERING = ("agent", "support", "operator", "advisor", "expert", "doctor", "therapist", "tutor")
_LIKELY = {"narrator": "system", **dict.fromkeys(_ANSWERING, "assistant")}
"""Name of a role in some files, in small letters -> whose it probably is; of others it is open."""
_MOST_NAMES = 5
_DEPTH = 8
_MOST_PLACES = 400
_MOST_PAIRS = 50


def settings_for(raw: RawChat, role_map: Mapping[str, str]) -> str:
    """Return what would be said on the command line to read a record, or nothing.

    That is dataset.columns; where names of roles in it are not known, dataset.role_map too.
    """
    if direct := columns_for(raw, role_map):
        return f"'dataset.columns={direct}'"
    record = value_of(raw)
    for columns in _candidates(dict(_places(record))) if isinstance(record, dict) else ():
        if "messages" in columns and (roles := _role_map_for(raw, role_map, "auto", columns)):
            strangers = ", ".join(name for name in roles if name not in role_map)
            return (
                f"'dataset.columns={_written(columns)}' 'dataset.role_map={_written(roles)}' "
                f"(the roles of {strangers} are guessed)"
            )
    return ""


def roles_for(
    raws: Sequence[RawChat],
    role_map: Mapping[str, str],
    form: str,
    columns: Mapping[str, str],
) -> str:
    """Return the dataset.role_map that reads one of some raw chats.

    If none can be found, it still names one unknown role; nothing if there is no such name.
    """
    for raw in raws:
        if found := _role_map_for(raw, role_map, form, columns):
            return _written(found)
    strangers = (_strangers(raw, role_map, form, columns) for raw in raws)
    names = next(filter(None, strangers), [])
    return _written({**role_map, names[0]: "user"}) if names else ""


def _role_map_for(
    raw: RawChat,
    role_map: Mapping[str, str],
    form: str,
    columns: Mapping[str, str],
) -> dict[str, str]:
    """Return dataset.role_map with the unknown names of a raw chat added, so that it can be read.

    It then has a user and an assistant in it. Which name is whose is a guess. Nothing if no guess
    reads it.
    """
    for guess in _guesses(_strangers(raw, role_map, form, columns)):
        found = _parsed(ChatParser({**role_map, **guess}, form, columns), raw)
        if isinstance(found, Conversation) and _has_both_roles(found):
            return {**role_map, **guess}
    return {}


def _strangers(
    raw: RawChat,
    role_map: Mapping[str, str],
    form: str,
    columns: Mapping[str, str],
) -> list[str]:
    """Return the names that are of no known role; none, if they cannot be said."""
    names: list[str] = []
    while len(names) <= _MOST_NAMES:
        known = {**role_map, **dict.fromkeys(names, "user")}
        parser = ChatParser(known, form, columns)
        if _parsed(parser, raw) != UNKNOWN_ROLE:
            return names
        name = parser.stranger
        if not isinstance(name, str) or name in known or not _PLAIN_NAME.fullmatch(name):
            break
        names.append(name)
    return []


def _guesses(names: list[str]) -> Iterator[dict[str, str]]:
    """Yield guesses of which role each name has, the likeliest first."""
    if not names:
        return
    yield {name: _LIKELY.get(name.lower(), "user") for name in names}
    for assistant in names[1:2] + names[:1]:
        yield {name: "assistant" if name == assistant else "user" for name in names}


def columns_for(raw: RawChat, role_map: Mapping[str, str]) -> str:
    """Return what dataset.columns would say, as {messages: KEY}, or nothing.

    What is returned reads this raw chat, which is JSON, as one of both: it was tried. Where it can,
    it reads an answer to the last question too.
    """
    record = value_of(raw)
    if not isinstance(record, dict):
        return ""
    open_ended = ""
    for columns in _candidates(dict(_places(record))):
        found = _parsed(ChatParser(role_map, columns=columns), raw)
        if isinstance(found, Conversation) and _begins_with_user(found):
            said = _written(columns)
            if found.messages[-1].role != "user":
                return said
            open_ended = open_ended or said
    return open_ended


def _parsed(parser: ChatParser, raw: RawChat) -> Conversation | str:
    try:
        return parser.parse(raw)
    except Ambiguous as ways:
        return str(ways)
    except TypeError:  # a row may hold what cannot be written as JSON
        return ""


def _written(setting: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in setting.items()) + "}"


def _candidates(places: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield what dataset.columns may say of a record of these paths, the likelier first."""
    held = (path for path, value in places.items() if _is_system(path, value))
    system = {"system": path} if (path := next(held, "")) else {}
    for path, value in places.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield {"messages": path, **system}
    lists = [path for path, value in places.items() if _is_talk(value)]
    asked = lists + [path for path, value in places.items() if _is_of(path, value, _OF_QUESTION)]
    answers = [path for path, value in places.items() if role_in(value) == "assistant"]
    answers += [path for path in lists if role_in(places[path][0]) == "assistant"]
    answers += sorted(
        (path for path, value in places.items() if _is_of(path, value, _OF_ANSWER)),
        key=lambda path: not path.endswith(_SOLVED),  # of both, an answer is the result alone
    )
    pairs = product([path for path in asked if not _is_in_list(path)], answers)
    for question, answer in islice(pairs, _MOST_PAIRS):
        if not f"{answer}.".startswith(f"{question}."):
            yield {"user": question, "assistant": _shortened(answer, places), **system}


def _is_system(path: str, value: Any) -> bool:
    """Is it a system text, or the parts of one, by the last key of its path?"""
    if path.rpartition(".")[2] not in SYSTEMS or not is_held(value):
        return False
    try:
        return bool(texts_of(system_text(value))[1].strip())
    except Unusable:
        return False


def _is_in_list(path: str) -> bool:
    return any(map(str.isdigit, path.split(".")))


def _places(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the paths into a record with what stands there, those of fewer parts first.

    Of a list that is no chat, only the sole item is one: of several, none is the answer.
    """
    queue: list[tuple[tuple[str, ...], Any]] = [((), record)]
    for number, (path, value) in enumerate(queue):
        if path:
            yield ".".join(path), value
        if len(path) >= _DEPTH or number >= _MOST_PLACES or _is_talk(value):
            continue
        inner = list(value.items()) if isinstance(value, dict) else []
        if isinstance(value, list) and len(value) == 1:
            inner = [("0", value[0])]
        queue += [((*path, key), v) for key, v in inner if _PLAIN_KEY.fullmatch(str(key))]


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(names_a_turn, value))


def _is_of(path: str, value: Any, names: set[str]) -> bool:
    """Is it a text that a key on its path calls by one of these names, or by its plural?

    Capitals in them are as small letters.
    """
    keys = [key for key in path.lower().split(".") if not key.isdigit()]
    parts = {part for key in keys for part in (key, key.removesuffix("s"))}
    if not keys or not _GUESSED.isdisjoint(keys):
        return False
    is_text = isinstance(value, str) and is_held(value) and {keys[-1]} <= {*names, *WHAT, keys[0]}
    return is_text and not parts.isdisjoint(names)


def _shortened(answer: str, places: dict[str, Any]) -> str:
    """Return the path of a turn's text, where it has nothing else, or that of the turn."""
    text = f"{answer}.content"
    has_text = isinstance(places.get(text), str) and is_held(places[text])
    return text if has_text else answer


def _has_both_roles(chat: Conversation) -> bool:
    return {"user", "assistant"} <= {message.role for message in chat.messages}


def _begins_with_user(chat: Conversation) -> bool:
    roles = [message.role for message in chat.messages if message.role != "system"]
    return roles[0] == "user" and "assistant" in roles
