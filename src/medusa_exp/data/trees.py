"""One conversation of a tree of messages: the longest branch, or the one that is ranked best."""

from collections.abc import Collection, Mapping
from typing import Any

from medusa_exp.data.turns import UNCLEAR_TREE, WHO, Unusable

Message = dict[str, Any]


def longest_branch(nodes: Mapping[str, Any], shown: Any) -> list[Message]:
    """Return the messages of the longest branch of an exported chat, from its root on.

    Args:
        nodes: id -> {message, parent}; one without a message, or with one that is hidden, is
            passed through.
        shown: the id of the node at whose end the chat stood: it wins among branches as long.
    """
    parents = {name: _parent_of(node) for name, node in nodes.items()}
    said = {name for name, node in nodes.items() if _is_said(node)}
    return [nodes[name]["message"] for name in _branch(parents, said, shown) if name in said]


def _parent_of(node: Any) -> str | None:
    parent = node.get("parent") if isinstance(node, dict) else None
    return parent if isinstance(parent, str) else None


def _branch(
    parents: Mapping[str, str | None], said: Collection[str], shown: Any, is_final: bool = False
) -> list[str]:
    """Return the ids of the branch that says most, from its root on.

    Args:
        parents: id -> id of the parent, if it has one.
        said: those that count.
        shown: wins among branches as long, and if `is_final`, over all.
    """
    children: dict[Any, list[str]] = {}
    for name, parent in parents.items():
        is_known = isinstance(parent, str) and parent in parents
        children.setdefault(parent if is_known else None, []).append(name)
    length = dict.fromkeys(children.get(None, ()), 0)  # those in a circle are never come upon
    for name in (order := list(length)):
        length[name] += name in said
        for child in children.get(name, ()):
            length[child] = length[name]
            order.append(child)
    ends = sorted(order, key=lambda end: (length[end], end == shown))
    branch: list[str] = []
    last: Any = shown if is_final and shown in length else ends[-1] if ends else None
    while last in length:
        branch.append(last)
        last = parents[last]
    return branch[::-1]


TREE_KEYS = ("id", "parent", "children")


def branch_in(messages: Any, shown: Any = None) -> Any:
    """Return one branch of a list of messages that name their `children`, and maybe a `parent`.

    It ends in the message of id `shown`, else it is the longest. Messages without a parent are
    siblings too, but for a system message before all others that names no children: it belongs to
    each of them. An empty one is left out. A list of other things is returned as it is.
    """
    if isinstance(messages, list) and has_nested(messages):
        return nested_branch(messages)
    if not isinstance(messages, list) or not is_tree(messages):
        return messages
    start = next(i for i, m in enumerate(messages) if not _is_system(m) or m.get("children"))
    if start:
        head = [message for message in messages[:start] if _says(message)]
        return [*head, *branch_in(messages[start:], shown)]
    by_id = {str(message["id"]): message for message in messages}
    parents = {name: _as_id(message.get("parent")) for name, message in by_id.items()}
    for name, message in by_id.items():
        children = message.get("children")
        for child in children if isinstance(children, list) else ():
            parents[str(child)] = parents.get(str(child)) or name
    parents = {name: parent for name, parent in parents.items() if name in by_id}
    known = [parent if parent in by_id else None for parent in parents.values()]
    if len({*known}) < len(known):
        shown = _as_id(shown)
        names = _branch(parents, by_id, shown, is_final=True)
        messages = [by_id[name] for name in names] or messages  # all of them in a circle
    return _without_empty_system(messages)


def has_nested(messages: list[Any]) -> bool:
    """Do messages of a list hold their children themselves?"""
    return any(map(_nested, messages))


def _nested(message: Any) -> list[Any]:
    """Return the messages that stand in a message as its children."""
    children = message.get("children") if isinstance(message, dict) else None
    is_of_messages = isinstance(children, list) and all(_speaker_in(c) for c in children)
    return children if isinstance(children, list) and is_of_messages else []


