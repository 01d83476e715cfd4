"""Chats as data sets have them: one record of each form, by the name of a set that looks so."""

import csv
import io
import json
import random
import re
from collections import Counter

import pytest
from chat_files import parquet, write

from medusa_exp.config import DatasetConfig
from medusa_exp.config.limits import words_of
from medusa_exp.data import DataError, read_conversations
from medusa_exp.data.forms import FORMS
from medusa_exp.data.parsing import ChatParser
from medusa_exp.data.records import Ambiguous
from medusa_exp.data.remedies import columns_for

Q, A = "What is 2+2?", "It is 4."
ASK, REPLY = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
PAIR = [("user", Q), ("assistant", A)]
BRIEF = [("system", "Be brief."), *PAIR]
AGAIN = [*PAIR, ("user", "And 3+3?"), ("assistant", "6.")]
MORE = [{"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6."}]


def node(parent, role, *parts, **message):
    content = {"content_type": "text", "parts": list(parts)}
    return {
        "message": {"author": {"role": role}, "content": content, "recipient": "all", **message},
        "parent": parent,
    }


EXPORT = {
    "title": "Sums",
    "current_node": "short",
    "mapping": {
        "root": {"message": None, "parent": None},
        "hidden": node(
            "root", "system", "x", metadata={"is_visually_hidden_from_conversation": True}
        ),
        "short": node("hidden", "user", "Something else"),
        "ask": node("hidden", "user", Q),
        "thought": node("ask", "assistant", content={"content_type": "thoughts", "thoughts": []}),
        "reply": node("thought", "assistant", A),
        "loop": node("loop", "user", "never reached"),
    },
}


def reply(text, role="assistant", rank=None, replies=(), **more):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}


TREE = {
    "message_tree_id": "t-1",
    "prompt": reply(
        Q,
        "prompter",
        replies=[
            reply("No.", rank=1, replies=[reply("Why?", "prompter")]),
            reply(A, rank=0),
            reply("Gone.", rank=-1, deleted=True),
        ],
    ),
}
UNRANKED = {
    "prompt": reply(
        Q, "prompter", replies=[reply("No."), reply(A, replies=[reply("", "prompter")])]
    )
}


def child(number, role, text, *children, parent=None):
    return {"id": number, "role": role, "content": text, "parent": parent, "children": children}


BRANCHES = [
    child("1", "system", "", "2"),
    child("2", "user", Q, "3", "4", parent="1"),
    child("3", "assistant", A, "5", parent="2"),
    child("4", "assistant", "No.", "6", parent="2"),
    child("5", "user", "And 3+3?", "7", parent="3"),
    child("6", "user", "Why?", parent="4"),
    child("7", "assistant", "6.", parent="5"),
]
PAGE = {
    "mapping": {
        "root": {"parent": None, "message": None},
        "1": {"parent": "root", "message": {"fragments": [{"type": "REQUEST", "content": Q}]}},
        "2": {"parent": "1", "message": {"fragments": [{"type": "RESPONSE", "content": A}]}},
    }
}
HH = f"\n\nHuman: {Q}\n\nAssistant: {A}"

