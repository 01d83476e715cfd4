"""Chats as data sets have them: one record of each form, by the name of a set that looks so."""

import csv
import io
import json
import random
import shutil
import subprocess
import time
from collections import Counter
from contextlib import suppress

import pytest
from chat_files import parquet, write
from chat_forms import (
    AGAIN,
    ASK,
    BRANCHES,
    BRIEF,
    EXPORT,
    MORE,
    PAIR,
    READ,
    REFUSED,
    REPLY,
    TREE,
    A,
    Q,
    child,
    lines,
    node,
    parse,
    read,
    reply,
    turns,
)

from medusa_exp.config import DatasetConfig
from medusa_exp.config.limits import words_of
from medusa_exp.data import DataError, read_conversations
from medusa_exp.data.forms import FORMS
from medusa_exp.data.parsing import ChatParser
from medusa_exp.data.records import Ambiguous
from medusa_exp.data.remedies import columns_for


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path, name):
    record, form, expected = READ[name]
    for data in (lines([record] * 3), json.dumps([record] * 3)):
        path = write(tmp_path / "a.json", data)
        for chosen in ("auto", form):
            assert read(path, form=chosen) == ([expected] * 3, {form: 3})
    if isinstance(record, dict) and form not in ("mapping", "replies"):
        assert read(write(tmp_path / "a", parquet([record] * 3))) == ([expected] * 3, {form: 3})


def table(record, delimiter):
    text = io.StringIO()
    rows = csv.DictWriter(text, list(record), delimiter=delimiter)
    rows.writeheader()
    rows.writerows(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()} for _ in range(3)
    )
    return text.getvalue()


@pytest.mark.parametrize(
    "name", [n for n, (record, *_) in READ.items() if isinstance(record, dict)]
)
def test_tables_of_text(tmp_path, name):
    record, form, expected = READ[name]
    for suffix, delimiter in (("csv", ","), ("csv", ";"), ("tsv", "\t")):
        path = write(tmp_path / f"a.{suffix}", "\ufeff" + table(record, delimiter))
        assert read(path) == ([expected] * 3, {form: 3})


def test_a_row_that_is_too_short_has_nulls(tmp_path):
    path = write(tmp_path / "a.csv", f"question,answer\n{Q}\n{Q},{A}\n{Q}\n")
    reading = read_conversations(path)
    assert [turns(conversation) for conversation in reading] == [PAIR]
    assert reading.dropped == {"content is null": 2}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    record, words = REFUSED[name]
    path = write(tmp_path / "a.jsonl", lines([record] * 3))
    with pytest.raises(DataError, match=words) as caught:
        list(read_conversations(path))
    assert str(path) in str(caught.value)


