import json

import pytest

from medusa_exp.data import read_conversations
from medusa_exp.data.messages import Message
from medusa_exp.data.parsing import ChatParser

HI = {"from": "human", "value": "Hi"}
ASK = {"role": "client", "content": "Hi"}
HELLO = {"from": "gpt", "value": "Hello!"}


def parse(record, role_map=None):
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return ChatParser(role_map).parse(text)


def turns(found):
    return [(message.role, message.content) for message in found.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [HI, HELLO]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "model", "content": "Hello!"}]},
        {
            "conversations": [
                {"role": "human", "content": "Hi"},
                {"from": "bot", "content": "Hello!"},
            ]
        },
        {"conversations": None, "messages": [HI, HELLO]},
        {"conversations": [], "messages": [HI, HELLO]},
        {"conversations": [HI, HELLO], "messages": "", "extra": [1, {"a": None}]},
        {"conversations": [HI | {"weight": 0, "role": None}, HELLO | {"content": None}]},
        {"messages": [{"role": "user", "content": ["H", {"type": "text", "text": "i"}]}, HELLO]},
        {"messages": [HI, {"role": "Assistant", "content": "Hello!", "tool_calls": []}]},
        {"conversations": [HI, HELLO], "system": None},
        {"conversations": [HI, HELLO], "system": " \n"},
        {"conversations": [HI, HELLO], "system": "{}"},
    ],
)
def test_forms(record):
    assert turns(parse(record)) == [("user", "Hi"), ("assistant", "Hello!")]
    assert turns(ChatParser().parse(record)) == turns(parse(record))  # the row of a table


@pytest.mark.parametrize(
    ("role", "names"),
    {
        "user": "user human prompter",
        "assistant": "assistant gpt chatgpt bing bard model bot ai",
        "system": "system developer",
        "tool": "tool function observation function_response tool_response ipython",
    }.items(),
)
def test_names_of_roles(role, names):
    for name in names.split():
        assert parse({"conversations": [{"from": name, "value": "x"}, HELLO]}).messages[0] == (
            Message(role, "x")
        )


def test_role_map_adds_and_overrides():
    record = {"conversations": [{"from": "narrator", "value": "x"}, HI, HELLO]}
    assert parse(record) == "unknown role"
    found = parse(record, {"narrator": "system", "human": "tool"})
    assert turns(found) == [("system", "x"), ("tool", "Hi"), ("assistant", "Hello!")]
    twice = {"conversations": [{**record["conversations"][0], "role": "system"}, HI, HELLO]}
    assert parse(twice) == "a turn with two roles or two texts"
    assert turns(parse(twice, {"narrator": "system"}))[0] == ("system", "x")


@pytest.mark.parametrize("empty", ["", None, [], "[]"])
def test_of_two_texts_the_one_that_is_held_counts(empty):
    for one, other in (("value", "content"), ("content", "value")):
        turn = {"role": "user", one: empty, other: "Hi"}
        assert turns(parse({"messages": [turn, HELLO]}))[0] == ("user", "Hi")
    nothing = {"role": "user", "value": "", "content": None}
    assert turns(parse({"messages": [HI, HELLO, nothing, HELLO]}))[2] == ("user", "")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, {"role": "bot2", "content": "Hello!"}, ASK], "response": "Bye!"},
        {"body": {"messages": [ASK, HELLO, ASK], "completion": "Bye!"}},
        {"messages": json.dumps([ASK, HELLO, ASK]), "output": {"from": "Bot2", "value": "Bye!"}},
    ],
)
def test_role_map_counts_where_an_answer_is_looked_for(record):
    found = turns(parse(record, {"client": "user", "bot2": "assistant"}))
    assert found == [("user", "Hi"), ("assistant", "Hello!"), ("user", "Hi"), ("assistant", "Bye!")]