READ = {
    # name: (record, form, turns)
    "sharegpt": ({"conversations": [{"from": "human", "value": Q}, REPLY]}, "messages", PAIR),
    "openai fine-tuning": ({"messages": [ASK, REPLY]}, "messages", PAIR),
    "messages as a text": ({"messages": json.dumps([ASK, REPLY])}, "messages", PAIR),
    "lima": ({"conversations": [Q, A], "source": "x"}, "messages", PAIR),
    "alpaca": (
        {"instruction": Q, "input": "", "output": A, "text": "Below is"},
        "instruction",
        PAIR,
    ),
    "alpaca with input": (
        {"instruction": "Add.", "input": "2, 2", "output": A},
        "instruction",
        [("user", "Add.\n\n2, 2"), ("assistant", A)],
    ),
    "alpaca with history": (
        {"instruction": "And 3+3?", "input": "", "output": "6.", "history": [[Q, A]]},
        "instruction",
        AGAIN,
    ),
    "dolly": (
        {"instruction": Q, "context": "Sums", "response": A, "category": "qa"},
        "instruction",
        [("user", f"{Q}\n\nSums"), ("assistant", A)],
    ),
    "orca": (
        {"id": "1", "system_prompt": "Be brief.", "question": Q, "response": A},
        "question",
        BRIEF,
    ),
    "gsm8k": ({"question": Q, "answer": A}, "question", PAIR),
    "metamath": ({"query": Q, "response": A, "original_question": "?"}, "question", PAIR),
    "input and output": ({"input": Q, "output": A}, "input", PAIR),
    "nemotron": ({"input": [ASK], "output": A, "system_prompt": "Be brief."}, "input", BRIEF),
    "prompt and completion": ({"prompt": Q, "completion": A}, "prompt", PAIR),
    "prompt and completion of messages": ({"prompt": [ASK], "completion": [REPLY]}, "prompt", PAIR),
    "user and assistant": ({"user": Q, "assistant": A, "system": "Be brief."}, "user", BRIEF),
    "hh-rlhf": ({"chosen": HH, "rejected": "\n\nHuman: x"}, "chosen", PAIR),
    "full-hh-rlhf": (
        {"prompt": HH.removesuffix(f" {A}"), "response": f" {A}", "chosen": f" {A}"},
        "prompt",
        PAIR,
    ),
    "belle": (
        {"instruction": f"Human:{Q}\nAssistant:", "input": "", "output": A},
        "instruction",
        PAIR,
    ),
    "belle, several turns": (
        {"instruction": f"Human:{Q}\nAssistant:{A}\nHuman:And 3+3?\nAssistant:", "output": "6."},
        "instruction",
        AGAIN,
    ),
    "claude prompt": (
        {
            "prompt": f"Be brief.{HH}\n\nHuman: And 3+3?\n\nAssistant:",
            "completion": " 6.",
        },
        "prompt",
        [BRIEF[0], *AGAIN],
    ),
    "prompt of paragraphs and lines": (
        {
            "prompt": f"Human: {Q}\nAssistant: {A}\n\nHuman: And 3+3?\n\nAssistant:",
            "response": "6.",
        },
        "prompt",
        AGAIN,
    ),
    "hh-rlhf of lines": (
        {"chosen": HH.strip().replace("\n\n", "\n"), "rejected": "x"},
        "chosen",
        PAIR,
    ),
    "text of lines": ({"text": f"Human: {Q}\nAssistant: {A}"}, "text", PAIR),
    "hh-rlhf, two questions": (
        {"chosen": f"\n\nHuman: Hi.{HH}", "rejected": "x"},
        "chosen",
        [("user", "Hi."), *PAIR],
    ),
    "ultrafeedback": (
        {"prompt": Q, "chosen": [ASK, REPLY], "rejected": [ASK], "messages": [ASK, REPLY]},
        "messages",
        PAIR,
    ),
    "preference messages": ({"prompt": Q, "chosen": [ASK, REPLY], "score": 1.0}, "chosen", PAIR),
    "preference with a prompt of messages": (
        {"prompt": [{"role": "system", "content": "Be brief."}, ASK], "chosen": [REPLY]},
        "chosen",
        BRIEF,
    ),
    "orca dpo": (
        {"system": "Be brief.", "question": Q, "chosen": A, "rejected": "5"},
        "chosen",
        BRIEF,
    ),
    "preference after messages": (
        {"conversations": [ASK], "chosen": {"from": "gpt", "value": A}, "rejected": "5"},
        "chosen",
        PAIR,
    ),
    "gemini": (
        {
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "What is "}, {"text": "2+2?"}]},
                {"role": "model", "parts": [{"text": A}]},
            ],
        },
        "contents",
        BRIEF,
    ),
    "openai batch": (
        {"custom_id": "r-1", "method": "POST", "body": {"model": "m", "messages": [ASK, REPLY]}},
        "body",
        PAIR,
    ),
    "anthropic batch": (
        {"custom_id": "r-1", "params": {"system": "Be brief.", "messages": [ASK, REPLY]}},
        "body",
        BRIEF,
    ),
    "lmsys-chat-1m": (
        {"conversation_id": "c-1", "model": "m", "conversation": [ASK, REPLY], "turn": 1},
        "conversation",
        PAIR,
    ),
    "moss": ({"conversation": [{"human": Q, "assistant": A}]}, "conversation", PAIR),
    "claude export": (
        {
            "uuid": "u-1",
            "chat_messages": [
                {"sender": "human", "text": Q, "content": [{"type": "text", "text": Q}]},
                {"sender": "assistant", "text": A, "content": []},
            ],
        },
        "conversation",
        PAIR,
    ),
    "arena": (
        {"winner": "model_b", "conversation_a": [ASK, ASK], "conversation_b": [ASK, REPLY]},
        "winner",
        PAIR,
    ),
    "arena tie": (
        {"winner": "tie", "conversation_a": [ASK, REPLY], "conversation_b": [ASK]},
        "winner",
        PAIR,
    ),
    "chatgpt export": (EXPORT, "mapping", PAIR),
    "oasst tree": (TREE, "replies", PAIR),
    "oasst tree without ranks": (UNRANKED, "replies", [*PAIR, ("user", "")]),
    "ultrachat": ({"id": "0", "data": [Q, A, "And 3+3?", "6."]}, "data", AGAIN),
    "guanaco": ({"text": f"### Human: {Q}### Assistant: {A}"}, "text", PAIR),
    "turns as texts": ({"messages": [json.dumps(ASK), json.dumps(REPLY)]}, "messages", PAIR),
    "turns as columns": (
        {"conversations": {"from": ["human", "gpt"], "value": [Q, A]}},
        "messages",
        PAIR,
    ),
    "capybara": (
        {
            "conversation": [
                {"output": A, "input": Q},
                {"input": "And 3+3?", "output": "6."},
            ]
        },
        "conversation",
        AGAIN,
    ),
    "langchain": (
        {"messages": [{"type": "human", "content": Q}, {"type": "ai", "content": A}]},
        "messages",
        PAIR,
    ),
    "langchain data": (
        {
            "messages": [
                {"type": "system", "data": {"content": "Be brief.", "type": "system"}},
                {"type": "human", "data": {"content": Q}},
                {"type": "ai", "data": {"content": A}},
            ]
        },
        "messages",
        BRIEF,
    ),
    "bedrock": (
        {
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "What is "}, {"text": "2+2?"}]},
                {"role": "assistant", "content": [{"text": A}]},
            ],
        },
        "messages",
        BRIEF,
    ),
    "messages and response": ({"messages": [ASK], "response": A}, "messages", PAIR),
    "messages and completion": ({"messages": [ASK], "completion": REPLY}, "messages", PAIR),
    "messages and choices": (
        {"messages": [ASK, REPLY, MORE[0]], "choices": [{"index": 0, "message": MORE[1]}]},
        "messages",
        AGAIN,
    ),
    "preference after messages, and a response": (
        {"messages": [ASK], "chosen": A, "rejected": "5", "response": "6"},
        "chosen",
        PAIR,
    ),
    "messages and words": ({"messages": [ASK, REPLY], "internal": ["x", "y"]}, "messages", PAIR),
    "responses": (
        {
            "input": [{"type": "message", "role": "user", "content": Q}],
            "output": [
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": A}],
                }
            ],
        },
        "input",
        PAIR,
    ),
    "langchain pair": (
        {"prompt": [{"type": "human", "content": Q}], "completion": A},
        "prompt",
        PAIR,
    ),
    "messages and an answer that is said": (
        {"messages": [ASK, REPLY], "answer": "4"},
        "messages",
        PAIR,
    ),
    "messages and a question": ({"messages": [ASK], "prompt": Q, "response": A}, "prompt", PAIR),
    "branches": ({"messages": BRANCHES}, "messages", AGAIN),
    "branches without parents": (
        {"messages": [{k: v for k, v in m.items() if k != "parent"} for m in BRANCHES]},
        "messages",
        AGAIN,
    ),
    "text-generation-webui": (
        {
            "internal": [["<|BEGIN-VISIBLE-CHAT|>", "Hi!"], [Q, A]],
            "visible": [["", "Hi!"], [Q, A]],
        },
        "conversation",
        [("assistant", "Hi!"), *PAIR],
    ),
    "deepseek export": (PAGE, "mapping", PAIR),
    "a number as an answer": (
        {"question": Q, "answer": 4},
        "question",
        [PAIR[0], ("assistant", "4")],
    ),
    "list of messages": ([ASK, REPLY, *MORE], "list", AGAIN),
}
"""What is read."""


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def parse(record):
    return ChatParser().parse(json.dumps(record).encode())


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path, **options):
    reading = read_conversations(path, **options)
    return [turns(conversation) for conversation in reading], dict(reading.forms)


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


