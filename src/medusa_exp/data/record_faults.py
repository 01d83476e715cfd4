"""What is wrong with a file whose records are no chats that can be read, and what to do."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from medusa_exp.data.faults import DataError, NoChats, is_text_table
from medusa_exp.data.other_kinds import TELEGRAM, kind_by_keys
from medusa_exp.data.turn_lists import names_a_turn

A_ROW = "a list of fields without their names"
AS_RECORDS = (
    "Save records, which name their fields: of a pandas table, to_json(orient='records') does."
)

_REMEDY = (
    "If they are chats, say what their texts stand under, as in "
    "'dataset.columns={user: KEY, assistant: KEY, system: KEY}' or 'dataset.columns={messages: "
    "KEY}', or what dataset.form they have."
)


_SPEAKS = {"role", "speaker", "sender", "from"}
_SAYS = {"content", "text", "message", "msg", "body", "utterance", "value"}
"""Keys of who speaks and what is said, in a record that is one message."""


def no_records(name: str) -> NoChats:
    """Return the error of a list, or a table, of nothing."""
    return NoChats(
        f"{name} holds no record: it is an empty list, or a table without a row. Write the chats "
        "into it, or name another file."
    )


def no_form(
    name: str,
    keys: Sequence[str],
    what: str = "keys",
    settings: str = "",
    named: Iterable[str] = (),
    seen: str = "",
) -> NoChats:
    """Return the error of a file none of whose records has a form that is known.

    `settings` would read the first of them, `named` are the paths that dataset.columns names, and
    `seen` is a sentence of what was seen in that record.
    """
    if not settings and (words := kind_by_keys(keys)):
        return NoChats(f"{name} {words}")
    absent = [path for path in named if not {path, path.partition(".")[0]} & {*keys}]
    shown = ", ".join(map(str, keys[:30])) + (" ..." if len(keys) > 30 else "")
    one = ""
    if absent:
        one = f" {absent_columns(absent, keys)}"
    elif {"role", "text", "parent_id"} <= set(keys):
        one = (
            " Each record seems to be one message of a tree: take the file of trees "
            "(*.trees.jsonl.gz of OpenAssistant's), whose records hold the `replies`."
        )
    elif _SPEAKS & {*keys} and _SAYS & {*keys}:
        one = (
            " Each record seems to be one message: gather those of a chat in a list, as "
            '{"messages": [{"role": ..., "content": ...}, ...]}.'
        )
    elif seen:
        one = f" {seen}"
    elif is_text_table(name):
        one = _about_header(keys)
    remedy = "" if absent or (seen and seen in one) else f" {_REMEDY}"
    remedy = f" If they are chats, say {settings}." if settings else remedy
    return NoChats(
        f"{name} has no known form of chat: its {what} are {shown or 'none'}.{one}{remedy}"
    )


def absent_columns(absent: Sequence[str], keys: Sequence[str]) -> DataError:
    """Return the error of paths that are in no record; `keys` are those of one."""
    return DataError(f"dataset.columns names what is not there: {_with_likely(absent, keys)}.")


def _with_likely(absent: Sequence[str], keys: Sequence[str]) -> str:
    """Name paths that a record lacks, each with the key that may be meant, if there is one near."""
    small = {str(key).lower(): str(key) for key in keys}
    found = []
    for path in absent:
        first, dot, rest = path.partition(".")
        near = get_close_matches(first.lower(), small, 1)
        found.append(f"{path} (did you mean {small[near[0]]}{dot}{rest}?)" if near else path)
    return ", ".join(found)


_RENDERED = re.compile(
    r"<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>|\bUSER:(?=[\s\S]*?\bASSISTANT:)"
)
_AS_MESSAGES = 'as {"messages": [{"role": "user", "content": ...}, ...]}'


def seen_in(record: Mapping[str, Any], settings: str) -> str:
    """Return what is to be said of a record of no known form, instead of the remedy for all.

    `settings` would read it, though perhaps not the best of it.
    """
    if settings:
        if record.get("annotations") and "annotations" not in settings:
            return (
                "Its annotations are not read: if they correct what is, write them in its place "
                "first."
            )
        return ""
    for key, value in record.items():
        if isinstance(value, str) and (mark := _RENDERED.search(value[:10_000])):
            return (
                f"What stands under {key} is a chat as a template has written it (with {mark[0]}), "
                f"which is not read: split it into messages, {_AS_MESSAGES}."
            )
    message = record.get("message")
    if isinstance(message, dict) and {"role", "content"} <= message.keys():
        return (
            "Each record seems to hold one message, under message: gather those of a chat in a "
            f"list, {_AS_MESSAGES}."
        )
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if names_a_turn(value[0]):
                return (
                    f"Under {key} stand turns: if what follows them stands beside them, say "
                    f"'dataset.columns={{user: {key}, assistant: KEY}}'."
                )
            names = ", ".join(map(str, [*value[0]][:30]))
            return (
                f"Under {key} stands a list of objects, whose keys are {names}. If they are turns, "
                f"write them with keys that are known, {_AS_MESSAGES}; of answers, {key}.0.KEY "
                f"names that of the first. {_REMEDY}"
            )
    return ""


def no_answer(name: str, columns: str) -> NoChats:
    """Return the error of a file whose answers stand apart from its messages."""
    return NoChats(
        f"{name} has no chat that can be read: none of its records has an assistant turn among its "
        f"messages. The answers seem to stand beside them: say 'dataset.columns={columns}'."
    )


def no_answers_yet(name: str) -> NoChats:
    """Return the error of the requests of a batch, without its answers."""
    return NoChats(
        f"{name} has no chat that can be read: they are the requests of a batch, whose answers are "
        "in its output file. Write those behind the messages of the requests of the same custom_id."
    )


def no_words(name: str, detail: str) -> NoChats:
    """Return the error of Telegram's chats, each of which has a message of other than text."""
    return NoChats(
        f"{name} has no chat that can be read: each has a picture or the like ({detail}). It seems "
        f"to be Telegram's export: {TELEGRAM}."
    )


