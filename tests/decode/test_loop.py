"""Tree decoding gives what plain decoding gives, whatever the heads guess."""

import random

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import DynamicTreeDrafter, FixedTreeDrafter
from medusa_exp.decode.loop import Limits, Responses
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.step import CapturedStep
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


def answer_plainly(backbone, prompts, limits):
    return [answer.tokens for answer in decode_plain(backbone, prompts, limits)]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equal_to_plain_decoding(architecture):
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=3)
    rng = random.Random(architecture)
    saved = 0
    for number in range(8):
        num_rows = 1 + number % 4
        prompts = [random_prompt(rng, rng.randint(1, 30)) for _ in range(num_rows)]
        tree = random_tree(rng, depth=3, num_ranks=6, size=rng.randint(1, 20))
        limits = Limits(rng.randint(1, 40), {number})
        one_by_one = [decode_plain(backbone, [prompt], limits)[0] for prompt in prompts]
        together = decode_plain(backbone, prompts, limits)
        ours = Decoder(backbone, heads, tree).decode(prompts, limits)
        for single, plain, answer in zip(one_by_one, together, ours, strict=True):
            assert answer.tokens == plain.tokens == single.tokens
            assert sum(answer.accept_lengths) == len(answer.tokens)
            assert set(plain.accept_lengths) == {1}
            saved += len(plain.accept_lengths) - len(answer.accept_lengths)
    assert saved > 0, "no guess ever came true: the test has shown nothing"


@pytest.mark.parametrize("num_nodes", [1, 4, 20])
def test_a_tree_picked_anew_at_each_step(backbone, num_nodes):
    heads = build_heads(backbone, num_heads=3)
    rng = random.Random(num_nodes)
    choices = random_tree(rng, depth=3, num_ranks=6, size=20)
    prompts = [random_prompt(rng, rng.randint(1, 30)) for _ in range(3)]
    limits = Limits(30)
    answers = Responses(len(prompts), limits)
    drafter = DynamicTreeDrafter(heads, choices, num_nodes, backbone.device)
    for _ in Decoder(backbone, heads).steps(prompts, answers, drafter):
        pass
    assert [a.tokens for a in answers.rows] == answer_plainly(backbone, prompts, limits)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_plain_decoding_equals_model_generate(architecture):
    backbone = Backbone(build_model(architecture))
    prompt = random_prompt(random.Random(1), 9)
    [tokens] = answer_plainly(backbone, [prompt], Limits(24))
    theirs = backbone.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_a_prompt_in_pieces(backbone, length, monkeypatch):
    prompts = [random_prompt(random.Random(length), n) for n in (length, 3, 8)]
    whole = answer_plainly(backbone, prompts, Limits(9))
    monkeypatch.setattr("medusa_exp.decode.loop.PREFILL_TOKENS", 12)  # 4 of each row
    assert answer_plainly(backbone, prompts, Limits(9)) == whole


@pytest.mark.parametrize(
    ("mood", "expected"),
    [
        ("always", [1, 4, 4, 4, 4, 3]),
        ("never", [1] * 20),
        ("sometimes", [1, 4, 1, 4, 1, 4, 1, 4]),
    ],
)
def test_stub_heads(backbone, mood, expected):
    prompt, limits = [5, 6, 7], Limits(20)
    [answer] = answer_plainly(backbone, [prompt], limits)
    ours = decode_with_oracle(backbone, OracleHeads(answer, 3, mood), prompt, limits)
    assert ours.tokens == answer
    assert ours.accept_lengths == expected


def decode_with_oracle(backbone, heads, prompt, limits):
    answers = Responses(1, limits)
    drafter = FixedTreeDrafter(heads, chain(3), backbone.device)
    for [tokens] in Decoder(backbone, heads).steps([prompt], answers, drafter):
        heads.saw(tokens)
    return answers.rows[0]


def test_a_stop_token_inside_an_accepted_run_ends_the_answer(backbone):
    prompt = [5, 6, 7]
    [answer] = answer_plainly(backbone, [prompt], Limits(20))
    stop = answer[6]
    expected = answer[: answer.index(stop) + 1]
    heads = OracleHeads(answer, 3, "always")
    assert decode_with_oracle(backbone, heads, prompt, Limits(20, {stop})).tokens == expected


