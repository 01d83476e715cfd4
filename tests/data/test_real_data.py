"""Masks on tokenizers and chats of yours: MEDUSA_EXP_TEST_DATA=DIR with tokenizers/* and chat/*."""

import os
import re
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from medusa_exp.data import read_conversations
from medusa_exp.stages.doctor import count_runs, sample_rows

PLACE = os.environ.get("MEDUSA_EXP_TEST_DATA")
TOKENIZERS = sorted(Path(PLACE or "", "tokenizers").glob("*")) if PLACE else []
CHATS = sorted(Path(PLACE or "", "chat").glob("*")) if PLACE else []
pytestmark = pytest.mark.skipif(not PLACE, reason="MEDUSA_EXP_TEST_DATA is not set")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", CHATS, ids=lambda path: path.name)
@pytest.mark.parametrize("directory", TOKENIZERS, ids=lambda path: path.name)
def test_trained_tokens_spell_the_replies(directory, chat):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    conversations = list(read_conversations(chat))
    rows = sample_rows((("chat", conversation) for conversation in conversations), tokenizer)
    said: dict[str, str] = {}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    for row in rows:
        rendered = row.rendered
        assert rendered.input_ids.count(tokenizer.bos_token_id) <= 1
        ids = [i for i, t in zip(rendered.input_ids, rendered.is_trained, strict=True) if t]
        assert ids[-1] in special, "the mark that ends a turn is not trained"
        said.setdefault(row.conversation_id, "")
        said[row.conversation_id] += tokenizer.decode(ids, skip_special_tokens=True)
    for conversation in conversations:
        replies = "".join(m.content for m in conversation.messages if m.role == "assistant")
        assert comparable(said[conversation.id]) == comparable(replies), conversation.id
    runs = count_runs(rows)
    assert runs["runs"] == runs["runs from edge to edge of a reply"] > 0


def comparable(text: str) -> str:
    """Normalisers and templates take liberties with blanks and with composed characters."""
    return re.sub(r"\s", "", unicodedata.normalize("NFC", text))
