"""Keys that nothing reads are counted, and remedies that are named work."""

import json
import re

import pytest
from chat_files import parquet, write
from chat_forms import ASK, BRANCHES, BRIEF, PAIR, REFUSED, REPLY, A, Q, lines, read, turns

from medusa_exp.data import DataError, read_conversations
from medusa_exp.data.parsing import ChatParser
from medusa_exp.data.remedies import columns_for


def test_keys_that_are_not_used_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    records = [
        {
            "messages": [ASK | {"reasoning_content": "Hm."}, REPLY],
            "functions_": [{"x": 1}],
            "null": None,
        },
        {"messages": [ASK, REPLY | {"name": ""}], "tools": [], "topic": "sums"},
        {"question": Q, "answer": A, "topic": "sums", "system_prompt": "Be brief."},
        [ASK | {"name": "Al"}, REPLY],
        {"conversation": [{"human": Q, "assistant": A, "mood": "good"}], "winner": "x"},
        {"conversation": [{"human": Q, "assistant": A, "text": "another"}]},
        {"conversation": [ASK | {"human": "another"}, REPLY]},
        {"messages": json.dumps([ASK | {"topic": "sums"}, REPLY])},
        {"messages": [ASK, {"role": "tool", "content": "4", "reasoning": "Hm."}, REPLY]},
        {
            "dialog": [
                {"speaker": "human", "author": "Al", "text": Q, "utterance": "another"},
                {"speaker": "gpt", "author": "assistant", "content": [{"text": A}], "text": A},
            ]
        },
    ]
    path = write(tmp_path / "a.jsonl", lines([records[1]] * 120 + records))
    reading = read_conversations(path)
    reading.look_at = 1000
    expected = {
        "messages[].reasoning_content": 1,
        "functions_": 1,
        "topic": 122,
        "[].name": 1,
        "conversation[].mood": 1,
        "winner": 1,
        "conversation[].text": 1,
        "conversation[].human": 1,
        "messages[].topic": 1,
        "messages[].reasoning": 1,
        "dialog[].author": 1,
        "dialog[].utterance": 1,
    }
    for _ in range(2):
        assert len(list(reading)) == 130 and reading.num_looked_at == 130
        assert reading.unused == expected
    [line] = [r for r in caplog.records if "not used" in r.message]
    assert line.levelname == "WARNING" and "130 records" in line.message
    assert "topic (122)" in line.message and "messages[].reasoning_content (1)" in line.message
    quick = read_conversations(path)
    assert len(list(quick)) == 130 and quick.unused == {"topic": 100}  # of the first ones
    plain = write(tmp_path / "b.jsonl", lines([{"messages": [ASK, REPLY], "id": "1"}]))
    caplog.clear()
    assert list(read_conversations(plain)) and not caplog.records


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (
            {"request": {"messages": [ASK]}, "response": {"choices": [{"message": REPLY}]}},
            "{user: request.messages, assistant: response.choices.0.message.content}",
        ),
        (
            {
                "request": {"contents": [{"role": "user", "parts": [{"text": Q}]}]},
                "response": {
                    "candidates": [{"content": {"role": "model", "parts": [{"text": A}]}}]
                },
            },
            "{user: request.contents, assistant: response.candidates.0.content}",
        ),
        (
            {"input": {"messages": [ASK]}, "preferred_output": [REPLY], "non_preferred_output": []},
            "{user: input.messages, assistant: preferred_output}",
        ),
        ({"chat": {"messages": [ASK, REPLY]}, "n": 1}, "{messages: chat.messages}"),
        ({"turns": [{"user": Q, "assistant": A}]}, "{messages: turns}"),
        ({"question": Q, "answer": {"text": A}}, "{user: question, assistant: answer.text}"),
        (REFUSED["squad"][0], "{user: question, assistant: answers.text.0}"),
        ({"Instruction": Q, "Response": A}, "{user: Instruction, assistant: Response}"),
        ({"problem": Q, "answer": "4", "solution": A}, "{user: problem, assistant: solution}"),
        ({"problem": Q, "generated_solution": A}, "{user: problem, assistant: generated_solution}"),
        ({"inputs": Q, "targets": A, "n": "x"}, "{user: inputs, assistant: targets}"),
        ({"input": Q, "target": A}, "{user: input, assistant: target}"),
        (
            {
                "fields": {"instruction": Q},
                "suggestions": {"response": {"value": "5"}},
                "responses": {"response": [{"value": A}]},
            },
            "{user: fields.instruction, assistant: responses.response.0.value}",
        ),
    ],
)
@pytest.mark.parametrize("system", [{}, {"system": "Be brief."}])
def test_a_remedy_that_is_named_works(tmp_path, record, columns, system):
    path = write(tmp_path / "a.jsonl", lines([record | system] * 2))
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    columns = columns.replace("}", ", system: system}") if system else columns
    assert f"say 'dataset.columns={columns}'." in str(caught.value)
    chosen = dict(re.findall(r"(\w+): ([\w.]+)", columns))
    assert read(path, columns=chosen)[0] == [BRIEF if system else PAIR] * 2


