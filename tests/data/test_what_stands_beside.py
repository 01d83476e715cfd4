"""What one record says in several places or words: read once, or refused, never lost."""

import json

import pytest
from chat_files import parquet, write
from chat_forms import (
    AGAIN,
    ASK,
    BRIEF,
    MORE,
    PAIR,
    REPLY,
    A,
    Q,
    lines,
    parse,
    read,
    turns,
)

from medusa_exp.data import read_conversations
from medusa_exp.data.parsing import ChatParser
from medusa_exp.data.records import Ambiguous


def test_what_stands_beside_texts_in_other_words(tmp_path):
    same = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
    records = [
        {"conversation": [{"user": Q, "assistant": A, "reasoning": "Hm."}]},
        {"messages": [{"role": "system", "content": "Be brief."}, ASK, REPLY], "conversations": []},
        {"messages": [ASK, REPLY], "conversations": same, "system": {"content": "Be brief."}},
        {"messages": [ASK | {"from": "human", "value": Q}, REPLY]},
        {"conversation": [{"human": Q, "gpt": A, "system": ""}]},
        {"conversation": [{"human": Q, "gpt": A, "system": " "}]},
    ]
    found = list(read_conversations(write(tmp_path / "a", lines(records))))
    assert [turns(chat) for chat in found] == [PAIR, BRIEF, BRIEF, PAIR, PAIR, PAIR]
    assert found[0].messages[1].reasoning == "Hm."


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_content": "Hm."},
        {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": A}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        {"train": False},
    ],
)
@pytest.mark.parametrize("keys", [("conversations", "messages"), ("conversation", "dialog")])
def test_no_list_of_turns_says_more_than_the_one_that_counts(more, keys):
    more = [ASK, REPLY, ASK, REPLY | more]
    for lists in ([more, [ASK, REPLY] * 2], [[ASK, REPLY] * 2, more]):
        with pytest.raises(Ambiguous, match=" and ".join(keys)):
            parse(dict(zip(keys, lists, strict=True)))
        assert turns(parse({keys[1]: lists[1]})) == PAIR * 2


def test_a_system_text_of_one_list_of_turns_is_not_dropped():
    plain, brief = [ASK, REPLY], [{"role": "system", "content": "Be brief."}, ASK, REPLY]
    for lists in ((plain, brief), (brief, plain)):
        record = dict(zip(("conversations", "messages"), lists, strict=True))
        with pytest.raises(Ambiguous):
            parse(record)
        assert turns(parse(record | {"system": "Be brief."})) == BRIEF


def test_lists_of_turns_may_say_the_same_in_other_words():
    parts = [ASK | {"content": [{"type": "text", "text": Q}]}, REPLY | {"tool_calls": []}]
    assert turns(parse({"conversations": [ASK, REPLY], "messages": parts})) == PAIR


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": [ASK], "completion": [ASK, REPLY]}, PAIR),
        ({"prompt": [SYSTEM, ASK], "completion": [ASK, REPLY]}, BRIEF),
        ({"prompt": [SYSTEM, ASK], "chosen": [ASK, REPLY]}, BRIEF),
        ({"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, REPLY]}, BRIEF),
        ({"prompt": "And 3+3?", "completion": "6.", "history": [ASK, REPLY, MORE[0]]}, AGAIN),
        (
            {"prompt": [SYSTEM, MORE[0]], "completion": "6.", "history": [ASK, REPLY]},
            [BRIEF[0], *AGAIN],
        ),
        (
            {"prompt": [SYSTEM, MORE[0]], "completion": "6.", "history": [SYSTEM, ASK, REPLY]},
            [BRIEF[0], *AGAIN],
        ),
    ],
)
def test_a_turn_that_two_keys_hold_is_read_once(record, expected):
    assert turns(parse(record)) == expected
    if "completion" in record and "history" not in record:
        columns = {"user": "prompt", "assistant": "completion"}
        found = ChatParser(columns=columns).parse(json.dumps(record).encode())
        assert turns(found) == expected