def _speaker_in(message: Any) -> Any:
    found = (message.get(key) for key in WHO) if isinstance(message, dict) else ()
    return next(filter(None, found), None)


def nested_branch(messages: list[Any]) -> list[Any]:
    """Return the longest branch of messages that hold their children; of those as long, the last.

    Those of the list follow one another, if only the last of them has children; else each begins a
    chat, but for system messages before them.

    Raises:
        Unusable: they are not of one speaker then.
    """
    num_before = len(messages) - 1
    if any(map(_nested, messages[:-1])):
        is_head = [isinstance(m, dict) and _is_system(m) and not _nested(m) for m in messages]
        num_before = is_head.index(False)
    before, roots = messages[:num_before], messages[num_before:]
    if len({str(_speaker_in(root)) for root in roots}) > 1:
        raise Unusable(UNCLEAR_TREE, "which of them is the next is not known")
    order = [(message, -1) for message in roots]
    for place, (message, _) in enumerate(order):
        order += [(child, place) for child in _nested(message)]
    place = len(order) - 1  # levels follow one another: it is of the deepest
    branch: list[Any] = []
    while place >= 0:
        message, place = order[place]
        branch.append({key: value for key, value in message.items() if key != "children"})
    return [*before, *branch[::-1]]


def _without_empty_system(messages: list[Message]) -> list[Message]:
    first, *others = messages
    return messages if _says(first) or not others or not _is_system(first) else others


def _says(message: Message) -> bool:
    return bool(message.get("value") or message.get("content") or message.get("text"))


def _is_system(message: Message) -> bool:
    return "system" in (message.get("role"), message.get("from"))


def is_tree(messages: list[Any]) -> bool:
    """Do messages of a list name their children in it?"""
    if not any(isinstance(m, dict) and m.get("children") for m in messages):
        return False
    names = {_as_id(m.get("id")) if isinstance(m, dict) else None for m in messages}
    if None in names or len(names) < len(messages):
        return False
    lists = [m["children"] for m in messages if isinstance(m.get("children"), list)]
    return any(str(child) in names for children in lists for child in children)


def _as_id(value: Any) -> str | None:
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_id else None


_UNSAID = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")
"""Kinds of content that are no turn of the chat."""


def _is_said(node: Any) -> bool:
    """Does a node hold what one of both said to the other?"""
    message = node.get("message") if isinstance(node, dict) else None
    if not isinstance(message, dict):
        return False
    metadata, content = message.get("metadata"), message.get("content")
    if isinstance(message.get("fragments"), list):
        return bool(message["fragments"])
    if isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation"):
        return False
    if not isinstance(content, dict):
        return content is not None
    return content.get("content_type") not in _UNSAID and content.get("parts") not in ([], [""])


def best_branch(root: Message) -> list[Message]:
    """Return the messages of a tree of `replies`, each the best ranked of its siblings.

    Where none of them is ranked, the one with the longest branch; what is deleted is left out.
    """
    depth = _depths(root)
    branch = [root]
    while replies := _replies(branch[-1]):
        ranked = [reply for reply in replies if isinstance(reply.get("rank"), int | float)]
        if ranked:
            branch.append(min(ranked, key=lambda reply: reply["rank"]))
        else:
            branch.append(max(replies, key=lambda reply: depth[id(reply)]))
    return [{key: m[key] for key in ("role", "text") if key in m} for m in branch]


def _replies(message: Message) -> list[Message]:
    replies = message.get("replies")
    found = replies if isinstance(replies, list) else []
    return [reply for reply in found if isinstance(reply, dict) and not reply.get("deleted")]


def _depths(root: Message) -> dict[int, int]:
    """Return the length of the longest branch below each message, by the id of its object."""
    order = [root]
    for message in order:
        order.extend(_replies(message))
    depth: dict[int, int] = {}
    for message in reversed(order):
        depth[id(message)] = 1 + max((depth[id(r)] for r in _replies(message)), default=0)
    return depth
