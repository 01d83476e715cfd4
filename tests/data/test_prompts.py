import pytest

from medusa_exp.data import Conversation, DataError, Message
from medusa_exp.data.prompts import category_of, is_question_file, prompts_of, read_questions
from medusa_exp.errors import UserError


def chat(number, *contents):
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    return Conversation(f"sums-{number}", messages)


LIMITS = {"max_tokens": 40, "num_prompts": 99}


def test_every_turn_that_leaves_room_is_a_prompt(tokenizer, caplog):
    chats = [chat(1, "a", "b", "c", "d"), chat(2, "x" * 50, "y")]
    prompts = prompts_of(chats, tokenizer, **LIMITS)
    assert [prompt.prompt_id for prompt in prompts] == ["sums-1#1", "sums-1#3"]
    assert (
        prompts[1].text
        == "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>"
    )
    assert tokenizer.decode(prompts[1].input_ids) == prompts[1].text
    assert {prompt.category for prompt in prompts} == {"sums"}
    assert "left out: 1 (more than 40 tokens)" in caplog.text


def test_what_the_template_refuses_is_counted(tokenizer, caplog):
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert len(prompts_of([chat(1, "no", "b"), chat(2, "a", "b")], tokenizer, **LIMITS)) == 1
    assert "left out: 1 (refused by the chat template)" in caplog.text


def test_no_more_than_asked_for(tokenizer):
    chats = (chat(number, "a", "b", "c", "d") for number in range(9))
    prompts = prompts_of(chats, tokenizer, max_tokens=40, num_prompts=3)
    assert [prompt.prompt_id for prompt in prompts] == ["sums-0#1", "sums-0#3", "sums-1#1"]
    assert next(chats).id == "sums-2"  # the rest was not looked at


def test_no_prompt_at_all(tokenizer):
    with pytest.raises(UserError, match=r"no held-out prompt is left \(more than 40 tokens: 1\)"):
        prompts_of([chat(1, "x" * 90, "y")], tokenizer, **LIMITS)


@pytest.mark.parametrize(
    ("conversation_id", "category"),
    [
        ("arithmetic-000123", "arithmetic"),
        ("gsm8k_train_600", "gsm8k_train"),
        ("7", "all"),
        ("sha256-9d2ce12345678901", "all"),
    ],
)
def test_category(conversation_id, category):
    assert category_of(conversation_id) == category


def test_ids_that_are_names_make_one_category(tokenizer):
    chats = [Conversation(f"{chr(97 + i)}x", chat(0, "a", "b").messages) for i in range(20)]
    prompts = prompts_of(chats, tokenizer, **LIMITS)
    assert {prompt.category for prompt in prompts} == {"all"}


def test_turns_behind_a_prompt_that_is_far_too_long_are_counted(tokenizer, caplog):
    chats = [chat(1, "x" * 200, *"abcdefg"), chat(2, "a", "b")]
    assert len(prompts_of(chats, tokenizer, **LIMITS)) == 1
    assert "left out: 4 (more than 40 tokens)" in caplog.text


def test_a_prompt_without_the_reasoning_of_earlier_turns_may_be_shorter(tokenizer, caplog):
    """Templates leave it out once the user has spoken again."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if messages[-1].role != 'user' %}{{ m.reasoning_content }}{% endif %}{% endfor %}"
    )
    called = Message("assistant", "b", reasoning="x" * 500)
    said = [Message("user", "a"), called, Message("tool", "c"), Message("assistant", "d")]
    said += [Message("user", "e"), Message("assistant", "f")]
    prompts = prompts_of([Conversation("sums-1", said)], tokenizer, **LIMITS)
    assert [prompt.text for prompt in prompts] == ["a", "abcde"]
    assert "left out: 1 (more than 40 tokens)" in caplog.text


@pytest.mark.parametrize(
    "odd", [b'"caf\xe9"', b"[" * 100_000, b"["], ids=["latin-1", "deep", "cut"]
)
def test_a_line_that_cannot_be_decoded_is_no_question(tmp_path, odd):
    """So a file of chats in another encoding is read as chats, which says of which."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question_id": 1, "turns": ["a"], "category": ' + odd + b"}\n")
    assert not is_question_file(path)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is no question: "):
        read_questions(path)
