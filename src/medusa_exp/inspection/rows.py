"""Conversations in; their rows token by token: which role wrote each, and is it trained, out."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.masking import Rendered, Renderer
from medusa_exp.data.template import to_chat

TEMPLATE = "template"
"""The role of what no message says: headers, marks, blanks."""


@dataclass(frozen=True)
class Row:
    """A rendered row of T tokens."""

    conversation_id: str
    source: str
    number: int
    """Of its conversation, among those that were sampled."""
    rendered: Rendered
    roles: list[str]
    """Per token: system, user, assistant, tool or template."""
    pieces: list[str]
    """Per token: the part of the text that it adds."""


def sample_rows(
    conversations: Iterable[tuple[str, Conversation]],
    tokenizer: PreTrainedTokenizerBase,
    notes: Iterable[str] = (),
) -> list[Row]:
    """Render conversations of named sources; those that the template refuses are passed over.

    `notes` on the template that are known need not be logged again.
    """
    sourced = list(conversations)
    renderer = Renderer(tokenizer)
    renderer.template.notes.update(notes)
    results = renderer.render_many(conversation for _, conversation in sourced)
    rows = []
    for number, result in enumerate(results):
        source, conversation = sourced[number]
        for rendered in [] if isinstance(result, DataError) else result:
            offsets = tokenizer(
                rendered.text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            ).offset_mapping
            written = _writers(rendered.text, conversation)
            roles = [written[end - 1] if end else TEMPLATE for _, end in offsets]
            pieces = _pieces(rendered.text, offsets)
            rows.append(Row(conversation.id, source, number, rendered, roles, pieces))
    return rows


def count_roles(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, int]]]:
    """Return source -> role -> {tokens, trained tokens}."""
    tokens: Counter[tuple[str, str]] = Counter()
    trained: Counter[tuple[str, str]] = Counter()
    for row in rows:
        tokens.update((row.source, role) for role in row.roles)
        marked = zip(row.roles, row.rendered.is_trained, strict=True)
        trained.update((row.source, role) for role, is_trained in marked if is_trained)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (source, role), number in tokens.most_common():
        entry = {"tokens": number, "trained tokens": trained[source, role]}
        found.setdefault(source, {})[role] = entry
    return found


def count_runs(rows: Iterable[Row]) -> dict[str, int]:
    """Look for masks shifted by one: does each run of trained tokens begin and end with a reply?

    Where replies stand is looked up here by their words, which the mask knows nothing of. A run in
    which no words were found (an empty reply's end mark; a reply that the template edits) says
    neither yes nor no.
    """
    total = right = undecided = 0
    for row in rows:
        is_reply = np.array([role == "assistant" for role in ["", *row.roles, ""]])
        mask = np.array([0, *row.rendered.is_trained, 0])
        starts, stops = np.flatnonzero(np.diff(mask) == 1), np.flatnonzero(np.diff(mask) == -1)
        for start, stop in zip(starts, stops, strict=True):  # of roles: start + 1 to stop, included
            if set(row.roles[start:stop]) == {TEMPLATE}:
                undecided += 1
                continue
            begins = is_reply[start + 1] and not is_reply[start]
            total += 1
            right += bool(begins and not is_reply[stop + 1])
    return {
        "runs": total,
        "runs from edge to edge of a reply": int(right),
        "runs that could not be checked": undecided,
    }


def _writers(text: str, conversation: Conversation) -> list[str]:
    """Return per character the role of the message it was found in, one message after another.

    A message that the template edits is not found, and counts as the template's; a very short one
    may be found in a header before it.
    """
    written = [TEMPLATE] * len(text)
    cursor = 0
    for message in to_chat(conversation.messages):
        content = message["content"].strip()
        place = text.find(content, cursor) if content else -1
        if place >= 0:
            cursor = place + len(content)
            written[place:cursor] = [message["role"]] * len(content)
    return written


def _pieces(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """Cut a text at the ends of tokens; together the pieces are the text."""
    pieces = []
    position = 0
    for _, end in offsets:
        pieces.append(text[position : max(position, end)])
        position = max(position, end)
    if pieces:
        pieces[-1] += text[position:]
    return pieces