def test_a_stop_string_ends_with_the_token_that_completes_it(backbone):
    prompt = [5, 6, 7]
    [answer] = answer_plainly(backbone, [prompt], Limits(20))

    def text(tokens):
        return "".join(f"<{token}>" for token in tokens)

    stop = text(answer[5:8])[1:-2]
    limits = Limits(20, stop_strings=[stop], decode_text=text)
    heads = OracleHeads(answer, 3, "always")
    found = decode_with_oracle(backbone, heads, prompt, limits).tokens
    assert stop in text(found) and stop not in text(found[:-1]) and found == answer[: len(found)]
    with pytest.raises(ValueError, match="stop_strings need decode_text"):
        Limits(20, stop_strings=[stop])


def test_the_end_of_a_response_is_that_of_one_token_after_the_other():
    def text(tokens):
        return "".join(map(str, tokens))

    rng, ends = random.Random(0), 0
    for _ in range(1000):
        stops, strings = rng.choice([[], [7], (5, 6, 7)]), rng.choice([[], [], ["33"]])
        before, tokens = ([rng.randrange(9) for _ in range(rng.randrange(6))] for _ in range(2))
        limits = Limits(len(before) + rng.randrange(8), stops, strings, text)
        expected, is_end = [], len(before) >= limits.max_new_tokens
        for token in tokens:
            if is_end:
                break
            expected.append(token)
            is_end = len(before) + len(expected) >= limits.max_new_tokens or token in stops
            is_end |= any(string in text([*before, *expected]) for string in strings)
        if strings and strings[0] in text(before):
            continue  # it would have ended before
        ends += is_end
        assert limits.until_end(before, tokens) == (expected, is_end)
    assert 200 < ends < 900


@pytest.mark.parametrize("num_lookup", [0, 3])
def test_tokens_are_told_beside_the_next_step(backbone, beside, monkeypatch, num_lookup):
    steps = []
    begin = CapturedStep.begin
    monkeypatch.setattr(
        CapturedStep, "begin", lambda step, *given: (steps.append(step), begin(step, *given))[1]
    )
    heads, prompts = build_heads(backbone, num_heads=3), [[5, 6, 7], [9]]
    tree = Tree(chain(3).parents, chain(3).ranks, num_lookup=num_lookup)
    decoder = Decoder(backbone, heads, tree, cuda_graph=True)
    drafter, answers = decoder.drafter(tree), Responses(2, Limits(20))
    was_at_work = []
    for _ in decoder.steps(prompts, answers, drafter):
        was_at_work += [bool(answers.active) and steps[-1].is_at_work] if steps else []
    assert [row.tokens for row in answers.rows] == answer_plainly(backbone, prompts, Limits(20))
    assert was_at_work == [not num_lookup] * (len(was_at_work) - 1) + [False]
    assert not steps[-1].is_at_work


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 5])
def test_max_new_tokens_is_exact(backbone, max_new_tokens):
    heads = build_heads(backbone, num_heads=3)
    for prompts in ([[1, 2]], [[1, 2], [3]]):
        ours = Decoder(backbone, heads, chain(3)).decode(prompts, Limits(max_new_tokens))
        assert [len(answer.tokens) for answer in ours] == [max_new_tokens] * len(prompts)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_answer_up_to_the_last_position(architecture):
    """GPT-2 has a table of positions: a guess beyond its end must not look there."""
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=4)
    prompt = random_prompt(random.Random(2), backbone.max_length - 12)
    [ours] = Decoder(backbone, heads, chain(4)).decode([prompt], Limits(12))
    assert [ours.tokens] == answer_plainly(backbone, [prompt], Limits(12))


def test_rows_end_at_different_times_from_the_first_step_on(backbone):
    heads = build_heads(backbone, num_heads=3)
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6], [8, 8]]
    alone = answer_plainly(backbone, prompts, Limits(30))
    stops = {alone[0][0], alone[2][9], alone[3][20]}  # the first row has but one token
    expected = [answer_plainly(backbone, [p], Limits(30, stops))[0] for p in prompts]
    tree = random_tree(random.Random(0), depth=3, num_ranks=5, size=12)
    ours = Decoder(backbone, heads, tree).decode(prompts, Limits(30, stops))
    assert [answer.tokens for answer in ours] == expected
    assert len(ours[0].tokens) == 1 and len({len(answer.tokens) for answer in ours}) > 2


def test_too_long_and_empty_prompts(backbone):
    with pytest.raises(UserError, match=r"127 tokens and 2 new ones make 129; the model has 128"):
        decode_plain(backbone, [[1], [1] * 127], Limits(2))
    with pytest.raises(UserError, match="no token"):
        decode_plain(backbone, [[1], []], Limits(2))