REFUSED = {
    # name: (record, what the message has)
    "squad": (
        {"id": "1", "context": "c", "question": Q, "answers": {"text": [A], "answer_start": [0]}},
        "keys are id, context, question, answers.*dataset.columns",
    ),
    "oasst1 rows": (
        {"message_id": "1", "parent_id": None, "text": Q, "role": "prompter"},
        "keys are message_id, parent_id, text, role. Each .* one message of a tree: .*trees.jsonl",
    ),
    "texts as rows": (
        {"id": "1", "role": "user", "text": Q},
        "one message: gather those of a chat",
    ),
    "messages as rows": (
        {"conversation_id": "1", "role": "user", "content": Q},
        "one message: gather those of a chat",
    ),
    "plain text": ({"text": "Once upon a time"}, "keys are text.*dataset.columns"),
    "camel": ({"message_1": Q, "message_2": A}, "keys are message_1, message_2.*dataset.form"),
    "two forms": (
        {"prompt": Q, "completion": A, "messages": [ASK, *MORE]},
        "record 1 .line 1. can be read by the forms messages and prompt.*dataset.form",
    ),
    "preference without a prompt": (
        {"chosen": A, "rejected": "5"},
        "keys are chosen, rejected.*dataset.columns",
    ),
    "two replies": (
        {"prompt": Q, "completion": A, "response": "5"},
        "by the keys completion and response.*dataset.columns",
    ),
    "two chats": (
        {"messages": [ASK, REPLY], "conversations": [ASK, {"from": "gpt", "value": "5"}]},
        "record 1 .line 1. can be read by the keys conversations and messages",
    ),
    "a header": (
        ["id", "prompt", "completion"],
        "record 1 .line 1. is a row of names .id, prompt, completion.*orient='records'",
    ),
    "rows": (["x", Q, A], "a list of fields without their names: it is.*orient='records'"),
    "rows with numbers": ([1, Q, A], "a list of fields without their names: it is"),
    "two dialogs": (
        {"conversation": [ASK, REPLY], "dialog": MORE},
        "by the keys conversation and dialog",
    ),
    "other roles": (
        {"messages": [{"role": "narrator", "content": Q}, REPLY]},
        "the role is 'narrator'.*dataset.role_map",
    ),
    "other turns": (
        {"messages": [{"who": "user", "what": Q}]},
        "its keys are who, what.*dataset.columns",
    ),
}
"""What is refused, by a message that names the keys that are there, and the remedy."""


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
        ({"form": "sharegpt"}, "dataset.form=sharegpt: use auto or one of messages"),
        ({"columns": {"bot": "x"}}, "dataset.columns: bot: use user, assistant"),
        ({"columns": {"user": "x"}}, "dataset.columns needs the key of the assistant's"),
        ({"columns": {"assistant": "x"}, "form": "list"}, "both set"),
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


