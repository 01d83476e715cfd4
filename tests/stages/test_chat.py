import io
import sys

import pytest
from tiny_models import build_model

from medusa_exp.config import Config
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.stages.chat import Chat, run
from medusa_exp.tree import chain


@pytest.fixture
def chat(tokenizer) -> Chat:
    backbone = Backbone(build_model("llama", vocab_size=len(tokenizer)))
    heads = build_heads(backbone, num_heads=2)
    return Chat(Decoder(backbone, heads, chain(2), limits=Limits(12), tokenizer=tokenizer))


def test_an_answer_comes_in_the_pieces_that_steps_give(chat, tokenizer):
    steps = list(chat.respond("hello"))
    pieces, lengths = [step.text for step in steps], [step.num_tokens for step in steps]
    prompt = "<|user|>hello<|end|>\n<|assistant|>"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    [plain] = decode_plain(chat.decoder.backbone, [ids], Limits(12))
    whole = tokenizer.decode(plain.tokens, skip_special_tokens=True)
    # Half of a character at the end is not shown.
    assert "".join(pieces).rstrip("\ufffd") == whole.rstrip("\ufffd") != ""
    assert sum(lengths) <= chat.num_tokens == round(chat.tokens_per_step * chat.num_steps)
    assert chat.num_tokens == 12 and 1 <= chat.num_steps <= 12
    assert [message.role for message in chat.messages] == ["user", "assistant"]


def test_what_was_said_belongs_to_the_next_prompt_until_there_is_no_room(chat):
    list(chat.respond("hello"))
    list(chat.respond("and?"))
    assert len(chat.messages) == 4
    with pytest.raises(UserError, match="positions"):
        list(chat.respond("x" * 200))
    assert len(chat.messages) == 4


def test_half_a_character_at_the_end_hides_nothing_before_it(chat, tokenizer, monkeypatch):
    said = tokenizer("ab\u00e9", add_special_tokens=False).input_ids[:-1]
    steps = [[said[:1]], [said[1:]]]  # the answer is cut inside of the last character
    monkeypatch.setattr(chat.decoder, "steps", lambda *_: iter(steps))
    assert "".join(step.text for step in chat.respond("hello")) == "ab"
    assert chat.messages[-1].content == "ab"


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "read nothing"), (b"", "read nothing"), (b" \n", "read nothing"), (b"\xe9!", "UTF-8")],
)
def test_no_prompt_in_what_is_piped(chat, tmp_path, monkeypatch, data, message):
    stdin = None if data is None else io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("medusa_exp.stages.session.Session.decoder", lambda *_: chat.decoder)
    with pytest.raises(UserError, match=message):
        run(Config(), tmp_path)