def test_a_form_that_is_named_is_not_looked_for(tmp_path):
    record, _ = REFUSED["two forms"]
    path = write(tmp_path / "a.jsonl", lines([record] * 2))
    assert read(path, form="prompt") == ([PAIR] * 2, {"prompt": 2})
    assert read(path, form="messages")[1] == {"messages": 2}
    with pytest.raises(DataError, match="keys are prompt, completion, messages"):
        read(path, form="contents")


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        (REFUSED["camel"][0], {"user": "message_1", "assistant": "message_2"}, PAIR),
        (REFUSED["squad"][0], {"user": "question", "assistant": "answers.text.0"}, PAIR),
        (REFUSED["two replies"][0], {"user": "prompt", "assistant": "completion"}, PAIR),
        (
            {"a.b": Q, "c": {"d": A, "e": "Be brief."}},
            {"user": "a.b", "assistant": "c.d", "system": "c.e"},
            BRIEF,
        ),
        ({"talk": {"list": [ASK, REPLY]}}, {"messages": "talk.list"}, PAIR),
        ({"story": A}, {"assistant": "story"}, PAIR[1:]),
    ],
)
def test_columns(tmp_path, record, columns, expected):
    path = write(tmp_path / "a.jsonl", lines([record] * 2))
    assert read(path, columns=columns) == ([expected] * 2, {"columns": 2})
    path = write(tmp_path / "a.parquet", parquet([record] * 2))
    assert read(path, columns=columns) == ([expected] * 2, {"columns": 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "nope"}, "dataset.form=nope: use auto, messages, conversation"),
        ({"role_map": {"x": "robot"}}, "role_map: x=robot: .*system, user, assistant, tool"),
        ({"columns": {"bot": "x"}}, "dataset.columns: bot: use user, assistant"),
        ({"columns": {"user": "x"}}, "dataset.columns needs the key of the assistant's"),
        ({"columns": {"assistant": "x"}, "form": "list"}, "both set"),
        ({"columns": {"messages": "x", "user": "y"}}, "messages holds .* leave out user"),
    ],
)
def test_bad_options(tmp_path, options, words):
    path = write(tmp_path / "a.jsonl", lines([READ["gsm8k"][0]]))
    with pytest.raises(DataError, match=words):
        read_conversations(path, **options)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([ASK, REPLY], [PAIR]),
        ([[ASK, REPLY], [ASK, REPLY, *MORE]], [PAIR, AGAIN]),
        ({"messages": [ASK, REPLY]}, [PAIR]),
        ({"conversations": [{"id": 1, "messages": [ASK, REPLY]}]}, [PAIR]),
        ({"version": 2, "data": [{"question": Q, "answer": A}]}, [PAIR]),
        (
            {"train": [{"prompt": Q, "completion": A}], "test": [{"messages": [ASK, REPLY]}]},
            [PAIR] * 2,
        ),
        ({"prompt": [Q, Q], "completion": [A, A]}, [PAIR] * 2),
        ({"messages": [[ASK, REPLY], [ASK, REPLY, *MORE]]}, [PAIR, AGAIN]),
        ({"instruction": [Q, Q], "input": ["", ""], "output": [A, A]}, [PAIR] * 2),
        (
            {"context": ["Sums"], "question": [Q], "answer": [A]},
            [[("user", f"{Q}\n\nSums"), PAIR[1]]],
        ),
        ({"prompt": [Q, Q], "completion": [A, A], "images": [[], []]}, [PAIR] * 2),
        ({"prompt": [[ASK], [ASK]], "completion": [[REPLY], [REPLY]]}, [PAIR] * 2),
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, ASK],
                "completion": [REPLY, REPLY],
            },
            [[*BRIEF, PAIR[1]]],
        ),
        ({"columns": ["completion", "id", "prompt"], "index": [0], "data": [[A, 1, Q]]}, [PAIR]),
        ({"columns": ["x", "question", "answer", "y"], "data": [["1", Q, A, "2"]] * 2}, [PAIR] * 2),
        (
            {
                "features": [{"name": "messages"}],
                "rows": [{"row_idx": 0, "row": {"messages": [ASK, REPLY]}, "truncated_cells": []}],
            },
            [PAIR],
        ),
        ({"internal": [[Q, A]], "visible": [[Q, A]]}, [PAIR]),
        ({"prompt": {"0": Q, "1": Q}, "completion": {"0": A, "1": A}}, [PAIR] * 2),
        ({"a": {"messages": [ASK, REPLY]}, "b": {"messages": [ASK, REPLY]}}, [PAIR] * 2),
        (EXPORT, [PAIR]),
        (TREE, [PAIR]),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_files_that_are_one_value(tmp_path, data, expected, indent):
    assert read(write(tmp_path / "a.json", json.dumps(data, indent=indent)))[0] == expected


TIMED = [turn | {"at": 1} for turn in (ASK, REPLY)]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"id": 1, "turns": TIMED}, {"messages": "turns"}),
        ({"turns": TIMED, "marks": [{"good": 1}, {"good": 2}]}, {"messages": "turns"}),
        (
            {"q": Q, "answers": [{"text": A, "at": 1}]},
            {"user": "q", "assistant": "answers.0.text"},
        ),
        (
            {"request": {"messages": [ASK]}, "response": {"choices": [{"message": REPLY}]}},
            {"user": "request.messages", "assistant": "response.choices.0.message.content"},
        ),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_columns_of_a_file_of_one_record(tmp_path, record, columns, indent):
    """Which is no object of records by them."""
    path = write(tmp_path / "a.json", json.dumps(record, indent=indent))
    assert read(path, columns=columns) == ([PAIR], {"columns": 1})
    several = {"train": [record, record], "test": [record]}
    path = write(tmp_path / "a.json", json.dumps(several, indent=indent))
    assert read(path, columns=columns) == ([PAIR] * 3, {"columns": 3})
    if "request" in record:
        with pytest.raises(DataError, match=r"'dataset.columns=.user: request.messages, assis"):
            read(write(tmp_path / "a.json", json.dumps(record, indent=indent)))