CALLED = [{"role": "Client", "content": "Hi", "at": 1}]
ANSWERED = [{"speaker": "bot2", "utterance": "Hello!", "at": 2}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": CALLED, "completion": ANSWERED},
        {"instruction": CALLED, "output": ANSWERED},
        {"user": CALLED, "assistant": "Hello!"},
        {"prompt": CALLED, "chosen": CALLED + ANSWERED, "rejected": "Go."},
        {"prompt": "Hi", "chosen": ANSWERED, "rejected": "Go."},
        {"body": {"messages": CALLED, "completion": "Hello!"}},
        {"messages": CALLED, "response": ANSWERED},
    ],
)
def test_role_map_reaches_turns_within_texts(record):
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in record.items()}
    for one in (record, texts):
        found = parse(one, {"client": "user", "bot2": "assistant"})
        assert turns(found) == [("user", "Hi"), ("assistant", "Hello!")]


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "client", "level": 3}]',
        '{"role": "client", "content": "Hi", "at": 1}',
        '{"messages": [{"role": "client", "content": "Hi"}]}',
        '[{"author": "client", "text": "Hi", "n": 1}, {"author": "Ann", "text": "Hi"}]',
        '[{"author": "Ann", "text": "Hi", "at": 1}]',
    ],
)
def test_role_map_makes_no_turns_of_other_json(text):
    found = parse({"prompt": text, "completion": "Hello!"}, {"client": "user"})
    assert turns(found) == [("user", text), ("assistant", "Hello!")]
    beside = {"instruction": "Count.", "input": json.dumps(CALLED), "output": "1"}
    assert turns(parse(beside, {"client": "user"}))[0][1].startswith("Count.\n\n[")


@pytest.mark.parametrize(
    "beside",
    [
        {"chosen": "Hello!", "rejected": "Go."},
        {"messages": [HI, HELLO, HI], "chosen": "Hello!", "rejected": "Go."},
        {"prompt": "Hi", "completion": "Hello!"},
        {"conversation": [{"user": "Hi", "assistant": "Hello!"}]},
        {"output": "[]"},
    ],
)
def test_an_answer_beside_messages_is_found_behind_the_first_records_too(beside):
    raw = json.dumps({"messages": [HI], **beside}).encode()
    first, later = (ChatParser().parse(raw, number) for number in (1, 1000))
    assert turns(first) == turns(later) and len(first.messages) in (2, 4)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"content": "{}", "value": ""}, "{}"),
        ({"content": "[]", "text": "Hello!"}, "Hello!"),
        ({"content": "Hello!", "weight": "", "train": []}, "Hello!"),
    ],
)
def test_a_turn_is_read_alike_in_a_text_a_row_and_another_form(turn, expected):
    talk = [HI, {"role": "assistant", **turn}]
    for record in ({"messages": talk}, {"conversation": talk}):
        for raw in (record, json.dumps(record).encode()):
            found = ChatParser().parse(raw)
            assert turns(found)[1] == ("assistant", expected) and found.messages[1].is_trained


def test_an_answer_after_a_transcript_loses_its_space_by_columns_too():
    record = {"prompt": "Human: Hi\nAssistant:", "completion": " Hello!"}
    chosen = ChatParser(columns={"user": "prompt", "assistant": "completion"})
    assert (
        turns(chosen.parse(record))
        == turns(parse(record))
        == turns(parse({"messages": [HI, HELLO]}))
    )


def test_role_map_may_swap_roles():
    record = {
        "messages": [{"role": "assistant", "content": "Hi"}],
        "response": {"role": "user", "content": "Hello!"},
    }
    found = parse(record, {"user": "assistant", "assistant": "user"})
    assert turns(found) == [("user", "Hi"), ("assistant", "Hello!")]
    thought = {"role": "Bot2", "content": "Hm.", "channel": "analysis"}
    found = parse({"messages": [HI, thought, HELLO]}, {"bot2": "assistant"})
    assert found.messages[1].reasoning == "Hm."


