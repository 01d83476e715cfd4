"""The property that masks stand for, tried on contents and templates that want to break it.

Each template has a twin in Python that says which characters are the assistant's: the reply as
rendered, and its end mark. A token must be trained exactly if its last character is one of them.
"""

import unicodedata

import pytest
from chat_templates import TEMPLATES, TOKENIZERS, build_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from medusa_exp.data import Conversation, Message, render
from medusa_exp.data.masking import _PROBE

PIECES = st.sampled_from(
    [
        "a", "I", "I am", "hello", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x00", "</s>", "<s>",
        "<|end|>", "<|user|>", "<|assistant|>", "<|im_start|>assistant\n", "<|im_end|>", "USER: ",
        "ASSISTANT:", "[/INST]", "{{x}}", "{% if %}", "<think>", "</think>", "\u00e9", "e\u0301",
        "\U0001f600", "\u4f60\u597d", "\ufeff", "\u200b", "\ufb01", "\ud800", "\udfff", "1 + 1 = 2",
        "```python\nx\n```", "aaaaaaaaaaaaaaaaaaaaaaaa", _PROBE,
    ]
)  # fmt: skip
CONTENTS = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    said = draw(st.lists(CONTENTS, min_size=1, max_size=3))  # turns take from few texts: repeats
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(st.sampled_from(said))))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(st.sampled_from(said))))
        messages.append(Message("assistant", draw(st.sampled_from(said))))
    if draw(st.booleans()):
        messages.append(Message("user", draw(st.sampled_from(said))))
    return messages


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
def test_a_token_is_trained_exactly_if_its_last_character_is_the_assistants(name, kind, messages):
    template = TEMPLATES[name]
    tokenizer = build_tokenizer(kind, template.source)
    rows = render(Conversation("c", messages), tokenizer)
    expected = template.rows([Message(m.role, clean(m.content)) for m in messages])
    assert [row.text for row in rows] == ["".join(t for t, _ in pieces) for pieces in expected]
    for row, pieces in zip(rows, expected, strict=True):
        check_row(row, pieces, tokenizer)


def check_row(row, pieces, tokenizer):
    is_own = [own for text, own in pieces for _ in text]
    encoded = tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
    assert row.input_ids == encoded.input_ids
    offsets = [(start, own_end(row.text, start, end)) for start, end in encoded.offset_mapping]
    for (start, end), is_trained in zip(offsets, row.is_trained, strict=True):
        # A token without width (blanks, under trim_offsets) stands behind its characters.
        assert is_trained == (end > 0 and is_own[end - 1]), (start, end, row.text[start:end])
    if all(is_own[start] == is_own[end - 1] for start, end in offsets if end > start):
        trained = [i for i, t in zip(row.input_ids, row.is_trained, strict=True) if t]
        own = "".join(text for text, own in pieces if own)
        assert comparable(tokenizer.decode(trained)) == comparable(own)


def own_end(text, start, end):
    """A mark that took the blanks behind it along ends before them."""
    return start + len(text[start:end].rstrip()) if text.startswith("<|", start) else end


def comparable(text: str) -> str:
    """NFKC rewrites what it reads; metaspaces, trimmed offsets and greedy marks change blanks."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def clean(text: str) -> str:
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
