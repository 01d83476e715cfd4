"""The forms that raw chats have: by which keys each is known, and how it becomes a list of turns.

`FORMS` is the table, a row and a function a form. A function returns None where a record does not
have its form. Turns are as `parsing` reads them: objects of a role (`from`) and a content
(`value`); what is wrong with one of them is found there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from medusa_exp.data.pairs import (
    ASKED,
    CHOICES,
    CONTEXTS,
    REPLIES,
    after,
    answer_beside,
    answered,
    as_text,
    joined,
    pair,
    said_by,
    without_question,
)
from medusa_exp.data.record_faults import A_ROW, AS_RECORDS
from medusa_exp.data.records import (
    IDS,
    NOT_ALIKE,
    SYSTEMS,
    Ambiguous,
    Chat,
    all_said,
    at,
    check_alike,
    check_same_talk,
    columns_in,
    system_in,
    system_text,
)
from medusa_exp.data.transcripts import chat_in
from medusa_exp.data.trees import best_branch, branch_in, is_tree, longest_branch
from medusa_exp.data.turn_lists import (
    ROLE_NAMES,
    TALKS,
    WRAPPERS,
    get,
    is_alternation,
    listed,
    role_in,
    turns_of,
)
from medusa_exp.data.turns import (
    BAD_CALLS,
    BAD_REASONING,
    LABELS,
    PICTURES,
    REASONING,
    TOOLS,
    Record,
    Unusable,
    as_parts,
    from_json_text,
    is_held,
)

_TALKS = ("conversations", "messages")
NO_WINNER = "two conversations without a winner"
BOTH_BAD = "two conversations, both marked as bad"
_BEGIN = "<|BEGIN-VISIBLE-CHAT|>"
"""Stands in text-generation-webui's files for a question that nobody asked."""
_LEAVES = ("current_node", "currNode")
_FRAGMENTS = {"REQUEST": "text", "RESPONSE": "text", "THINK": "thinking"}


@dataclass(frozen=True)
class Form:
    """A row of the table."""

    keys: tuple[str, ...]
    """What it reads of a record, but for ids and system texts."""
    read: Callable[[Any], Chat | None]
    more: tuple[str, ...] = ()
    """What else it may read: `Chat.more` says what it did."""


def _messages(record: Any) -> Chat | None:
    """Read ShareGPT's `conversations`, OpenAI's `messages`; either may be JSON in a text."""
    if not isinstance(record, dict):
        return None
    values = {key: listed(record.get(key)) for key in _TALKS}
    talks = {key: value for key, value in values.items() if isinstance(value, list)}
    if not talks:
        return None
    more, shown = _shown(record) if any(map(is_tree, talks.values())) else ((), None)
    talks = {key: branch_in(talk, shown) for key, talk in talks.items()}
    system = system_in(record)
    check_same_talk(talks, system, columns_in(record, "messages: KEY"))
    turns = turns_of(next(filter(None, talks.values()), [])) or []
    is_of_other = any(is_held(record.get(key)) for key in (*ASKED, "chosen"))
    if turns and role_in(turns[-1]) == "user" and not is_of_other:
        key, reply = answer_beside(record, next(key for key, talk in talks.items() if talk))
        if key is not None:
            return Chat([*turns, *reply], system, record, (*more, key))
    return Chat(turns, system, record, more)


def _shown(record: Record) -> tuple[tuple[str, ...], Any]:
    """Return the key under which a record names the message at whose end it stood, and its id."""
    inner = from_json_text(record.get("conv"))
    found = [((key,), record.get(key)) for key in _LEAVES]
    found += [(("conv",), get(inner, key)) for key in _LEAVES]
    return next(((key, shown) for key, shown in found if shown), ((), None))


def _conversation(record: Any) -> Chat | None:
    """Read a chat log's `conversation`; of text-generation-webui's, what the model saw."""
    talks = {key: listed(get(record, key)) for key in TALKS}
    if not _is_of_pairs(talks["internal"]):
        del talks["internal"]
    found = [talk for talk in talks.values() if isinstance(talk, list)]
    if not found:
        return None
    system = system_in(record)
    check_same_talk(talks, system, columns_in(record, "messages: KEY"))
    turns = turns_of(next(filter(None, found), [])) or []
    return Chat([turn for turn in turns if get(turn, "content") != _BEGIN], system)