def test_a_system_text_beside_a_request_is_read():
    request = {"messages": [ASK, REPLY]}
    assert turns(parse({"body": request, "system": "Be brief."})) == BRIEF
    assert turns(parse({"body": request | {"system": "Be brief."}, "system": "Be brief."})) == BRIEF
    with pytest.raises(Ambiguous, match="one within"):
        parse({"body": request | {"system": "Be brief."}, "system": "Be kind."})


def test_two_texts_are_refused_whatever_says_who_speaks():
    told = {"author": "assistant", "value": A, "content": "5"}
    assert parse({"messages": [ASK, told]}) == "a turn with two roles or two texts"
    assert turns(parse({"messages": [ASK, told | {"content": A}]})) == PAIR


@pytest.mark.parametrize("question", [{"prompt": Q}, {"messages": [ASK]}])
def test_several_answers_are_no_chat_of_their_own(question):
    assert parse({**question, "chosen": [A, "4"], "rejected": ["5"]}) == (
        "several answers to one question"
    )


def test_earlier_turns_of_a_preferred_answer_are_read_of_tables_too(tmp_path):
    record = {"prompt": "And 3+3?", "chosen": "6.", "rejected": "5.", "history": [[Q, A]]}
    for data in (lines([record]), parquet([record])):
        for form in ("auto", "chosen"):
            reading = read_conversations(write(tmp_path / "a", data), form=form)
            assert [turns(chat) for chat in reading] == [AGAIN]
            assert "history" not in reading.unused


def test_two_requests_of_one_record_are_not_read_as_the_first():
    one, other = {"messages": [ASK, REPLY]}, {"messages": MORE}
    assert turns(parse({"body": one, "params": one})) == PAIR
    with pytest.raises(Ambiguous, match="body and request"):
        parse({"body": one, "request": other})


@pytest.mark.parametrize(
    "said",
    [
        {"text": A},
        {"value": A, "annotations": []},
        {"content": [{"type": "text", "text": A}]},
        {"parts": [{"text": "It is "}, {"text": "4."}]},
        {"content_type": "text", "parts": ["It is ", "4."]},
        {"type": "text", "text": A},
        [{"type": "text", "text": {"value": A, "annotations": []}}],
    ],
)
def test_an_object_that_holds_one_text_is_that_text(tmp_path, said):
    for key in ("content", "value", "text"):
        asked = {"text": Q} if isinstance(said, dict) else [{"type": "text", "text": {"value": Q}}]
        record = {"messages": [ASK | {"content": asked}, {"role": "assistant", key: said}]}
        for data in (lines([record]), parquet([record])):
            reading = read_conversations(write(tmp_path / "a", data))
            assert [turns(chat) for chat in reading] == [PAIR] and not reading.unused


@pytest.mark.parametrize(
    ("said", "detail"),
    [
        ({"answer": A}, "it is an object of answer in a turn of role assistant: write it as text"),
        ({"text": A, "lang": "en"}, "it is an object of text, lang in a turn"),
        ({"text": A, "parts": ["5"]}, "it is an object of text, parts in a turn"),
        ({"content_type": "code", "text": A}, "it is an object of content_type, text in a turn"),
    ],
)
def test_an_object_that_may_hold_others_is_named(said, detail):
    parser = ChatParser()
    record = {"messages": [ASK, {"role": "assistant", "content": said}]}
    assert parser.parse(json.dumps(record).encode()) == "content is not text"
    assert parser.detail.startswith(detail)
    told = {"messages": [ASK, {"role": "tool", "content": {"text": "4"}}, REPLY]}
    assert parse(told) == "content is not text"  # of a tool, it may be all of it


