"""Tree decoding gives what plain decoding gives, whatever the heads guess."""

import random

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

from medusa_exp.decode import generate
from medusa_exp.decode.loop import decode_plain, decode_tree
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain


def random_tree(rng: random.Random, depth: int, num_ranks: int, size: int) -> Tree:
    paths = {()}
    while len(paths) < size:
        parent = rng.choice(sorted(paths))
        if len(parent) < depth:
            paths.add((*parent, rng.randrange(num_ranks)))
    return Tree.from_paths(paths)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


class OracleHeads(torch.nn.Module):
    """Stub heads that know the answer, and tell it always, never or every other step.

    A call is a step; it needs no hidden state, only to count the tokens committed so far.
    """

    def __init__(self, answer: list[int], num_heads: int, mood: str) -> None:
        super().__init__()
        self.answer, self.num_heads, self.mood = answer, num_heads, mood
        self.committed = 1  # the prompt's step gives one token
        self.calls = 0

    def forward(self, hidden_BD):
        is_right = self.mood == "always" or (self.mood == "sometimes" and self.calls % 2 == 0)
        logits_BKV = torch.zeros(1, self.num_heads, VOCAB_SIZE)
        for k in range(self.num_heads):
            place = self.committed + k
            truth = self.answer[place] if place < len(self.answer) else 0
            logits_BKV[0, k, truth if is_right else (truth + 1) % VOCAB_SIZE] = 1.0
        self.calls += 1
        return logits_BKV

    def saw(self, tokens: list[int]) -> None:
        self.committed += len(tokens) if self.calls else 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equal_to_plain_decoding(architecture):
    model = build_model(architecture)
    backbone = Backbone(model)
    heads = build_heads(backbone, num_heads=3)
    rng = random.Random(architecture)
    accepted = 0
    for number in range(8):
        prompt = random_prompt(rng, rng.randint(1, 30))
        tree = random_tree(rng, depth=3, num_ranks=6, size=rng.randint(1, 20))
        limits = {"max_new_tokens": rng.randint(1, 40), "stop_ids": {number}}
        plain = decode_plain(backbone, prompt, **limits)
        ours = decode_tree(backbone, heads, tree, prompt, **limits)
        assert ours.tokens == plain.tokens
        assert sum(ours.accept_lengths) == len(ours.tokens)
        assert set(plain.accept_lengths) == {1}
        accepted += len(plain.accept_lengths) - len(ours.accept_lengths)
    assert accepted > 0, "no guess ever came true: the test has shown nothing"


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_plain_decoding_equals_model_generate(architecture):
    backbone = Backbone(build_model(architecture))
    prompt = random_prompt(random.Random(1), 9)
    plain = decode_plain(backbone, prompt, max_new_tokens=24, stop_ids=())
    theirs = backbone.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert plain.tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("mood", "expected"),
    [
        ("always", [1, 4, 4, 4, 4, 3]),
        ("never", [1] * 20),
        ("sometimes", [1, 4, 1, 4, 1, 4, 1, 4]),
    ],
)
def test_stub_heads(backbone, mood, expected):
    prompt = [5, 6, 7]
    limits = {"max_new_tokens": 20, "stop_ids": ()}
    plain = decode_plain(backbone, prompt, **limits)
    heads = OracleHeads(plain.tokens, 3, mood)
    ours = decode_tree(backbone, heads, chain(3), prompt, on_step=heads.saw, **limits)
    assert ours.tokens == plain.tokens
    assert ours.accept_lengths == expected


def test_a_stop_token_inside_an_accepted_run_ends_the_answer(backbone):
    prompt = [5, 6, 7]
    answer = decode_plain(backbone, prompt, max_new_tokens=20, stop_ids=()).tokens
    stop = answer[6]
    expected = answer[: answer.index(stop) + 1]
    heads = OracleHeads(answer, 3, "always")
    ours = decode_tree(
        backbone, heads, chain(3), prompt, max_new_tokens=20, stop_ids={stop}, on_step=heads.saw
    )
    assert ours.tokens == expected


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 5])
def test_max_new_tokens_is_exact(backbone, max_new_tokens):
    heads = build_heads(backbone, num_heads=3)
    limits = {"max_new_tokens": max_new_tokens, "stop_ids": ()}
    ours = decode_tree(backbone, heads, chain(3), [1, 2], **limits)
    assert len(ours.tokens) == max_new_tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_answer_up_to_the_last_position(architecture):
    """GPT-2 has a table of positions: a guess beyond its end must not look there."""
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=4)
    prompt = random_prompt(random.Random(2), backbone.max_length - 12)
    limits = {"max_new_tokens": 12, "stop_ids": ()}
    plain = decode_plain(backbone, prompt, **limits)
    assert decode_tree(backbone, heads, chain(4), prompt, **limits).tokens == plain.tokens


def test_too_long_and_empty_prompts(backbone):
    with pytest.raises(UserError, match=r"127 tokens and 2 new ones make 129; the model has 128"):
        decode_plain(backbone, [1] * 127, max_new_tokens=2, stop_ids=())
    with pytest.raises(UserError, match="no token"):
        decode_plain(backbone, [], max_new_tokens=2, stop_ids=())


def test_generate_takes_padding_on_either_side(backbone):
    heads = build_heads(backbone, num_heads=2)
    rows = [[4, 5, 6], [7]]
    expected = [decode_plain(backbone, r, max_new_tokens=6, stop_ids=()).tokens for r in rows]
    for ids, mask in (
        ([[4, 5, 6], [7, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ([[4, 5, 6], [0, 0, 7]], [[1, 1, 1], [0, 0, 1]]),
    ):
        result = generate(
            backbone.model,
            heads,
            torch.tensor(ids),
            tree=chain(2),
            attention_mask=torch.tensor(mask),
            max_new_tokens=6,
            eos_token_id=[],
        )
        assert result.sequences == expected
        assert [sum(lengths) for lengths in result.accept_lengths] == [6, 6]
        assert result.num_steps == sum(len(lengths) for lengths in result.accept_lengths)