def _is_of_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(is_alternation(v) and len(v) == 2 for v in value)


def _pairs(
    asked: tuple[str, ...], replied: tuple[str, ...], contexts: tuple[str, ...] = ()
) -> Form:
    """Return a form of a question, under one of some keys, and its answer."""
    keys = (*asked, *contexts, *replied, "history")
    return Form(keys, partial(pair, asked=asked, replied=replied, contexts=contexts), CHOICES)


def _input(record: Any) -> Chat | None:
    """Read `input` and `output`: the former belongs to an `instruction` where there is one."""
    return None if get(record, "instruction") is not None else pair(record, ("input",), REPLIES)


def _chosen(record: Any) -> Chat | None:
    """Read the preferred answer of a pair, after its prompt, or messages, if not a whole chat."""
    chosen = get(record, "chosen")
    if chosen is None:
        return None
    asked = [key for key in ASKED if get(record, key) is not None]
    is_apart = asked or any(is_held(get(record, key)) for key in _TALKS)
    replies = [] if asked else chat_in(chosen)
    replies = replies or (answered(chosen) if is_apart else said_by(chosen, "assistant"))
    if role_in(replies[0]) != "assistant":
        first = said_by(record[asked[0]], "user")[:1] if asked else []
        is_lost = [*map(role_in, first)] == ["system"] != [role_in(replies[0])]
        turns = first + replies if is_lost else replies
        unsaid = _unsaid(record, {*ASKED, *CONTEXTS, *_TALKS}, turns)
        return Chat(turns, system_in(record), passed_over=unsaid)
    if not asked:
        before = _messages(record)
        if before is None or not before.turns or role_in(before.turns[-1]) == "assistant":
            return None
        return Chat([*before.turns, *replies], before.system, more=before.more)
    if asked != ["instruction", "input"]:
        check_alike(record, asked, columns_in(record, "user: KEY, assistant: chosen", CONTEXTS))
    turns = joined(record, asked[0], CONTEXTS, replies)
    unsaid = _unsaid(record, {*_TALKS}, turns)
    return Chat(turns, system_in(record), more=("history",), passed_over=unsaid)


def _unsaid(record: Record, keys: Iterable[str], turns: list[Any]) -> tuple[str, ...]:
    """Return those of some keys whose texts, or lists of them, turns do not say."""
    said = {repr(all_said(turn)) for turn in turns}
    held = {key: said_by(record[key], "user") for key in keys if is_held(get(record, key))}
    return tuple(k for k, v in held.items() if not {repr(all_said(turn)) for turn in v} <= said)


def _contents(record: Any) -> Chat | None:
    """Read Gemini's `contents`: `parts` of text, in the roles user and model."""
    contents = from_json_text(get(record, "contents"))
    if not (isinstance(contents, list) and contents and isinstance(contents[0], dict)):
        return None
    turns = [{"role": "user", **turn} if isinstance(turn, dict) else turn for turn in contents]
    return Chat(turns_of(turns) or [], system_in(record), record)


def _body(record: Any) -> Chat | None:
    """Read the `messages` (`contents`) in a batch request's `body`, `params` or `request`.

    Not where their answer stands outside of it, in whatever form: it would be lost.
    """
    found: dict[str, Chat] = {}
    for key in WRAPPERS:
        inner = from_json_text(get(record, key))
        try:
            chat = _messages(inner) or _contents(inner)
        except Ambiguous as ways:  # its remedy would name keys of the record
            raise Ambiguous(f"{ways}, within its {key}") from ways
        if chat:
            found[key] = replace(chat, more=tuple(f"{key}.{name}" for name in chat.more))
    if not found:
        return None
    check_same_talk({key: chat.turns for key, chat in found.items()}, None, "")
    chat = next((chat for chat in found.values() if chat.turns), next(iter(found.values())))
    is_open = bool(chat.turns) and role_in(chat.turns[-1]) == "user"
    if is_open and any(is_held(record.get(reply)) for reply in (*REPLIES, "choices")):
        return None
    return replace(chat, system=_system_of_both(record, chat))