@pytest.mark.parametrize("said", [4, True])
def test_what_is_no_text_is_named(said):
    turns = {"messages": [ASK, {"role": "assistant", "value": said}]}
    for record in (turns, {"user": Q, "assistant": said}) if said is True else (turns,):
        parser = ChatParser()
        assert parser.parse(json.dumps(record).encode()) == "content is not text"
        assert parser.detail == f"it is {said!r} in a turn of role assistant: write it as text"
    parser = ChatParser()
    record = {"messages": [ASK, REPLY], "system": 5}
    assert parser.parse(json.dumps(record).encode()) == "content is not text"
    assert parser.detail == "the system text is 5"


@pytest.mark.parametrize(
    "beside",
    [
        {"prompt": Q, "response": [A, "5"]},
        {"question": Q, "context": ["x"], "answer": A},
        {"conversation_a": [ASK, REPLY], "conversation_b": [ASK, REPLY]},
        {"prompt": Q, "completion": A, "history": "Hi."},
    ],
)
def test_the_first_records_are_not_dropped_for_what_stands_beside_their_messages(tmp_path, beside):
    records = [{"messages": [ASK, REPLY], **beside}] * 120
    assert read(write(tmp_path / "a", lines(records))) == ([PAIR] * 120, {"messages": 120})
    assert isinstance(parse(beside), str)  # and is not read by itself


def test_words_beside_an_empty_content_are_read(tmp_path):
    asked = {"role": "user", "content": "", "parts": [{"type": "text", "text": Q}]}
    told = {"from": "gpt", "value": "[]", "text": A}
    records = [{"messages": [asked, told]}] * 120
    for data in (lines(records), parquet(records)):
        assert read(write(tmp_path / "a", data))[0] == [PAIR] * 120
    silent = {"messages": [ASK, REPLY, {"role": "user", "content": ""}]}
    assert turns(parse(silent)) == [*PAIR, ("user", "")]


def test_gemini_s_thoughts_are_thoughts_wherever_they_stand(tmp_path):
    thought = {"role": "assistant", "content": "Hm.", "isThought": True}
    for data in (
        lines([{"messages": [ASK, thought, REPLY]}]),
        parquet([{"messages": [ASK, thought, REPLY]}]),
    ):
        (found,) = read_conversations(write(tmp_path / "a", data))
        assert turns(found) == PAIR and found.messages[1].reasoning == "Hm."


def test_a_number_beside_messages_is_no_other_answer():
    assert turns(parse({"messages": [ASK, REPLY], "prompt": Q, "answer": 5})) == PAIR


def test_an_answer_beside_messages_counts_wherever_it_stands(tmp_path):
    """Also behind the first records of a file, which are looked at more closely."""
    said = {"messages": [ASK, REPLY], "response": "never read"}
    left = {"messages": [ASK, REPLY, MORE[0]], "response": ""}
    asked = {"messages": [ASK, REPLY, MORE[0]], "response": "6."}
    reading = read_conversations(write(tmp_path / "a.jsonl", lines([said] * 120 + [left, asked])))
    *_, open_ended, last = [turns(chat) for chat in reading]
    assert (open_ended, last) == (AGAIN[:3], AGAIN) and reading.unused == {"response": 100}
    assert turns(parse(asked | {"response": '{"sum": 6}'}))[3] == ("assistant", '{"sum": 6}')
    rows = parquet([said, asked])
    for form in ("auto", "messages"):
        assert read(write(tmp_path / "a.parquet", rows), form=form)[0] == [PAIR, AGAIN]
    with pytest.raises(Ambiguous, match="response and output"):
        parse(asked | {"output": "7."})
    assert turns(parse(asked | {"choices": [{"message": MORE[1]}]})) == AGAIN  # the same


def test_a_system_message_before_several_chats_belongs_to_each():
    begun = [{"role": "system", "content": "Be brief."}, ASK | {"children": [REPLY]}, ASK]
    assert turns(parse({"messages": begun})) == BRIEF