def test_what_stands_beside_texts_in_other_words(tmp_path):
    same = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
    records = [
        {"conversation": [{"user": Q, "assistant": A, "reasoning": "Hm."}]},
        {"messages": [{"role": "system", "content": "Be brief."}, ASK, REPLY], "conversations": []},
        {"messages": [ASK, REPLY], "conversations": same, "system": {"content": "Be brief."}},
        {"messages": [ASK | {"from": "human", "value": Q}, REPLY]},
    ]
    found = list(read_conversations(write(tmp_path / "a", lines(records))))
    assert [turns(chat) for chat in found] == [PAIR, BRIEF, BRIEF, PAIR]
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
        assert turns(parse({keys[1]: lists[1]}))


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


@pytest.mark.parametrize("said", [4, True, {"parts": [A]}])
def test_what_is_no_text_is_named_with_its_key(said):
    for key in ("content", "value"):
        parser = ChatParser()
        record = {"messages": [ASK, {"role": "assistant", key: said}]}
        assert parser.parse(json.dumps(record).encode()) == "content is not text"
        assert parser.detail == f"{key} is {said!r} in a turn of role assistant: write it as text"


def test_a_number_beside_messages_is_no_other_answer():
    assert turns(parse({"messages": [ASK, REPLY], "prompt": Q, "answer": 5})) == PAIR