@pytest.mark.parametrize(
    "columns",
    [
        "{messages: a.b, system: systemInstruction}",
        "{messages: a.b, system: a.params.system}",
        "{messages: a.b, system: request.system}",
    ],
)
def test_a_remedy_reads_the_system_text_wherever_it_stands(tmp_path, columns):
    chat = {"b": [ASK, REPLY], "params": {}}
    texts = {
        "systemInstruction": {"systemInstruction": {"parts": [{"text": "Be brief."}]}},
        "a.params.system": {"a": chat | {"params": {"system": "Be brief."}}},
        "request.system": {"request": {"system": [{"type": "text", "text": "Be brief."}]}},
    }
    chosen = dict(re.findall(r"(\w+): ([\w.]+)", columns))
    path = write(tmp_path / "a.jsonl", lines([{"a": chat} | texts[chosen["system"]]] * 2))
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert f"say 'dataset.columns={columns}'." in str(caught.value)
    assert read(path, columns=chosen)[0] == [BRIEF] * 2


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (
            {
                "request": {"messages": [ASK, REPLY, ASK]},
                "response": {"choices": [{"message": REPLY}]},
            },
            "{user: request.messages, assistant: response.choices.0.message.content}",
        ),
        (
            {"body": {"messages": [ASK, REPLY, ASK]}, "output": A},
            "{user: body.messages, assistant: output}",
        ),
        (
            {"chat": [ASK, REPLY, ASK], "output": {"text": A}},
            "{user: chat, assistant: output.text}",
        ),
        ({"chat": [ASK, REPLY, ASK], "score": 1}, "{messages: chat}"),
    ],
)
def test_a_remedy_reads_the_answer_to_the_last_question(tmp_path, record, columns):
    path = write(tmp_path / "a.jsonl", lines([record] * 2))
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert f"say 'dataset.columns={columns}'." in str(caught.value)
    chosen = dict(re.findall(r"(\w+): ([\w.]+)", columns))
    assert read(path, columns=chosen)[0][0] == (PAIR * 2)[: 4 if "user" in chosen else 3]


@pytest.mark.parametrize(
    "record",
    [
        {"message_1": Q, "message_2": A},
        {"turns": [{"ask": Q, "answer": A}, {"ask": "And 3+3?", "answer": "6."}]},
        {"prompt": Q, "answers": [{"answer": "5", "rank": 2}, {"answer": A, "rank": 1}]},
        {"a\ud800": {"b c": [ASK, REPLY]}},
        {"messages": [ASK]},
        {
            "fields": {"instruction": Q},
            "suggestions": {"response": {"value": "5"}},
            "responses": {"response": [{"value": "5"}, {"value": A}]},
        },
    ],
)
def test_where_none_would_be_right_no_columns_are_named(record):
    assert columns_for(json.dumps(record).encode(), {}) == ""


@pytest.mark.parametrize(
    "system", [{"system": "Be brief."}, {"systemInstruction": {"parts": [{"text": "Be brief."}]}}]
)
@pytest.mark.parametrize("name", ["two replies", "two chats", "two dialogs", "two answers"])
def test_a_choice_that_is_offered_works(tmp_path, name, system):
    path = write(tmp_path / "a.jsonl", lines([REFUSED[name][0] | system] * 2))
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert "dataset.form" not in str(caught.value)
    offered = re.findall(r"'dataset\.columns=\{(.+?)\}'", str(caught.value))
    found = [read(path, columns=dict(re.findall(r"(\w+): ([\w.]+)", o)))[0] for o in offered]
    assert len(found) == 2 and BRIEF in (found[0][0], found[1][0]) and found[0] != found[1]
    assert all(chat[0] == BRIEF[0] for chat, _ in found)


@pytest.mark.parametrize(
    ("key", "level"),
    [
        *((key, "WARNING") for key in ("video", "tool_calls", "weight", "system_message")),
        *((key, "WARNING") for key in ("completion", "choices", "thinking", "mask")),
        ("topic", "INFO"),
    ],
)
def test_keys_that_would_change_what_is_trained_are_a_warning(tmp_path, caplog, key, level):
    caplog.set_level("INFO")
    path = write(tmp_path / "a", lines([{"q": Q, "a": A, key: "x"}]))
    assert list(read_conversations(path, columns={"user": "q", "assistant": "a"}))
    assert [line.levelname for line in caplog.records if f": {key} (1)" in line.message] == [level]


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("contents", {"question": Q, "answer": {"text": A}}),
        ("messages", {"messages": [ASK], "label": REPLY}),
        ("prompt", REFUSED["two replies"][0]),
    ],
)
def test_columns_are_not_named_beside_a_form(tmp_path, form, record):
    path = write(tmp_path / "a.jsonl", lines([record] * 2))
    words = f"dataset.columns=.* Leave out dataset.form={form} then.$"
    with pytest.raises(DataError, match=words):
        list(read_conversations(path, form=form))
    if form == "contents":  # a table without a column of the form
        with pytest.raises(DataError, match=words):
            list(read_conversations(write(tmp_path / "a", parquet([record])), form=form))
    with pytest.raises(DataError, match=r"dataset.columns=(?!.*dataset.form=)"):
        list(read_conversations(path))


