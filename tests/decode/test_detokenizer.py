"""Text that comes a few tokens at a time is what the tokenizer makes of the whole."""

import os
import random
from pathlib import Path

import pytest
from tiny_tokenizers import llama_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medusa_exp.decode.detokenizer import IncrementalDetokenizer

PLACE = os.environ.get("MEDUSA_EXP_TEST_DATA")
TOKENIZERS = sorted(Path(PLACE, "tokenizers").glob("*")) if PLACE else []
"""Tokenizers of yours, as in tests/data/test_real_data.py."""
PIECES = ["héllo ", "wörld", " 你好", "😀", "👩‍👩‍👧", "\n\n", "f(x):\n    return x", "  ", ".", "ñ"]


class Counting:
    """A tokenizer that notes how many tokens it decodes at a time at most."""

    def __init__(self, tokenizer):
        self.tokenizer, self.most = tokenizer, 0

    def decode(self, ids, **options):
        self.most = max(self.most, len(ids))
        return self.tokenizer.decode(ids, **options)


def added_bit_by_bit(tokenizer, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.add([token]) for token in ids]


def check_pieces_add_up(tokenizer):
    draw = random.Random(0)
    for _ in range(8):
        ids = tokenizer("".join(draw.choices(PIECES, k=120)), add_special_tokens=False).input_ids
        for _ in range(40):  # special tokens have no text, wherever they come
            ids.insert(draw.randrange(len(ids)), tokenizer.eos_token_id)
        counting = Counting(tokenizer)
        detokenizer, place, text = IncrementalDetokenizer(counting), 0, ""
        while place < len(ids):
            number = draw.randint(1, 5)
            text += detokenizer.add(ids[place : place + number])
            place += number
            assert not text.endswith("\ufffd")
        assert text == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        assert counting.most < 200 < len(ids)


def test_pieces_add_up_with_tokens_of_bytes(tokenizer):
    check_pieces_add_up(tokenizer)


def test_pieces_add_up_with_words_and_byte_fallback():
    check_pieces_add_up(llama_tokenizer())


@pytest.mark.skipif(not TOKENIZERS, reason="MEDUSA_EXP_TEST_DATA is not set")
@pytest.mark.filterwarnings("ignore")
def test_pieces_add_up_with_tokenizers_of_yours():
    for directory in TOKENIZERS:
        check_pieces_add_up(AutoTokenizer.from_pretrained(directory))


def test_a_line_break_before_a_character_of_several_tokens_is_shown_once():
    tokenizer = llama_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\n你".encode()]
    assert added_bit_by_bit(tokenizer, ids) == ["\n", "", "", "你"]


@pytest.mark.parametrize("character", ["é", "你", "😀"])
def test_of_characters_of_several_tokens_each_only_the_end_is_decoded(character):
    counting = Counting(llama_tokenizer())
    data = (character * 200).encode()
    ids = [counting.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    assert "".join(added_bit_by_bit(counting, ids)) == character * 200
    assert counting.most < 150


def test_words_between_halves_of_characters_are_shown_at_once():
    tokenizer = llama_tokenizer()
    broken, begun, word = tokenizer.convert_tokens_to_ids(["<0xF0>", "<0xE4>", "a"])
    line_break = tokenizer.convert_tokens_to_ids("<0x0A>")
    detokenizer = IncrementalDetokenizer(tokenizer)
    steps = [line_break], [broken], [word, begun], [word, begun], [word]
    assert [detokenizer.add(step) for step in steps] == ["\n", "", "\ufffda", "\ufffda", "\ufffda"]


def test_nothing_is_lost_where_a_tokenizer_tidies_up_spaces():
    """As XGLM's do, say: "it ' s" becomes "it's"."""
    made = Tokenizer(models.WordLevel({"▁it": 0, "▁'": 1, "s": 2, "▁not": 3}, unk_token="s"))
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([0, 1, 2, 3]) == "it's not"
    assert added_bit_by_bit(tokenizer, [0, 1, 2, 3]) == ["it", " '", "s", " not"]


def test_what_has_no_text_for_long_is_kept_until_it_has():
    """A special token alone says nothing of the space before the next word."""
    tokenizer = llama_tokenizer()
    ids = tokenizer("hello hello", add_special_tokens=False).input_ids
    middle = len(ids) // 2
    marks = [tokenizer.eos_token_id] * 300
    text = "".join(added_bit_by_bit(tokenizer, [*ids[:middle], *marks, *ids[middle:]]))
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