@pytest.mark.parametrize(
    "system",
    ['{"name":"Bot"}', '{"text":"Be brief.","tone":"x"}', '["a"]', ' {"content": "x"}', '{"a": 1'],
)
def test_a_system_text_that_is_json_stays_a_text(system):
    record = {"messages": [HI, HELLO], "system": system}
    pair = {"prompt": "Hi", "completion": "Hello!", "system_prompt": system}
    for one in (record, record | {"tools": [{"name": "f"}]}, pair):
        for raw in (one, json.dumps(one).encode()):
            assert ChatParser().parse(raw).messages[0] == Message("system", system)
    chosen = ChatParser(
        columns={"user": "prompt", "assistant": "completion", "system": "system_prompt"}
    )
    assert chosen.parse(pair).messages[0] == Message("system", system)


@pytest.mark.parametrize(
    "system", ['[{"text": "Be brief."}]', '{"role": "system", "parts": [{"text": "Be brief."}]}']
)
def test_a_system_text_may_be_parts_as_json(system):
    record = {"messages": [HI, HELLO], "system": system}
    for raw in (record, json.dumps(record).encode()):
        assert ChatParser().parse(raw).messages[0] == Message("system", "Be brief.")


@pytest.mark.parametrize("system", ["Be brief.", ["Be ", {"type": "text", "text": "brief."}]])
def test_a_system_text_beside_the_turns_comes_first(system):
    found = parse({"conversations": [HI, HELLO], "system": system})
    assert found.messages[0] == Message("system", "Be brief.") and len(found.messages) == 3
    inside = {"from": "system", "value": "Be brief."}
    assert parse({"conversations": [inside, HI, HELLO], "system": system}).messages == (
        found.messages  # said twice, taken once
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{'id': 1}", "not valid JSON"),
        (b'{"conversations": [', "not valid JSON"),
        (b'{"conversations": [{"from": "gpt", "value": "caf\xe9"}]}', "not valid UTF-8"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (7, "not a JSON object"),
        ("text", "not a JSON object"),
        ({"id": "x"}, "no known form of chat"),
        ({"conversations": "text"}, "no known form of chat"),
        ({"conversations": {"from": "gpt"}}, "no known form of chat"),
        ({"conversations": []}, "no turns"),
        ({"conversations": [None]}, "a turn is not an object with a role and a content"),
        ({"conversations": ["Hi"]}, "a turn is not an object with a role and a content"),
        ({"messages": [{"role": "user"}]}, "a turn is not an object with a role and a content"),
        ({"messages": [{"content": "x"}]}, "a turn is not an object with a role and a content"),
        ({"conversations": [{"from": None, "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": None}]}, "content is null"),
        ({"conversations": [{"from": "human", "value": 3}]}, "content is not text"),
        ({"conversations": [{"from": "human", "value": {"a": 1}}]}, "content is not text"),
        ({"conversations": [{"from": "human", "value": float("nan")}]}, "content is not text"),
        ({"conversations": [HI, HELLO], "system": 3}, "content is not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a picture, a sound or a video",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
            "content has a part that is not text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "content has a part that is not text",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "tool calls in an unknown form",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"arguments": "{}"}}]},
            "tool calls in an unknown form",
        ),
        (
            {"messages": [HI, {"role": "assistant", "content": "So:", "tool_calls": [{"id": 1}]}]},
            "tool calls in an unknown form",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            "content is null",
        ),
        ({"conversations": [HI]}, "no assistant turn"),
        ({"conversations": [HI, {"from": "gpt", "value": " \r\n"}]}, "no assistant turn"),
    ],
)
def test_reasons(record, reason):
    assert parse(record) == reason


@pytest.mark.parametrize(
    "content",
    [
        "a\0b",
        "  x\r\n",
        "\ud800",
        "a\udc00\ud83d",
        "\U0001f600 \u4f60\u597d",
        "</s> [/INST] {{name}} {% x %}",
        "y" * 270_000,
    ],
)
def test_contents_stay_as_they_are(content):
    record = {"conversations": [HI, {"from": "gpt", "value": content}]}
    assert parse(record).messages[1].content == content
    raw = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert parse(raw).messages[1].content == content