def _system_of_both(record: Record, inner: Chat) -> Any:
    """Return the system text beside a request, or within it.

    Raises:
        Ambiguous: there are two, which differ.
    """
    system = system_in(record)
    if is_held(system) and is_held(inner.system) and system != inner.system:
        raise Ambiguous(f"has a system text beside its request and one within{NOT_ALIKE}")
    return inner.system if is_held(inner.system) else system


def _winner(record: Any) -> Chat | None:
    """Read which of `conversation_a` and `conversation_b` won; the first if none did."""
    both = [turns_of(get(record, f"conversation_{side}")) for side in "ab"]
    if both[0] is None or both[1] is None:
        return None
    winner = str(get(record, "winner") or "").lower()
    if "bad" in winner:
        raise Unusable(BOTH_BAD)
    if winner not in ("model_a", "model_b", "a", "b") and "tie" not in winner:
        raise Unusable(NO_WINNER, f"its winner is {winner!r}, not model_a, model_b or tie")
    return Chat(both[winner.endswith("b")], system_in(record))  # type: ignore[arg-type]


def _mapping(record: Any) -> Chat | None:
    """Read the longest branch of an exported chat's `mapping`."""
    mapping = from_json_text(get(record, "mapping"))
    if not isinstance(mapping, dict):
        return None
    messages = longest_branch(mapping, get(record, "current_node"))
    return Chat(turns_of([_of_export(message) for message in messages]) or [])


def _of_export(message: Record) -> Record:
    author, content = message.get("author"), message.get("content")
    role = author.get("role") if isinstance(author, dict) else author
    if isinstance(fragments := message.get("fragments"), list):
        return _of_fragments(fragments)
    parts = content.get("parts") if isinstance(content, dict) else content
    if role == "assistant" and (to := message.get("recipient")) not in (None, "all"):
        # What it says is another's input, in a form of its own.
        raise Unusable(BAD_CALLS, f"one is a message to {to!r:.60}")
    return {"role": role, "content": content if parts is None else as_parts(parts)}


def _of_fragments(fragments: list[Any]) -> Record:
    """Return as a turn a message of DeepSeek's export; what it searched and read is no text."""
    kinds = [str(get(fragment, "type")) for fragment in fragments]
    said = [
        {"type": _FRAGMENTS.get(kind, kind), "text": get(fragment, "content")}
        for kind, fragment in zip(kinds, fragments, strict=True)
    ]
    return {"role": "user" if "REQUEST" in kinds else "assistant", "content": said}


def _replies(record: Any) -> Chat | None:
    """Read the best ranked, else the longest, branch of a tree of `replies`."""
    root = from_json_text(get(record, "prompt"))
    if not (isinstance(root, dict) and isinstance(root.get("replies"), list)):
        return None
    return Chat(turns_of(best_branch(root)) or [])


def _data(record: Any) -> Chat | None:
    """Read a list of texts, the user's and the assistant's in turn."""
    data = from_json_text(get(record, "data"))
    return Chat(turns_of(data) or []) if is_alternation(data) else None


def _text(record: Any) -> Chat | None:
    """Read one text in which "Human:" and "Assistant:" stand before what they say."""
    turns = chat_in(get(record, "text"))
    return Chat(turns, system_in(record)) if turns else None


def _list(record: Any) -> Chat | None:
    """Read a list of messages without a record around it."""
    if isinstance(record, list):
        _refuse_row(record)
    turns = turns_of(record) if isinstance(record, list) else None
    return Chat(turns) if turns else None


