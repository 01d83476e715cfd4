"""The property that masks stand for, tried on contents and templates that want to break it.

Each template has a twin in Python that says which characters are the assistant's: the reply as
rendered, and its end mark. A token must be trained exactly if its last character is one of them.
"""

import json
import unicodedata
from unittest import mock

import msgspec
import pytest
from chat_templates import FULL_TEMPLATES, TEMPLATES, TOKENIZERS, build_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from medusa_exp.data import Conversation, DataError, Message, masking, render
from medusa_exp.data.masking import _PROBE, NO_REASONING, NO_TOOLS
from medusa_exp.data.rendering import Renderer, Seams

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


@st.composite
def full_conversations(draw: st.DrawFn) -> tuple[list[Message], str]:
    """With reasoning, calls, turns that are not to be trained, and tools."""
    messages = []
    for m in draw(conversations()):
        if m.role == "assistant":
            fields = ""
            if draw(st.booleans()):
                call = {
                    "type": "function",
                    "function": {"name": "f", "arguments": {"x": m.content}},
                }
                fields = json.dumps({"tool_calls": [call]}, ensure_ascii=False)
            thought = draw(st.sampled_from(["", m.content, " so \n"]) | CONTENTS)
            m = Message(m.role, m.content, thought, draw(st.booleans()), fields)
        messages.append(m)
    return messages, draw(
        st.sampled_from(["", '[{"type": "function", "function": {"name": "f"}}]'])
    )


@pytest.mark.parametrize("name", FULL_TEMPLATES)
@given(drawn=full_conversations(), kind=st.sampled_from(TOKENIZERS))
def test_reasoning_and_calls_are_the_assistants_where_they_are_written(name, drawn, kind):
    template = FULL_TEMPLATES[name]
    messages, tools = drawn
    if not name.startswith("thinking") or "newest" in name:
        messages = [msgspec.structs.replace(m, fields="") for m in messages]
    tokenizer = build_tokenizer(kind, template.source)
    rows = render(Conversation("c", messages, tools=tools), tokenizer)
    said = [
        msgspec.structs.replace(
            m, content=clean(m.content), reasoning=clean(m.reasoning), fields=clean(m.fields)
        )
        for m in messages
    ]
    expected = template.rows(said, tools)
    if any(m.is_trained for m in said if m.role == "assistant"):
        texts = ["".join(text for text, _ in pieces) for pieces in expected]
        assert [row.text for row in rows] == texts
        for row, pieces in zip(rows, expected, strict=True):
            check_row(row, pieces, tokenizer)
    else:
        assert not any(any(row.is_trained) for row in rows)
    if name == "unthinking":
        left_out = {NO_REASONING} if any(m.reasoning for m in said) else set()
        left_out |= {NO_TOOLS} if tools else set()
        assert all(row.left_out == left_out for row in rows)


def test_calls_that_a_template_leaves_out_are_refused():
    call = json.dumps({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]})
    chat = [Message("user", "q"), Message("assistant", "", fields=call)]
    tokenizer = build_tokenizer("bytes", FULL_TEMPLATES["unthinking"].source)
    with pytest.raises(DataError, match="leaves out the tool calls of turn 1"):
        render(Conversation("c", chat), tokenizer)


def test_calls_that_a_template_refuses_without_tools_are_kept_with_them():
    source = (
        "{% if not tools and messages[-1].tool_calls %}{{ raise_exception('no tools') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.tool_calls or '' }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = json.dumps({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]})
    chat = [Message("user", "q"), Message("assistant", "", fields=call)]
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    [row] = render(Conversation("c", chat, tools=tools), build_tokenizer("bytes", source))
    assert any(row.is_trained) and not row.left_out


LONG = st.lists(conversations(), min_size=1, max_size=5).map(
    lambda parts: [message for part in parts for message in part]
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(messages=LONG, name=st.sampled_from([*TEMPLATES]), limit=st.integers(1, 24))
def test_what_is_beyond_a_limit_changes_nothing_within_it(kind, messages, name, limit):
    """Neither is it rendered turn by turn, nor tokenized."""
    tokenizer = build_tokenizer(kind, TEMPLATES[name].source)
    chat = Conversation("c", messages)
    [whole] = Renderer(tokenizer).render_many([chat])
    [found] = Renderer(tokenizer, limit).render_many([chat])
    assert len(found) == len(whole)
    for row, full in zip(found, whole, strict=True):
        assert row.is_cut == (len(full.input_ids) > limit)
        if row.input_ids:  # rows behind the first without a trained token are empty
            assert row.input_ids == full.input_ids[:limit]
            assert row.is_trained == full.is_trained[:limit]
        else:
            assert not any(full.is_trained[:limit])
        if row.input_ids and not any(row.is_trained) and any(full.is_trained):
            assert row.num_needed == full.is_trained.index(True) + 1


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=LONG)
def test_many_turns_are_located_together_as_they_are_one_by_one(name, messages):
    tokenizer = build_tokenizer("bytes", TEMPLATES[name].source)
    chat = Conversation("c", messages)
    one_by_one = render(chat, tokenizer)
    with mock.patch.object(masking, "_ONE_BY_ONE", 2):
        assert render(chat, tokenizer) == one_by_one


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    text=st.lists(PIECES, max_size=12).map(lambda p: clean("".join(p))), place=st.integers(0, 60)
)
def test_a_text_that_is_cut_at_a_seam_has_the_same_tokens_before_it(kind, text, place):
    tokenizer = build_tokenizer(kind, "x")
    found = Seams(tokenizer).behind(text, place)
    if found is not None:
        whole, cut = (
            tokenizer(t, add_special_tokens=False).input_ids for t in (text, text[:found])
        )
        assert found >= place and whole[: len(cut)] == cut


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