def _about_header(columns: Sequence[str]) -> str:
    said = ""
    if any(" " in column.strip() or column.isdigit() for column in columns):
        said = " They are its first line: write one above it, as prompt,completion, if it has none."
    if len(columns) == 1:
        said += (
            " If they are several columns, say what stands between them in a line above, as sep=^ "
            "does: comma, semicolon, tab and | are known."
        )
    elif odd := [column for column in columns if column != column.strip()]:
        said += f" Take the space out of {odd[0]!r}."
    return said


_NOT_JSON_LISTS = (
    # NumPy writes no comma between what stands on lines of their own.
    ("NumPy", re.compile(r"\s*\[?array\(|\s*\[\s*(\{\s*'|')[^\n]*[}']\s*\n\s*[{']")),
    ("Python", re.compile(r"\s*\[\s*(\{\s*)?'")),
)


def not_json_list(name: str, key: str, text: Any) -> NoChats | None:
    """Return the error if a text is a list as Python or NumPy print it, which is no JSON."""
    if not isinstance(text, str):
        return None
    writer = next((who for who, begin in _NOT_JSON_LISTS if begin.match(text)), None)
    if writer is None:
        return None
    column = f"df[{key!r}]"
    remedy = (
        f"Write it as JSON where the file is made, as by `{column} = {column}.map(lambda turns: "
        "json.dumps(list(turns)))`"
    )
    if writer == "Python":
        remedy += f"; from this file, by `{column}.map(ast.literal_eval).map(json.dumps)`"
    return NoChats(
        f"{name}: what stands under {key} is a list as {writer} prints it, not JSON ({text!r:.50} "
        f"...). {remedy}."
    )


def same_columns(name: str, column: str) -> DataError:
    """Return the error of a table in which one name is that of two columns."""
    return DataError(f"{name}: two of its columns are called {column}: rename or drop one of them.")


def no_usable_turn(name: str, reason: str, detail: str, roles: str) -> NoChats:
    """Return the error of a file all of whose records fail for want of turns that are known.

    `roles` are what dataset.role_map would read the first of them by.
    """
    remedy = (
        f"Say whose a role is, as in 'dataset.role_map={roles or '{narrator: system}'}', or what "
        "the texts stand under, as in 'dataset.columns={user: KEY, assistant: KEY}'."
    )
    if reason != "unknown role":
        remedy = (
            "Neither dataset.role_map nor dataset.columns reads such turns: write them with keys "
            f"that are known, {_AS_MESSAGES}. Texts beside them are read by "
            "'dataset.columns={user: KEY, assistant: KEY}'."
        )
    if detail.startswith("the role is {"):
        remedy = (
            "Who speaks is an object: write one name in its place, as by `jq '.messages[].author "
            "|= .name'`, and say whose it is, as in 'dataset.role_map={ann: assistant, bob: user}'."
        )
    remedy = AS_RECORDS if reason == A_ROW else remedy
    return NoChats(f"{name} has no chat that can be read: {reason}: {detail}. {remedy}")


def ambiguous(place: str, what: str, remedy: str) -> DataError:
    """Return the error of a record that can be read in several ways."""
    others = (
        "Keep one of them, or say what is to be read, as in 'dataset.columns={messages: KEY, "
        "system: KEY}' or 'dataset.columns={user: KEY, assistant: KEY, system: KEY}'."
    )
    return DataError(f"{place} {what}. {remedy or others}")
