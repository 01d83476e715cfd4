"""Documents on their way: a batch of them in, answered turn by turn by the backbone, out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from medusa_exp.data.examples import Example
from medusa_exp.decode.answers import Decoded, Limits
from medusa_exp.decode.rule import Rule
from medusa_exp.model.backbone import Backbone

Decode = Callable[[list[list[int]], Limits, Rule], list[Decoded]]


@dataclass
class Document:
    """A conversation on its way: the backbone's answers so far, between the data's other turns."""

    row: int
    """Number in the table of tokenised documents."""
    contexts: list[list[int]]
    """What stands before each assistant turn, from the end of the turn before."""
    tokens: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    """Where the answers begin and end in `tokens`."""
    outcome: str = "whole"
    """Or why later turns are missing: `unfinished` or `no room`."""


def document_of(row: int, example: Example) -> Document:
    """Take a document's turns apart: what is trained is to be answered anew, the rest stays."""
    edges = np.flatnonzero(np.diff(example.is_trained.astype(np.int8), prepend=0, append=0))
    starts, stops = edges[::2].tolist(), edges[1::2].tolist()
    ids = example.input_ids.tolist()
    return Document(row, [ids[a:b] for a, b in zip([0, *stops], starts, strict=False)])


def answer(
    batch: list[Document],
    decode: Decode,
    limits: Limits,
    rule: Rule,
    max_length: int,
    backbone: Backbone,
) -> None:
    """Let the backbone answer each turn of some documents, one turn of all of them after another.

    A document ends early with an answer that finds no end within the limit, or before one that
    would not fit into `max_length` tokens.
    """
    for turn in range(max(len(document.contexts) for document in batch)):
        asked = list(_next_turn(batch, turn, limits.max_new_tokens, max_length, backbone))
        if not asked:
            break
        for document, decoded in zip(
            asked, decode([document.tokens for document in asked], limits, rule), strict=True
        ):
            start = len(document.tokens)
            document.tokens += decoded.tokens
            document.answers.append((start, len(document.tokens)))
            if len(decoded.tokens) == limits.max_new_tokens and (
                decoded.tokens[-1] not in limits.stop_ids
            ):
                document.outcome = "unfinished"


def _next_turn(
    batch: list[Document], turn: int, new_tokens: int, max_length: int, backbone: Backbone
) -> Iterator[Document]:
    """Yield the documents that have such a turn and room for it, their next context appended."""
    for document in batch:
        if document.outcome != "whole" or turn >= len(document.contexts):
            continue
        length = len(document.tokens) + len(document.contexts[turn])
        if length + new_tokens > min(max_length, backbone.max_length_from(length)):
            document.outcome = "no room"
            continue
        document.tokens += document.contexts[turn]
        yield document
