import pytest

from medusa_exp.config import Config, DatasetConfig, DecodeConfig
from medusa_exp.data import Conversation, Message
from medusa_exp.errors import UserError
from medusa_exp.evaluate.prompts import category_of, prompts_of, stop_ids


def chat(number, *contents):
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    return Conversation(f"sums-{number}", messages)


CONFIG = Config(dataset=DatasetConfig(max_length=60), decode=DecodeConfig(max_new_tokens=20))


def test_every_turn_that_leaves_room_is_a_prompt(tokenizer, caplog):
    chats = [chat(1, "a", "b", "c", "d"), chat(2, "x" * 50, "y")]
    prompts = prompts_of(chats, tokenizer, CONFIG, 128)
    assert [prompt.prompt_id for prompt in prompts] == ["sums-1#1", "sums-1#3"]
    assert (
        prompts[1].text
        == "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>"
    )
    assert tokenizer.decode(prompts[1].input_ids) == prompts[1].text
    assert {prompt.category for prompt in prompts} == {"sums"}
    assert "1 prompts of more than 40 tokens" in caplog.text


def test_what_the_template_refuses_is_counted(tokenizer, caplog):
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert len(prompts_of([chat(1, "no", "b"), chat(2, "a", "b")], tokenizer, CONFIG, 128)) == 1
    assert "1 prompts are left out: the chat template refuses them" in caplog.text


def test_no_prompt_at_all(tokenizer):
    with pytest.raises(UserError, match="no held-out prompt is left: 0 are refused"):
        prompts_of([chat(1, "x" * 90, "y")], tokenizer, CONFIG, 128)


@pytest.mark.parametrize(
    ("conversation_id", "category"),
    [("arithmetic-000123", "arithmetic"), ("gsm8k_train_600", "gsm8k_train"), ("7", "all")],
)
def test_category(conversation_id, category):
    assert category_of(conversation_id) == category


def test_ids_that_are_names_make_one_category(tokenizer):
    chats = [Conversation(f"{chr(97 + i)}x", chat(0, "a", "b").messages) for i in range(20)]
    prompts = prompts_of(chats, tokenizer, CONFIG, 128)
    assert {prompt.category for prompt in prompts} == {"all"}


def test_stop_ids(backbone, tokenizer):
    config = Config(decode=DecodeConfig(stop_ids=[5]))
    tokenizer.eos_token = None
    assert stop_ids(config, backbone, tokenizer) == {5}
    backbone.model.generation_config.eos_token_id = [2, 3]
    assert stop_ids(config, backbone, tokenizer) == {2, 3, 5}
