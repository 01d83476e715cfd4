"""Chat transcripts in, tokens with a training mask out."""

from medusa_exp.data.conversations import (
    Conversation,
    DataError,
    Message,
    Reading,
    read_conversations,
)
from medusa_exp.data.masking import Rendered, render

__all__ = [
    "Conversation",
    "DataError",
    "Message",
    "Reading",
    "Rendered",
    "read_conversations",
    "render",
]