@pytest.mark.parametrize(
    "beside",
    [b'"logprob": 1e400', b'"logprob": -1e400', b'"n": ' + b"7" * 6000, b'"\\ud800": 1'],
)
def test_what_is_not_read_may_be_what_no_number_or_text_holds(tmp_path, beside):
    said = json.dumps([HI, HELLO]).encode()
    raw = b'{"conversations": ' + said + b", " + beside + b"}"
    found = ChatParser()
    assert turns(found.parse(raw, 1)) == turns(ChatParser(look_at=0).parse(raw, 1))
    [name] = found.unused
    assert name in ("logprob", "n", r"\ud800")
    unread = found.parse(b"{" + beside + b"}", 2)
    assert unread == "no known form of chat" and found.detail.encode()
    path = tmp_path / "a.json"
    path.write_bytes(raw if b"ud800" in beside else b'{"train": [' + raw + b"]}")
    assert len(list(read_conversations(path))) == 1


@pytest.mark.parametrize("number", [b"1e400", b"7" * 6000])
def test_what_is_read_is_none(number):
    of_text = b'{"conversations": [{"from": "gpt", "value": ' + number + b"}]}"
    assert parse(of_text) == "content is not text"
    of_id = b'{"id": ' + number + b', "conversations": ' + json.dumps([HI, HELLO]).encode() + b"}"
    assert parse(of_id).id.startswith("sha256-")


def test_control_characters_that_json_has_no_room_for():
    raw = b'\xef\xbb\xbf{"conversations": [{"from": "gpt", "value": "a\x00b\tc"}]}\n'
    assert parse(raw).messages[0].content == "a\0b\tc"


def test_many_turns():
    assert len(parse({"conversations": [HI, HELLO] * 285}).messages) == 570


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a-1", "a-1"),
        (7, "7"),
        (0, "0"),
        (2**70, str(2**70)),
        ("caf\u00e9", "caf\u00e9"),
        ("x\ud800y", "x\ufffdy"),
    ],
)
def test_ids(given, expected):
    assert parse({"id": given, "conversations": [HI, HELLO]}).id == expected


@pytest.mark.parametrize("given", [None, "", True, 1.5, float("nan"), ["a"]])
def test_what_is_no_id_is_replaced_by_the_record_s_hash(given):
    record = json.dumps({"id": given, "conversations": [HI, HELLO]}).encode()
    first, again = parse(record), parse(record + b"\r\n")
    assert first.id == again.id and len(first.id) == len("sha256-") + 16
    other = json.dumps({"id": given, "conversations": [HELLO, HI]}).encode()
    assert parse(other).id != first.id
    row = {"id": given, "conversations": [HI, HELLO]}
    assert ChatParser().parse(row).id.startswith("sha256-")


def test_a_digest_is_of_roles_and_contents_alone():
    def digest(*pairs, record_id="a"):
        record = {"id": record_id, "messages": [{"role": r, "content": c} for r, c in pairs]}
        return parse(record).digest()

    one = digest(("user", "ab"), ("assistant", "c"))
    assert len(one) == 16 and one == digest(("human", "ab"), ("gpt", "c"), record_id="b")
    assert one != digest(("user", "a"), ("assistant", "bc"))
    assert one != digest(("tool", "ab"), ("assistant", "c"))
    two = digest(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    assert two != digest(("user", "a"), ("assistant", "bassistant 1 c"))
    assert two != digest(("user", "a"), ("assistant", "bassistant c"))
    assert one != digest(("user", "ab\ud800"), ("assistant", "c"))


def test_a_reply_that_is_only_to_be_read():
    """OpenAI's form: weight 0 stands at turns that are not to be trained."""
    unread = {"role": "assistant", "content": "Hello!", "weight": 0}
    asked = {"role": "user", "content": "Hi"}
    reason = "no assistant turn that is to be trained"
    assert parse({"messages": [asked, unread]}) == reason
    assert ChatParser().parse({"messages": [asked, unread]}) == reason
    assert turns(parse({"messages": [asked | {"weight": 0}, unread | {"weight": 1}]}))


def test_a_row_and_the_same_record_are_read_alike():
    record = {"messages": [{"from": "", "role": "user", "value": "Hi"}, HELLO]}
    assert turns(ChatParser().parse(record)) == turns(parse(record))