def test_columns_of_columns(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"q": [Q, Q], "a": [A, A]}))
    assert read(path, columns={"user": "q", "assistant": "a"})[0] == [PAIR] * 2


def test_lists_of_messages_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", lines([[ASK, REPLY], [ASK, REPLY, *MORE]]))
    assert read(path) == ([PAIR, AGAIN], {"list": 2})


def test_forms_may_differ_within_a_file(tmp_path):
    records = [
        READ[name][0] for name in ("gsm8k", "alpaca", "openai fine-tuning", "list of messages")
    ]
    reading = read_conversations(write(tmp_path / "a.jsonl", lines([*records, {"x": 1}])))
    assert len(list(reading)) == 4
    assert reading.forms == {"question": 1, "instruction": 1, "messages": 1, "list": 1}
    assert reading.dropped == {"no known form of chat": 1}
    assert reading.examples == {
        "no known form of chat": f"{tmp_path}/a.jsonl, record 5 (line 5): its keys are x"
    }


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"winner": "tie (bothbad)", "conversation_a": [ASK], "conversation_b": [ASK]},
            "marked as bad",
        ),
        ({"conversation_a": [ASK], "conversation_b": [ASK]}, "without a winner"),
        (
            {"conversation": [{"system": x, "human": Q, "gpt": A} for x in ("A", "B")]},
            "two system texts that differ",
        ),
        ({"messages": [ASK | {"children": [REPLY]}, REPLY]}, "messages that hold their children"),
        ({"question": Q, "answer": None}, "content is null"),
        ({"question": Q, "answer": True}, "content is not text"),
        ({"question": Q, "answer": " "}, "no assistant turn"),
        ({"messages": [ASK, REPLY | {"content": [A, "4"]}]}, "several answers to one question"),
        ({"messages": [ASK, {"role": "function_call", "content": "ls"}]}, "tool calls in an unk"),
        ({"question": Q, "answer": [A, "4"]}, "several answers to one question"),
        ({"question": Q, "context": ["A", "B"], "answer": A}, "a context that is not text"),
        ({"conversation": []}, "no turns"),
        ({"prompt": Q, "completion": A, "history": "Hi."}, "a history that is no list of turns"),
        ({"messages": [ASK, REPLY], "system": {"x": "y"}}, "a system text in an unknown form"),
        ({"conversation": [{"user": Q, "assistant": A, "weight": 0}]}, "that is to be trained"),
        ({"conversation": [{"user": Q, "assistant": A, "image": "x"}]}, "a picture"),
        (
            {"contents": [{"parts": [{"text": Q}, {"inlineData": {}}]}]},
            "content has a part that is not text",
        ),
        (
            {"mapping": {"a": node(None, "assistant", "ls", recipient="bash")}},
            "tool calls in an unknown form",
        ),
    ],
)
def test_reasons(tmp_path, record, reason):
    reading = read_conversations(write(tmp_path / "a.jsonl", lines([record, READ["gsm8k"][0]])))
    assert [turns(conversation) for conversation in reading] == [PAIR]
    assert len(reading.dropped) == 1 and reason in next(iter(reading.dropped))


def test_pieces_of_a_message_in_telegram():
    said = ["It is ", {"type": "bold", "text": "4"}, {"type": "link", "text": "."}]
    assert turns(parse({"messages": [ASK, {"from": "gpt", "text": said}]})) == PAIR


def telegram(*messages):
    named = [{"type": "message", "text_entities": [], "id": i} | m for i, m in enumerate(messages)]
    note = {"id": 9, "type": "service", "actor": "Ann", "action": "phone_call", "text": ""}
    return {"name": "Bob", "type": "personal_chat", "messages": [note, *named, note]}


TALK = [
    {"from": "Ann", "text": Q},
    {"from": "Bob", "text": ["It ", {"type": "bold", "text": "is"}, " 4."]},
]


