"""One conversation of a tree of messages: the longest branch, or the one that is ranked best."""

from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]


def longest_branch(nodes: Mapping[str, Any], shown: Any = None) -> list[Message]:
    """Return the messages of the longest branch of an exported chat, from its root on.

    Args:
        nodes: id -> {message, parent}; one without a message, or with one that is hidden, is
            passed through.
        shown: the id of the node at whose end the chat stood: it wins among branches as long.
    """
    children: dict[Any, list[str]] = {}
    for node_id, node in nodes.items():
        parent = node.get("parent") if isinstance(node, dict) else None
        is_known = isinstance(parent, str) and parent in nodes
        children.setdefault(parent if is_known else None, []).append(node_id)
    length = dict.fromkeys(children.get(None, ()), 0)  # those in a circle are never come upon
    for node_id in (order := list(length)):
        length[node_id] += _is_said(nodes[node_id])
        for child in children.get(node_id, ()):
            length[child] = length[node_id]
            order.append(child)
    ends = sorted(order, key=lambda end: (length[end], end == shown))
    branch: list[Message] = []
    name: Any = ends[-1] if ends else None
    while name in length:
        if _is_said(nodes[name]):
            branch.append(nodes[name]["message"])
        node = nodes[name]
        name = node.get("parent") if isinstance(node, dict) else None
    return branch[::-1]


_UNSAID = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")
"""Kinds of content that are no turn of the chat."""


def _is_said(node: Any) -> bool:
    """Does a node hold what one of both said to the other?"""
    message = node.get("message") if isinstance(node, dict) else None
    if not isinstance(message, dict):
        return False
    metadata, content = message.get("metadata"), message.get("content")
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
