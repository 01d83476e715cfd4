"""From chat files to batches of tokens, with a mask of what is trained."""

from medusa_exp.data.conversations import Reading, read_conversations
from medusa_exp.data.faults import DataError
from medusa_exp.data.messages import Conversation, Message
from medusa_exp.data.rendering import MaskedTokens, render

__all__ = [
    "Conversation",
    "DataError",
    "MaskedTokens",
    "Message",
    "Reading",
    "read_conversations",
    "render",
]
