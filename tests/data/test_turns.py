"""What stands beside roles and texts: read, or the record is dropped for a named reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medusa_exp.data import read_conversations
from medusa_exp.data.messages import Message
from medusa_exp.data.parsing import ChatParser

ASK = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "4"}
A = REPLY["content"]
_CHOICE = "an answer that only names one of its choices"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def parse(record):
    """Read a record as a line and as a row, which must be the same."""
    line = ChatParser().parse(json.dumps(record).encode())
    row = ChatParser().parse(record)
    if isinstance(line, str):
        assert line == row
        return line
    assert (line.messages, line.tools) == (row.messages, row.tools)
    return line


@pytest.mark.parametrize(
    "reply",
    [
        REPLY | {"reasoning_content": "Hm."},
        REPLY | {"thinking": "Hm."},
        REPLY | {"reasoning": "Hm.", "reasoning_content": None},
        REPLY
        | {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "4"}]},
        {"from": "gpt", "value": "4", "reasoning_content": "Hm."},
        {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "4"}]},
        {
            "role": "model",
            "parts": [{"text": "Hm.", "thought": True}, {"text": "4", "thoughtSignature": "x"}],
        },
    ],
)
def test_reasoning(reply):
    found = parse({"messages": [ASK, reply]}).messages[1]
    assert (found.content, found.reasoning) == ("4", "Hm.")


@pytest.mark.parametrize(
    "thought",
    [
        {"role": "assistant", "channel": "analysis", "content": "Hm."},
        {"role": "model", "parts": [{"text": "Hm.", "thought": True}]},
        {"role": "model", "text": "Hm.", "isThought": True},
    ],
)
def test_thoughts_in_a_turn_of_their_own(thought):
    final = REPLY | {"channel": "final"}
    found = parse({"messages": [ASK, thought, final, ASK, final, thought]}).messages
    told = [(m.role, m.content, m.reasoning) for m in found]
    asked, replied = ("user", "2+2?", ""), ("assistant", "4", "")
    assert told == [
        asked,
        ("assistant", "4", "Hm."),
        asked,
        replied,
        ("assistant", "", "Hm."),
    ]
    twice = parse({"messages": [ASK, thought, thought, final]}).messages
    assert (twice[1].reasoning, len(twice)) == ("Hm.\nHm.", 2)


@pytest.mark.parametrize(
    ("beside", "is_trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"loss": True}, True),
        ({"loss": None, "train": None}, True),
    ],
)
def test_switches_of_turns(beside, is_trained):
    found = parse({"messages": [ASK, REPLY | beside, ASK | beside, REPLY]})
    assert [m.is_trained for m in found.messages] == [True, is_trained, True, True]


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"x": 2}'}}]},
        {"tool_calls": json.dumps([{"name": "add", "arguments": {"x": 2}}])},
        {"function_call": {"name": "add", "arguments": '{"x": 2}'}},
    ],
)
@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}])
def test_calls(calls, said):
    answer = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}
    found = parse({"messages": [ASK, {"role": "assistant", **said, **calls}, answer, REPLY]})
    assert json.loads(found.messages[1].fields) == {"tool_calls": [CALL]}
    assert found.messages[1].content == ""
    assert json.loads(found.messages[2].fields) == {"tool_call_id": "c1", "name": "add"}


@pytest.mark.parametrize("name", ["function_call", "tool_call", "Tool_Call"])
@pytest.mark.parametrize("said", [CALL["function"], [CALL["function"]], [CALL]])
def test_calls_as_what_a_turn_says(name, said):
    asked, answer = {"from": "human", "value": "2+2?"}, {"from": "observation", "value": "4"}
    called = {"from": name, "value": json.dumps(said)}
    found = parse({"conversations": [asked, called, answer]})
    assert [m.role for m in found.messages] == ["user", "assistant", "tool"]
    assert json.loads(found.messages[1].fields) == {"tool_calls": [CALL]}
    assert found.messages[1].content == ""
    same = {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}, answer]}
    assert parse({"conversations": [asked, called, answer], **same}).messages == found.messages
    as_text = ChatParser({name.lower(): "assistant"}).parse({"conversations": [asked, called]})
    assert as_text.messages[1].content == called["value"]


@pytest.mark.parametrize("said", ["ls", "", None, "[]", "{}", '{"x": 1}', "4", '["ls"]'])
def test_what_is_no_call(said):
    called = {"from": "function_call", "value": said}
    assert parse({"conversations": [called, REPLY]}) == "tool calls in an unknown form"


@pytest.mark.parametrize(
    "beside",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]], "tools": "[]"},
        {"tools": [{"name": "add", "input_schema": {}}]},
    ],
)
def test_tools_beside_messages(beside):
    record = {"messages": [ASK, REPLY], **beside}
    assert json.loads(parse(record).tools) == [TOOL]
    assert json.loads(parse({"custom_id": "r", "body": record}).tools) == [TOOL]
    assert json.loads(parse({"prompt": "2+2?", "completion": "4", **beside}).tools) == [TOOL]


def test_nulls_in_a_text_are_no_holes_of_a_table():
    function = {"name": "add", "arguments": {"x": 2, "unit": None}}
    tool = {**TOOL, "function": {"name": "add", "parameters": {"default": None}}}
    call = {"function": {**function, "arguments": json.dumps(function["arguments"])}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = parse({"messages": [ASK, reply], "tools": json.dumps([tool])})
    assert json.loads(found.messages[1].fields)["tool_calls"][0]["function"] == function
    assert json.loads(found.tools) == [tool]


def test_tools_beside_contents_within_a_request():
    said = [{"role": role, "parts": [{"text": "x"}]} for role in ("user", "model")]
    request = {"contents": said, "tools": [TOOL]}
    assert json.loads(parse({"key": "r", "request": request}).tools) == [TOOL]


@pytest.mark.parametrize("empty", [None, "", [], "[]", {}])
def test_what_is_empty_is_not_there(empty):
    assert not isinstance(parse({"messages": [ASK, REPLY], "image": False}), str)
    found = parse(
        {"messages": [ASK, REPLY | {"tool_calls": empty}], "tools": empty, "images": empty}
    )
    assert (found.tools, found.messages[1].fields) == ("", "")


@pytest.mark.parametrize("key", ["system_prompt", "system_message", "system"])
def test_a_system_prompt_in_its_own_column(key):
    found = parse({"messages": [ASK, REPLY], key: "Be brief."})
    assert [m.role for m in found.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"images": ["a.png"]}, "a picture, a sound or a video"),
        ({"image": "a.png"}, "a picture, a sound or a video"),
        ({"messages": [ASK | {"audio": {"id": "x"}}, REPLY]}, "a picture, a sound or a video"),
        ({"body": {"messages": [ASK, REPLY], "image": "a.png"}}, "a picture, a sound or a video"),
        ({"label": False}, "an answer that is marked as bad"),
        ({"prompt": "x", "completion": "y", "kto_tag": False}, "an answer that is marked as bad"),
        ({"messages": [ASK, REPLY, ASK, REPLY | {"content": ""}]}, "a last answer without words"),
        ({"messages": [ASK, REPLY, ASK, REPLY | {"content": "\n"}]}, "a last answer without words"),
        ({"prompt": "", "completion": "y"}, "a question without words"),
        ({"messages": [ASK | {"content": " "}, REPLY]}, "a question without words"),
        (
            {"messages": [{"role": "system", "content": "A"}, ASK, REPLY], "system": "B"},
            "two system texts that differ",
        ),
        ({"question": "x", "choices": ["y", "z"], "answer": 1}, _CHOICE),
        ({"prompt": "x", "options": {"A": "y", "B": "z"}, "answer": "B."}, _CHOICE),
        ({"prompt": "x", "options": {"A": 3, "B": 4}, "answer": "(b)"}, _CHOICE),
        ({"question": "x", "choices": ["2", "1", "3"], "answer": 2}, _CHOICE),
        (
            {"question": "x", "choices": {"label": ["A", "B"], "text": ["y", "z"]}, "answer": "B"},
            _CHOICE,
        ),
        ({"tools": "search"}, "tools in an unknown form"),
        ({"messages": [ASK, REPLY | {"value": "5"}]}, "a turn with two roles or two texts"),
        ({"messages": [ASK | {"from": "gpt"}, REPLY]}, "a turn with two roles or two texts"),
        ({"tools": [3]}, "tools in an unknown form"),
        ({"messages": [ASK, REPLY | {"thinking": 3}]}, "reasoning that is not one text"),
        (
            {"messages": [ASK, REPLY | {"thinking": "a", "reasoning": "b"}]},
            "reasoning that is not one text",
        ),
        (
            {"messages": [ASK, REPLY | {"weight": 0.5}]},
            "a turn's switch of training that is neither 0 nor 1",
        ),
    ],
)
def test_reasons(record, reason):
    beside = {} if record.keys() & {"body", "prompt", "question"} else {"messages": [ASK, REPLY]}
    assert parse({**beside, **record}) == reason


@pytest.mark.parametrize(
    "beside",
    [
        {"choices": ["1", "2"], "answer": "2"},
        {"choices": ["1", "2"], "answer": "It is 2."},
        {"choices": ["2"], "answer": 2},
        {"choices": ["3", "4"], "answer": 4},
        {"choices": {"A": "1", "B": "2"}, "answer": "2"},
        {"choices": {"label": ["A", "B"], "text": ["1", "2"]}, "answer": "2"},
        {"options": {"temperature": 0.5, "num_predict": 8}, "answer": "2"},
        {"answer": 2},
    ],
)
def test_an_answer_that_says_itself_what_was_chosen(beside):
    assert len(parse({"question": "1+1?", **beside}).messages) == 2


@pytest.mark.parametrize("form", ["auto", "prompt"])
def test_choices_of_a_table_are_looked_at_in_each_form(tmp_path, form):
    row = {"prompt": "1+1?", "completion": "B", "options": ["1", "2"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    reading = read_conversations(tmp_path / "a.parquet", form=form)
    assert not list(reading) and reading.dropped == {_CHOICE: 1}


@pytest.mark.parametrize("first", ["", " ", "A", "A\n"])
def test_a_system_text_stands_once(first):
    record = {"messages": [{"role": "system", "content": first}, ASK, REPLY], "system": "A"}
    assert [m.content.strip() for m in parse(record).messages] == ["A", "2+2?", "4"]


def test_a_turn_without_words_in_between_stays():
    silent = [ASK, REPLY | {"content": ""}]
    for record in (
        {"messages": [*silent, ASK, REPLY]},
        {"messages": [ASK | {"content": ""}, REPLY, ASK, REPLY]},
        {"messages": [ASK, REPLY, *silent[:1], silent[1] | {"weight": 0}]},
        {"messages": [ASK, REPLY, *silent[:1], silent[1] | {"tool_calls": [CALL]}]},
    ):
        assert len(parse(record).messages) == 4


@pytest.mark.parametrize("label", [True, None, 0, 1, "false", "bad", {"is_bad": False}])
def test_what_says_of_no_answer_that_it_is_bad(tmp_path, label):
    pair = {"prompt": "2+2?", "completion": "4", "label": label}
    for record in ({"messages": [ASK, REPLY], "label": label}, pair):
        parser = ChatParser()
        assert len(parser.parse(json.dumps(record).encode()).messages) == 2
        assert {*parser.unused} == (set() if label is None or label is True else {"label"})
    rows = [pair | {"label": value} for value in (True, False)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    reading = read_conversations(tmp_path / "a.parquet")
    assert len(list(reading)) == 1 and reading.dropped == {"an answer that is marked as bad": 1}
    columns = {"user": "prompt", "assistant": "completion"}
    assert len(list(read_conversations(tmp_path / "a.parquet", columns=columns))) == 2


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, REPLY]},
        {"messages": [ASK], "answer": A},
        {"messages": [ASK, REPLY, ASK], "response": A},
        {"prompt": "2+2?", "response": A},
        {"question": "2+2?", "answer": A},
        {"instruction": "2+2?", "output": A},
        {"input": "2+2?", "output": A},
        {"user": "2+2?", "assistant": A},
    ],
)
def test_reasoning_beside_an_answer(tmp_path, record, key):
    for number in (1, 1000):
        parser = ChatParser()
        found = parser.parse(json.dumps({**record, key: "Hm."}).encode(), number)
        assert [m.reasoning for m in found.messages if m.role != "user"][-1] == "Hm."
        assert not parser.unused
    pq.write_table(pa.Table.from_pylist([record | {key: "Hm."}, record]), tmp_path / "a.parquet")
    rows = [*read_conversations(tmp_path / "a.parquet")]
    assert [row.messages[-1].reasoning for row in rows] == ["Hm.", ""]
    assert rows[0].id == rows[1].id  # as of earlier runs, which read none


@pytest.mark.parametrize(
    ("record", "thought"),
    [
        ({"messages": [ASK, REPLY, ASK, REPLY]}, "Hm."),
        ({"prompt": [ASK, REPLY, ASK], "completion": A}, "Hm."),
        ({"messages": [ASK, REPLY | {"reasoning": "Own."}]}, "Hm."),
        ({"messages": [ASK, REPLY | {"content": f"<think>So.</think>{A}"}]}, "Hm."),
        ({"messages": [ASK, REPLY]}, "on"),
        ({"messages": [ASK, REPLY]}, "off"),
        ({"input": "2+2?", "output": A}, "High"),
        ({"messages": [ASK, REPLY]}, True),
        ({"messages": [ASK, REPLY]}, ["Hm."]),
    ],
)
def test_reasoning_of_no_one_answer_is_counted(record, thought):
    for number in (1, 1000):
        parser = ChatParser()
        found = parser.parse(json.dumps({**record, "reasoning": thought}).encode(), number)
        assert {m.reasoning for m in found.messages} <= {"", "Own."}
        assert parser.unused == ({"reasoning": 1} if number == 1 else {})


@pytest.mark.parametrize(
    ("key", "is_of_id"), [("choices", False), ("label", True), ("thinking", True)]
)
def test_ids_of_rows_stay_those_of_earlier_runs(key, is_of_id):
    parser = ChatParser(columns={"user": "q", "assistant": key})
    first, second = (parser.parse({"q": "2+2?", key: answer}).id for answer in (A, "Four."))
    assert (first != second) == is_of_id


def test_reasoning_that_columns_name(tmp_path):
    record = {"q": "2+2?", "content": A, "thoughts": "Hm."}
    columns = {"user": "q", "assistant": "content", "reasoning": "thoughts"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        reading = read_conversations(tmp_path / name, columns=columns)
        [found] = reading
        assert found.messages[-1] == Message("assistant", A, "Hm.") and not reading.unused


def test_what_is_not_used_of_a_request():
    parser = ChatParser()
    body = {"messages": [ASK | {"mood": 1}, REPLY], "model": "m", "system": "s", "tools": [TOOL]}
    parser.parse(json.dumps({"custom_id": "r", "method": "POST", "body": body}).encode())
    assert parser.unused == {"method": 1, "body.model": 1, "body.messages[].mood": 1}


def test_rows_of_a_table(tmp_path):
    """Nulls that stand for what a row does not have are no arguments; a picture is seen unread."""
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("a", "b")]
    turns = [[ASK, {"role": "assistant", "tool_calls": [call]}] for call in calls]
    pictures = [None, [], [{"bytes": b"x" * 100, "path": "a.png"}]]
    rows = [{"messages": turn, "topic": "t"} for turn in (*turns, turns[0])]
    rows = [row | {"images": picture} for row, picture in zip(rows, pictures, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    reading = read_conversations(tmp_path / "a.parquet")
    found = [json.loads(chat.messages[1].fields)["tool_calls"] for chat in reading]
    assert [call["function"]["arguments"] for [call] in found] == [{"a": 1}, {"b": 1}]
    assert reading.dropped == {"a picture, a sound or a video": 1}
    assert reading.unused == {"topic": 2} and reading.num_looked_at == 2
