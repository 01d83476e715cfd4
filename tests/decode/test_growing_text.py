"""Text that grows by a few tokens at a time is what the tokenizer makes of the whole."""

import os
import random
from pathlib import Path

import pytest
from tiny_tokenizers import llama_tokenizer
from transformers import AutoTokenizer

from medusa_exp.decode.growing_text import GrowingText

PLACE = os.environ.get("MEDUSA_EXP_TEST_DATA")
TOKENIZERS = sorted(Path(PLACE, "tokenizers").glob("*")) if PLACE else []
"""Tokenizers of yours, as in tests/data/test_real_data.py."""
PIECES = [
    "héllo ",
    "wörld",
    " 你好",
    "😀",
    "👩‍👩‍👧",
    "\n\n",
    "def f(x):\n    return x",
    "  ",
    ".",
    "ñ",
]


def check(tokenizer):
    draw = random.Random(0)
    for _ in range(8):
        ids = tokenizer("".join(draw.choices(PIECES, k=120)), add_special_tokens=False).input_ids
        for _ in range(40):  # special tokens have no text, wherever they come
            ids.insert(draw.randrange(len(ids)), tokenizer.eos_token_id)
        growing, place, text = GrowingText(tokenizer), 0, ""
        while place < len(ids):
            number = draw.randint(1, 5)
            text += growing.add(ids[place : place + number])
            place += number
            assert not text.endswith("\ufffd")
            assert len(growing._recent) < 200, "all of it is decoded at each step"
        assert text == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def test_of_bytes(tokenizer):
    check(tokenizer)


def test_of_words_with_spaces_before_them():
    check(llama_tokenizer())


@pytest.mark.skipif(not TOKENIZERS, reason="MEDUSA_EXP_TEST_DATA is not set")
@pytest.mark.filterwarnings("ignore")
def test_of_yours():
    for directory in TOKENIZERS:
        check(AutoTokenizer.from_pretrained(directory))


def test_what_has_no_text_for_long_is_kept_until_it_has(tokenizer):
    """A special token alone says nothing of the blank before the next word."""
    growing, eos = GrowingText(llama_tokenizer()), llama_tokenizer().eos_token_id
    ids = llama_tokenizer()("hello hello", add_special_tokens=False).input_ids
    middle = len(ids) // 2
    text = growing.add(ids[:middle])
    for _ in range(300):
        text += growing.add([eos])
    text += growing.add(ids[middle:])
    assert text == llama_tokenizer().decode(ids, skip_special_tokens=True)