def test_no_choice_names_keys_within_a_request(tmp_path):
    body = {"messages": [ASK], "response": A, "output": "5"}
    with pytest.raises(DataError, match=r"the keys response and output.*within its body") as caught:
        list(read_conversations(write(tmp_path / "a.jsonl", lines([{"body": body}]))))
    assert "{user: messages" not in str(caught.value)


def test_what_is_said_of_many_keys_and_files_has_an_order_of_its_own(tmp_path, caplog):
    others = {f"key{number}": 1 for number in range(9, 0, -1)}
    write(tmp_path / "a.jsonl", lines([{"messages": [ASK, REPLY], **others}]))
    files = [write(tmp_path / f"b{number}.jsonl", lines([{"x": 1}])) for number in range(9)]
    reading = read_conversations(tmp_path)
    assert len(list(reading)) == 1 and list(reading.unused) == sorted(others)
    said = [text for text in caplog.messages if "for it holds no chats" in text]
    assert [f"{file} has no" in text for file, text in zip(files, said, strict=True)] == [True] * 9


def test_keys_below_a_path_that_are_not_used_are_counted(tmp_path):
    chat = {"messages": [ASK, REPLY | {"deleted": True}], "topic": "sums"}
    path = write(tmp_path / "a", lines([{"chat": chat, "n": 1}]))
    reading = read_conversations(path, columns={"messages": "chat.messages"})
    assert list(reading)
    assert reading.unused == {"chat.messages[].deleted": 1, "chat.topic": 1, "n": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"human": Q, "gpt": A}]},
        {"messages": [{"author": "user", "content": Q}, {"author": "bot", "text": A}]},
        {"messages": [{"sender": "user", "role": "human", "content": Q, "text": Q}, REPLY]},
        {"messages": [{"type": "human", "data": {"content": Q}}, REPLY]},
        {"messages": BRANCHES, "currNode": "7"},
        {"messages": [ASK | {"id": "1", "children": [REPLY]}]},
        {"messages": BRANCHES, "conv": {"currNode": "7"}},
        {"body": {"messages": [ASK], "response": A}},
        {"conversation": [{"input": Q, "output": A}]},
        {"conversation": [{"input": Q, "output": A, "system": ""}]},
        {"conversation": [{"input": Q, "output": A}, {"input": Q, "output": A, "system": "x"}]},
        {"prompt": Q, "chosen": [ASK, REPLY]},
        {"prompt": [ASK], "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}"},
    ],
)
def test_what_is_read_is_not_counted_as_unused(record):
    parser = ChatParser()
    assert turns(parser.parse(json.dumps(record).encode()))[:2] == PAIR and not parser.unused


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"prompt": "Else?", "chosen": [ASK, REPLY]}, {"prompt"}),
        ({"question": "Else?", "context": "x", "chosen": [ASK, REPLY]}, {"question", "context"}),
        ({"messages": [{"role": "user", "content": "Else?"}], "chosen": [ASK, REPLY]}, "messages"),
        ({"prompt": Q, "completion": REPLY | {"text": "x", "name": "y"}}, "completion"),
        ({"messages": [ASK], "response": REPLY | {"text": "x"}}, "response"),
        ({"prompt": Q, "chosen": A, "history": [ASK | {"name": "x"}, REPLY]}, "history"),
    ],
)
def test_what_is_not_read_of_answers_and_questions_is_counted(record, keys):
    parser = ChatParser()
    assert turns(parser.parse(json.dumps(record).encode()))[-2:] == PAIR
    assert {key.partition("[")[0] for key in parser.unused} == (
        {keys} if isinstance(keys, str) else keys
    )


def test_the_end_of_a_branch_is_counted_where_there_is_none():
    parser = ChatParser()
    parser.parse(json.dumps({"messages": [ASK, REPLY], "conv": {"currNode": "7"}}).encode())
    assert {*parser.unused} == {"conv"}


def test_what_is_passed_over_in_a_turn_is_counted():
    parser = ChatParser()
    told = [ASK | {"input": "x", "channel": "web"}, REPLY | {"output": "x", "children": ["9"]}]
    parser.parse(json.dumps({"messages": told}).encode())
    assert {*parser.unused} == {
        f"messages[].{k}" for k in ("input", "channel", "output", "children")
    }


def test_columns_that_are_numbers_get_no_remedy(tmp_path):
    """As pandas writes a table without names."""
    path = write(tmp_path / "a.jsonl", lines([{"0": Q, "1": A}] * 2))
    with pytest.raises(DataError, match=r"has no known form of chat: its keys are 0, 1\."):
        list(read_conversations(path))