def _refuse_row(record: list[Any]) -> None:
    """Refuse a row of a table, which is no chat.

    Raises:
        Unusable: there is a number, or an odd number of texts.
        Ambiguous: it is the header of all rows after it.
    """
    words = {word for word in record if isinstance(word, str)}
    if words & {*ASKED, *ROLE_NAMES["user"]} and words & {*REPLIES, *ROLE_NAMES["assistant"]}:
        raise Ambiguous(
            f"is a row of names ({', '.join(map(str, record))}), and those after it may be their "
            "fields",
            AS_RECORDS,
        )
    if any(isinstance(field, dict | list) for field in listed(record)):
        return
    is_talk = is_alternation(record) and len(record) % 2 == 0
    if words and len(record) > 1 and not is_talk:
        raise Unusable(A_ROW, f"it is {record!r:.60}")


_BESIDE = (*REPLIES, "choices", *_LEAVES, "conv")
FORMS = {
    "messages": Form(_TALKS, _messages, _BESIDE),
    "conversation": Form(TALKS, _conversation),
    "prompt": _pairs(("prompt",), REPLIES),
    "instruction": _pairs(("instruction",), REPLIES, CONTEXTS),
    "question": _pairs(("question", "query"), REPLIES, ("context",)),
    "input": Form(("input", *REPLIES, "history"), _input, CHOICES),
    "user": _pairs(ROLE_NAMES["user"], ROLE_NAMES["assistant"]),
    "chosen": Form(("chosen", *ASKED, *CONTEXTS, *_TALKS), _chosen, ("history",)),
    "contents": Form(("contents",), _contents),
    "body": Form(WRAPPERS, _body),
    "winner": Form(("conversation_a", "conversation_b", "winner"), _winner),
    "mapping": Form(("mapping", "current_node"), _mapping),
    "replies": Form(("prompt",), _replies),
    "data": Form(("data",), _data),
    "text": Form(("text",), _text),
    "list": Form((), _list),
}
"""Name, as `dataset.form` has it -> form."""
ANSWERED = {"messages", "prompt", "instruction", "question", "input", "user"}
"""Forms beside whose one answer its reasoning may stand."""
LABELLED = {*FORMS} - {"chosen", "winner"}
"""Forms of one answer to each question: `LABELS` are of it."""


MAY_LACK = ("system", "reasoning")
"""What `dataset.columns` names, and not every record must have."""


def by_columns(columns: Mapping[str, str]) -> Form:
    """Return the form that `dataset.columns` describes: roles, or messages -> key of a record.

    A key may be a path into a record, its parts joined by dots (`answers.text.0`).
    """

    def read(record: Any) -> Chat | None:
        found = {role: at(record, path) for role, path in columns.items()}
        system = system_text(found.get("system"))
        thought = found.get("reasoning") or ""
        if not isinstance(thought, str):
            raise Unusable(BAD_REASONING, f"it is {thought!r:.60}")
        if "messages" in columns:
            turns = turns_of(found["messages"])
            return Chat(turns, system, reasoning=thought) if turns else None
        if found["assistant"] is None or ("user" in columns and found["user"] is None):
            return None
        asked = said_by(found["user"], "user") if "user" in columns else []
        replies = after(found.get("user"), answered(as_text(found["assistant"])))
        return Chat([*asked, *without_question(replies, asked)], system, reasoning=thought)

    paths = columns.values()
    return Form((*paths, *(path.partition(".")[0] for path in paths)), read)


def forms_of(form: str, columns: Mapping[str, str] | None) -> dict[str, Form]:
    """Return the forms that are looked for: as dataset.form and dataset.columns say."""
    if columns:
        return {"columns": by_columns(columns)}
    return FORMS if form == "auto" else {form: FORMS[form]}


def columns_of(forms: Mapping[str, Form]) -> tuple[str, ...]:
    """Return the keys that are read of a record, or columns of a table, in one of these forms.

    In the order that they are asked for.
    """
    keys = [key for form in forms.values() for key in form.keys]
    more = [key for form in forms.values() for key in form.more]
    beside = (*IDS, *SYSTEMS, *TOOLS, *PICTURES, *LABELS, *REASONING)
    return tuple(dict.fromkeys([*keys, *beside, *more]))
