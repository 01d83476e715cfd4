"""Records of each form, by the name of a data set that looks so, and how tests read them."""

import json

from medusa_exp.data import read_conversations
from medusa_exp.data.parsing import ChatParser

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
    "messages that hold their children": (
        {
            "messages": [
                child(
                    "1",
                    "user",
                    Q,
                    child("2", "assistant", "No."),
                    child(
                        "3",
                        "assistant",
                        A,
                        child("4", "user", "And 3+3?", child("5", "assistant", "6.")),
                    ),
                ),
            ]
        },
        "messages",
        AGAIN,
    ),
    "messages, the last of which holds its children": (
        {
            "messages": [
                ASK | {"id": "1"},
                REPLY | {"id": "2", "children": [{**MORE[0], "children": MORE[1:]}]},
            ]
        },
        "messages",
        AGAIN,
    ),
    "chats that begin in several messages": (
        {
            "messages": [
                child("1", "user", "Hi", child("2", "assistant", "No.")),
                ASK | {"children": [REPLY | {"children": [{**MORE[0], "children": MORE[1:]}]}]},
            ]
        },
        "messages",
        AGAIN,
    ),
    "helpsteer": (
        {
            "prompt": f"{Q}\n<extra_id_1>Assistant\n{A}\n<extra_id_1>User\nAnd 3+3?",
            "response": "6.",
            "helpfulness": 3,
        },
        "prompt",
        AGAIN,
    ),
    "steerlm": (
        {
            "prompt": f"<extra_id_1>User\n{Q}\n<extra_id_1>Assistant\n{A}\n<extra_id_1>User\n"
            "And 3+3?\n<extra_id_1>Assistant\n",
            "response": "6.",
        },
        "prompt",
        AGAIN,
    ),
    "xtuner": (
        {"conversation": [{"system": "Be brief.", "input": Q, "output": A}]},
        "conversation",
        BRIEF,
    ),
    "xtuner, its system text in each": (
        {
            "conversation": [
                {"input": q, "output": a, "system": "Be brief."}
                for q, a in ((Q, A), ("And 3+3?", "6."))
            ]
        },
        "conversation",
        [BRIEF[0], *AGAIN],
    ),
    "input and output": ({"input": Q, "output": A}, "input", PAIR),
    "nemotron": ({"input": [ASK], "output": A, "system_prompt": "Be brief."}, "input", BRIEF),
    "prompt and completion": ({"prompt": Q, "completion": A}, "prompt", PAIR),
    "prompt of JSON": (
        {"prompt": '{"city": "Paris"}', "completion": A},
        "prompt",
        [("user", '{"city": "Paris"}'), PAIR[1]],
    ),
    "prompt of JSON objects": (
        {"prompt": '[{"author": "Ann", "text": "Hi", "n": 1}]', "completion": A},
        "prompt",
        [("user", '[{"author": "Ann", "text": "Hi", "n": 1}]'), PAIR[1]],
    ),
    "prompt of messages as a text": (
        {"prompt": json.dumps([ASK | {"id": 1}]), "completion": A},
        "prompt",
        PAIR,
    ),
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
    "a list of no turns before another": (
        {"conversation": [], "dialog": [ASK, REPLY]},
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
    "branches from the first question on": (
        {
            "messages": [
                child("1", "user", "An older question", "2"),
                child("2", "assistant", "An older answer"),
                child("3", "user", Q, "4"),
                child("4", "assistant", A, "5"),
                child("5", "user", "And 3+3?", "6"),
                child("6", "assistant", "6."),
            ]
        },
        "messages",
        AGAIN,
    ),
    "branches after a system message": (
        {
            "messages": [
                child("0", "system", "Be brief."),
                child("1", "user", "An older question"),
                child("3", "user", Q, "4"),
                child("4", "assistant", A),
            ]
        },
        "messages",
        BRIEF,
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
    "two answers": (
        {"messages": [ASK], "response": "5", "choices": [{"index": 0, "message": REPLY}]},
        "by the keys response and choices.0.message.*dataset.columns",
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
    "rasa": (
        {"rasa_nlu_data": {"common_examples": [{"text": "hey", "intent": "greet"}]}},
        "training data of intents.*heads are trained on answers",
    ),
    "rasa domain": (
        {"intents": ["greet"], "responses": {"utter_greet": [{"text": "Hey!"}]}},
        "training data of intents",
    ),
    "rasa stories": (
        {"story": "x", "steps": [{"intent": "greet"}, {"action": "utter_greet"}]},
        "training data of intents",
    ),
    "intents": ({"tag": "x", "patterns": ["Bye"], "responses": ["See you"]}, "data of intents"),
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


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def parse(record):
    return ChatParser().parse(json.dumps(record).encode())


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path, **options):
    reading = read_conversations(path, **options)
    return [turns(conversation) for conversation in reading], dict(reading.forms)