def test_pieces_of_a_message_in_telegram():
    said = ["It is ", {"type": "bold", "text": "4"}, {"type": "link", "text": "."}]
    assert turns(parse({"messages": [ASK, {"from": "gpt", "text": said}]})) == PAIR


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


def test_no_record_is_a_traceback():
    draw = random.Random(0)
    outcomes = Counter()
    parsers = [ChatParser(), *(ChatParser(form=form) for form in FORMS)]
    parsers.append(ChatParser(columns={"user": "prompt.text.0", "assistant": "chosen.1.content"}))
    for record, *_ in READ.values():
        for _ in range(120):
            changed = mutated(record, draw)
            for parser in (parsers[0], draw.choice(parsers)):
                try:
                    found = parser.parse(json.dumps(changed).encode(), 1)
                except Ambiguous:
                    found = "ambiguous"
                outcomes[found if isinstance(found, str) else "read"] += 1
            columns_for(json.dumps(changed).encode(), {})
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
    "record",
    [
        {"message_1": Q, "message_2": A},
        {"turns": [{"ask": Q, "answer": A}, {"ask": "And 3+3?", "answer": "6."}]},
        {"prompt": Q, "answers": [{"answer": "5", "rank": 2}, {"answer": A, "rank": 1}]},
        {"a\ud800": {"b c": [ASK, REPLY]}},
        {"messages": [ASK]},
    ],
)
def test_where_none_would_be_right_no_columns_are_named(record):
    assert columns_for(json.dumps(record).encode(), {}) == ""


@pytest.mark.parametrize("name", ["two replies", "two chats", "two dialogs"])
def test_a_choice_that_is_offered_works(tmp_path, name):
    path = write(tmp_path / "a.jsonl", lines([REFUSED[name][0] | {"system": "Be brief."}] * 2))
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert "dataset.form" not in str(caught.value)
    offered = re.findall(r"'dataset\.columns=\{(.+?)\}'", str(caught.value))
    found = [read(path, columns=dict(re.findall(r"(\w+): ([\w.]+)", o)))[0] for o in offered]
    assert len(found) == 2 and BRIEF in (found[0][0], found[1][0]) and found[0] != found[1]
    assert all(chat[0] == BRIEF[0] for chat, _ in found)


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


def test_branches_wherever_they_stand(tmp_path):
    shown = {"conv": {"currNode": "6"}, "messages": BRANCHES}
    other = [PAIR[0], ("assistant", "No."), ("user", "Why?")]
    assert turns(parse(shown)) == other
    assert turns(parse({"currNode": "6", "messages": BRANCHES})) == other
    assert turns(parse({"currNode": "9", "messages": BRANCHES})) == AGAIN
    plain = {"messages": [ASK | {"children": []}, REPLY]}
    found, _ = read(write(tmp_path / "a", lines([plain] * 120 + [{"messages": BRANCHES}])))
    assert found == [PAIR] * 120 + [AGAIN]


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
        {"messages": BRANCHES},
        {"conversation": [{"input": Q, "output": A}]},
    ],
)
def test_what_is_read_is_not_counted_as_unused(record):
    parser = ChatParser()
    assert turns(parser.parse(json.dumps(record).encode()))[:2] == PAIR and not parser.unused


def test_what_is_passed_over_in_a_turn_is_counted():
    parser = ChatParser()
    told = [ASK | {"input": "x", "channel": "web"}, REPLY | {"output": "x", "children": ["9"]}]
    parser.parse(json.dumps({"messages": told}).encode())
    assert {*parser.unused} == {
        f"messages[].{k}" for k in ("input", "channel", "output", "children")
    }