ANN_AND_BOB = {"ann": "user", "bob": "assistant"}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_chat_that_telegram_exports(tmp_path, indent):
    path = write(tmp_path / "a.json", json.dumps(telegram(*TALK), indent=indent))
    reading = read_conversations(path, role_map=ANN_AND_BOB)
    assert [turns(chat) for chat in reading] == [PAIR]
    assert reading.unused["messages[].action"] == 1
    with pytest.raises(DataError, match=r"the role is 'Ann'.*dataset.role_map"):
        list(read_conversations(path))
    assert parse(telegram()) == "no turns"


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize("is_whole", [False, True])
def test_the_remedy_for_other_chats_of_telegram(tmp_path, is_whole):
    chat = telegram(*TALK, {"from": "Bob", "text": "", "photo": "a.jpg"})
    found = {"about": "", "chats": {"list": [chat]}} if is_whole else chat
    path = write(tmp_path / "FILE", json.dumps(found, indent=1))
    with pytest.raises(DataError, match=r"Telegram's export.*dataset.role_map") as error:
        list(read_conversations(path, role_map=ANN_AND_BOB))
    subprocess.run(str(error.value).split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert read(tmp_path / "chats.jsonl", role_map=ANN_AND_BOB)[0] == [PAIR]


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
def test_the_remedy_for_events_of_rasa(tmp_path):
    events = [{"event": "action"}, {"event": "user", "text": Q}, {"event": "bot", "text": A}]
    path = write(tmp_path / "FILE", lines([{"sender_id": "1", "events": events}] * 2))
    with pytest.raises(DataError, match="has tracked") as error:
        list(read_conversations(path))
    subprocess.run(str(error.value).split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert read(tmp_path / "chats.jsonl")[0] == [PAIR] * 2


@pytest.mark.parametrize(
    "text",
    [
        "Human: a species?",
        "### Human: rights?",
        "Human: what does it\nAssistant: mean in a log?",
        "Human: one\nHuman: two\nAssistant:",
        "A story.\nHuman: Hi.\nAssistant:",
        "Once.\n\nHuman: Hi.\n\nHuman: And\n\nAssistant:",
    ],
)
def test_what_is_no_whole_transcript_is_not_cut(text):
    assert turns(parse({"prompt": text, "completion": text})) == [
        ("user", text),
        ("assistant", text),
    ]


def test_a_prompt_of_the_human_s_turn_alone():
    said = parse({"prompt": f"\n\nHuman: {Q}", "completion": f" {A}"})
    assert turns(said) == PAIR


def test_an_answer_that_holds_lines_of_a_transcript_is_not_cut():
    told = "Human: Hi.\nAssistant: Hello."
    asked = {"prompt": "Write a dialogue."}
    for record in (asked | {"completion": told}, asked | {"chosen": told, "rejected": "x"}):
        assert turns(parse(record))[1] == ("assistant", told)


def test_ids_and_origins(tmp_path):
    records = [READ[name][0] for name in ("oasst tree", "lmsys-chat-1m", "gsm8k")]
    path = write(tmp_path / "a.jsonl", lines(records))
    first, second, third = read_conversations(path)
    assert (first.id, second.id) == ("t-1", "c-1") and third.id.startswith("sha256-")
    assert third.described() == f"conversation {third.id} ({path}, record 3)"


def test_the_config_knows_all_forms():
    assert words_of(DatasetConfig, "form") == ("auto", *FORMS)


JUNK = (None, True, 7, 1.5, "", "x", "[", '{"a": [1]}', [], {}, [[]], ["x"], [None], {"x": None})


def mutated(value, draw):
    """Return a value some part of which is something else."""
    if draw.random() < 0.15 or not isinstance(value, list | dict) or not value:
        return draw.choice(JUNK)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(copy)) if isinstance(copy, dict) else draw.randrange(len(copy))
    if isinstance(copy, dict) and draw.random() < 0.1:
        copy[draw.choice(["prompt", "messages", "parts", "role", "winner"])] = copy.pop(key)
    else:
        copy[key] = mutated(copy[key], draw)
    return copy


def test_no_record_is_a_traceback(tmp_path):
    """Neither one by itself, nor those of a file behind a line that is too long to be kept."""
    draw = random.Random(0)
    outcomes = Counter()
    too_long = json.dumps({"messages": [ASK, REPLY | {"content": "x" * 20_000}]})
    path = tmp_path / "a.jsonl"
    parsers = [ChatParser(), *(ChatParser(form=form) for form in FORMS)]
    parsers.append(ChatParser(columns={"user": "prompt.text.0", "assistant": "chosen.1.content"}))
    for record, *_ in READ.values():
        for number in range(120):
            changed = mutated(record, draw)
            for parser in (parsers[0], draw.choice(parsers)):
                try:
                    found = parser.parse(json.dumps(changed).encode(), 1)
                except Ambiguous:
                    found = "ambiguous"
                outcomes[found if isinstance(found, str) else "read"] += 1
            columns_for(json.dumps(changed).encode(), {})
            if number % 10 == 0:
                path.write_text("\n".join([too_long, *[json.dumps(changed)] * 2]))
                with suppress(DataError):
                    list(read_conversations(path, max_record_bytes=20_000))
    assert outcomes["read"] > 1000 and len(outcomes) >= 10


def test_deep_trees_and_circles(tmp_path):
    circle = [child("1", "user", Q, "2"), child("2", "assistant", A, "1", "2")]
    assert turns(parse({"messages": circle})) == PAIR
    nodes = {
        str(i): node(str(i - 1) if i else None, ("user", "assistant")[i % 2], "x")
        for i in range(3000)
    }
    tree = reply(A, replies=[])
    for i in range(150):
        tree = reply("x", ("assistant", "prompter")[i % 2], replies=[tree])
    records = [{"mapping": nodes}, {"prompt": tree}]
    first, second = read(write(tmp_path / "a.jsonl", lines(records)))[0]
    assert len(first) == 3000 and len(second) == 151


def test_many_system_messages_before_a_tree():
    before = [child(f"s{i}", "system", "Be brief." * (i % 2)) for i in range(2000)]
    found = turns(parse({"messages": [*before, *BRANCHES[1:]]}))
    assert found == [BRIEF[0]] * 1000 + AGAIN


def test_blank_lines_are_looked_at_once():
    blank = " \n" * 100_000
    start = time.monotonic()
    for before in ("x", "Human: x", "### Human: x"):
        assert parse({"text": before + blank + "y"}) == "no known form of chat"
    whole = turns(parse({"text": f"Human: x{blank}Assistant: {A}"}))
    assert whole == [("user", "x"), PAIR[1]]
    assert time.monotonic() - start < 10  # minutes, if each of its places were tried


def test_branches_wherever_they_stand(tmp_path):
    shown = {"conv": {"currNode": "6"}, "messages": BRANCHES}
    other = [PAIR[0], ("assistant", "No."), ("user", "Why?")]
    assert turns(parse(shown)) == other
    assert turns(parse({"currNode": "6", "messages": BRANCHES})) == other
    assert turns(parse({"currNode": "9", "messages": BRANCHES})) == AGAIN
    for record in (shown, {"currNode": "6", "messages": BRANCHES}):
        assert read(write(tmp_path / "a", parquet([record])))[0] == [other]
    plain = {"messages": [ASK | {"children": []}, REPLY]}
    found, _ = read(write(tmp_path / "a", lines([plain] * 120 + [{"messages": BRANCHES}])))
    assert found == [PAIR] * 120 + [AGAIN]


def test_what_is_no_child_is_not_read_as_one():
    assert turns(parse({"messages": [ASK | {"children": [{"tag": "p"}]}, REPLY]})) == PAIR


def test_a_transcript_may_speak_of_the_marks_of_helpsteer():
    asked = "What does <extra_id_1> mean?"
    found = parse({"prompt": f"\n\nHuman: {asked}\n\nAssistant:", "response": A})
    assert turns(found) == [("user", asked), ("assistant", A)]


@pytest.mark.parametrize(
    "prompt",
    [
        "What does <extra_id_1> mean?",
        f"{Q}\n<extra_id_1>User\nAnd 3+3?",
        f"{Q}\n<extra_id_1>Assistant\n{A}\n<extra_id_2>quality:4\n<extra_id_1>User\nHm",
        f"{Q}\n<extra_id_1>Assistant\n{A}",
    ],
)
def test_marks_of_helpsteer_that_are_no_whole_transcript_stay(prompt):
    found = parse({"prompt": prompt, "response": "6."})
    assert turns(found) == [("user", prompt), ("assistant", "6.")]
