"""Continuous batching answers every request as if it were alone, and keeps the batch full."""

import os
import random
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_longrope, build_model
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.data import read_conversations
from medusa_exp.decode import loop, memory
from medusa_exp.decode import slots as slots_module
from medusa_exp.decode.cache import GrowingCache, copy_of
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.decode.slot_steps import CapturedSlots, bucket, halves
from medusa_exp.decode.slots import Request
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads, int8
from medusa_exp.model.heads import stack_heads
from medusa_exp.tree import Tree, chain

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])
FORMS = pytest.mark.parametrize("cuda_graph", [False, True, "beside"], indirect=True)
"""Eager steps, steps of fixed shapes, and such as a device takes beside the host."""


@pytest.fixture
def cuda_graph(request):
    """As a decoder takes it."""
    if request.param == "beside":
        request.getfixturevalue("beside")
    return bool(request.param)


def prompts_of(rng: random.Random, count: int, longest: int = 30) -> list[list[int]]:
    return [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


def requests_of(rng: random.Random, count: int, new_tokens: int = 40) -> list[Request]:
    return [
        Request(prompt, Limits(rng.randint(1, new_tokens), {number % 7}), tag=number)
        for number, prompt in enumerate(prompts_of(rng, count))
    ]


def answers(decoder: Decoder, requests, num_slots: int, *, is_plain=False, rule=None):
    """Return the responses by their tags, and the slots that gave them."""
    drafter = decoder.root_only() if is_plain else None
    slots = decoder.slots(num_slots, max(r.room for r in requests), drafter, rule)
    found = {}
    for finished in slots.decode(iter(requests)):
        assert finished.request.tag not in found
        found[finished.request.tag] = finished.response
    assert len(found) == len(requests)
    return [found[request.tag].tokens for request in requests], slots


def alone(backbone, requests, rule=None):
    return [decode_plain(backbone, [r.prompt], r.limits)[0].tokens for r in requests]


def moved(heads):
    """Heads that have left their start, and say something else each."""
    draws = torch.Generator().manual_seed(1)
    for parameter in heads.requires_grad_(False).parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.1)
    return heads


def decoder_of(backbone, cuda_graph: bool, rule=GREEDY, tree=TREE) -> Decoder:
    return Decoder(backbone, build_heads(backbone, num_heads=3), tree, rule, cuda_graph=cuda_graph)


@pytest.mark.parametrize(
    ("architecture", "cuda_graph"),
    [(name, False) for name in sorted(ARCHITECTURES)]
    + [(name, True) for name in ("gemma2", "gpt2", "llama", "mistral")]
    + [("llama", "beside")],
    indirect=["cuda_graph"],
)
def test_equal_to_one_by_one(architecture, cuda_graph):
    backbone = Backbone(build_model(architecture))
    requests = requests_of(random.Random(architecture), 8, new_tokens=30)
    expected = alone(backbone, requests)
    decoder = decoder_of(backbone, cuda_graph)
    assert answers(decoder, requests, 3)[0] == expected
    assert answers(decoder, requests, 3, is_plain=True)[0] == expected


@FORMS
@pytest.mark.parametrize(
    "tree",
    [
        chain(0),
        Tree(TREE.parents, TREE.ranks, num_picked=5),
        Tree(TREE.parents, TREE.ranks, num_lookup=4),
    ],
)
def test_other_trees_and_one_slot(backbone, cuda_graph, tree):
    requests = requests_of(random.Random(1), 5)
    expected = alone(backbone, requests)
    decoder = decoder_of(backbone, cuda_graph, tree=tree)
    for num_slots in (1, 2, 9):
        assert answers(decoder, requests, num_slots)[0] == expected


@FORMS
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_heads_with_prefix_attention(architecture, cuda_graph):
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=3, prefix_attention=True).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(heads.prefix.out.weight, std=0.3)
    decoder = Decoder(backbone, heads, TREE, cuda_graph=cuda_graph)
    requests = requests_of(random.Random(2), 7)
    expected = alone(backbone, requests)
    steps = [decoder.decode([r.prompt], r.limits)[0].accept_lengths for r in requests]
    slots = decoder.slots(3, 128)
    for finished in slots.decode(requests):
        number = finished.request.tag
        assert finished.response.tokens == expected[number]
        assert finished.response.accept_lengths == steps[number]


@FORMS
@pytest.mark.parametrize(
    ("architecture", "at_a_time"), [("llama", 4096), ("llama", 24), ("gemma2", 24), ("gpt2", 24)]
)
def test_a_next_turn_goes_on_in_its_slot(architecture, cuda_graph, at_a_time, monkeypatch):
    """And what is in the slot already is not run again, but copied: a bounded part at a time."""
    monkeypatch.setattr(memory, "PREFILL_TOKENS", at_a_time)
    monkeypatch.setattr(loop, "PREFILL_TOKENS", at_a_time)
    monkeypatch.setattr(slots_module, "PREFILL_TOKENS", at_a_time)
    backbone = Backbone(build_model(architecture))
    rng = random.Random(3)
    requests = requests_of(rng, 6, new_tokens=20)
    for request in requests:
        request.room = 126
    seen: dict[int, list[int]] = {request.tag: list(request.prompt) for request in requests}
    extended: list[int] = []
    copied: list[tuple[int, int]] = []

    def counts(backbone, added, *rest):
        extended.extend(map(len, added))
        return loop.extend(backbone, added, *rest)

    def notes(cache, rows, lengths, num_columns):
        copied.append((len(rows), num_columns))
        return copy_of(cache, rows, lengths, num_columns)

    monkeypatch.setattr(slots_module, "extend", counts)
    monkeypatch.setattr(slots_module, "copy_of", notes)
    turns = 0
    for finished in decoder_of(backbone, cuda_graph).slots(3, 126).decode(requests):
        request = finished.request
        [expected] = decode_plain(backbone, [request.prompt], request.limits)
        assert finished.response.tokens == expected.tokens
        turns += 1
        context = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        prompt = [*request.prompt, *expected.tokens, *context]
        limits = Limits(rng.randint(1, 20), {5})
        if len(prompt) + limits.max_new_tokens <= 126:
            finished.next = Request(prompt, limits, 126, tag=request.tag)
            seen[request.tag] = prompt
    assert turns > 12
    assert len(extended) == turns - len(requests) and max(extended) <= 10
    assert all(rows == 1 or rows * columns <= at_a_time for rows, columns in copied)


@FORMS
@pytest.mark.parametrize("rule", [GREEDY, AcceptanceRule("sampling", temperature=2.0, seed=0)])
def test_next_turns_beyond_a_longrope_boundary_wait_until_the_batch_is_empty(cuda_graph, rule):
    backbone = Backbone(build_longrope())
    rng = random.Random(0)
    first = prompts_of(rng, 6, longest=20)
    new_tokens = [4, 9, 14, 19, 20, 20]
    requests = [Request(first[n], Limits(new_tokens[n]), 90, tag=n) for n in range(6)]
    turns = 0
    for finished in decoder_of(backbone, cuda_graph, rule).slots(4, 90).decode(requests):
        request, turns = finished.request, turns + 1
        if rule is GREEDY:
            [expected] = decode_plain(backbone, [request.prompt], request.limits)
            assert finished.response.tokens == expected.tokens
        if request.tag < 6:
            prompt = [*request.prompt, *finished.response.tokens, *[7] * 40]
            finished.next = Request(prompt, Limits(9), tag=6)
    assert turns == 12


@pytest.mark.parametrize("num_lookup", [0, 4])
def test_what_a_step_gave_is_looked_at_beside_the_next(backbone, beside, monkeypatch, num_lookup):
    """But for what is looked up behind it, for prompts, and for a smaller batch."""
    seen = []
    commit = slots_module.Slots._commit

    def sees(slots, running, added):
        seen.append((slots._step.is_at_work, any(has_ended for _, has_ended in added)))
        yield from commit(slots, running, added)
        assert slots._step.is_at_work == seen[-1][0]

    monkeypatch.setattr(slots_module.Slots, "_commit", sees)
    tree = Tree(TREE.parents, TREE.ranks, num_lookup=num_lookup)
    requests = [Request([n], Limits(3 + n), tag=n) for n in range(40)][::-1]
    found, _ = answers(decoder_of(backbone, True, tree=tree), requests, 32)
    assert found == alone(backbone, requests)
    beside_next = [is_end for is_at_work, is_end in seen if is_at_work]
    if num_lookup:
        assert not beside_next
    else:
        assert len(beside_next) > 0.3 * len(seen) and any(beside_next)


@FORMS
def test_another_text_in_a_slot_is_run_from_its_beginning(backbone, cuda_graph):
    prompts = [[5, 6, 7], [9, 9], [3]]
    decoder = decoder_of(backbone, cuda_graph)
    waiting = prompts[1:]
    found = []
    for finished in decoder.slots(1, 30).decode([Request(prompts[0], Limits(9), 30)]):
        found.append(finished.response.tokens)
        if waiting:
            finished.next = Request(waiting.pop(0), Limits(9), 30)
    assert found == [decode_plain(backbone, [p], Limits(9))[0].tokens for p in prompts]


@FORMS
@pytest.mark.parametrize("is_plain", [False, True])
def test_draws_do_not_hang_on_the_rest_of_the_batch(backbone, cuda_graph, is_plain):
    rule = AcceptanceRule("sampling", temperature=2.0, seed=0)
    decoder = decoder_of(backbone, cuda_graph, rule)
    requests = requests_of(random.Random(4), 7)
    for request in requests:
        request.seed = 3, request.tag

    def draw(chosen, num_slots):
        tokens, _ = answers(decoder, chosen, num_slots, is_plain=is_plain)
        return dict(zip((request.tag for request in chosen), tokens, strict=True))

    first = draw(requests, 1)
    assert draw(requests, 3) == draw(requests[::-1], 4) == first
    assert draw(requests[4:5], 2)[4] == first[4]
    requests[4].seed = 4, 4
    assert draw(requests, 3)[4] != first[4]


@pytest.mark.skipif(not int8.is_supported(), reason="no fast products of integers")
@pytest.mark.parametrize("draft", ["top", "sampled"])
def test_draws_by_8_bit_heads_do_not_hang_on_the_number_of_slots(backbone, monkeypatch, draft):
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)
    heads = moved(build_heads(backbone, num_heads=3))
    assert int8.to_int8(heads.lm_heads.output_layers())
    rule = AcceptanceRule("sampling", temperature=2.0, seed=0, draft=draft)
    decoder = Decoder(backbone, stack_heads(heads, backbone), TREE, rule, cuda_graph=False)
    requests = requests_of(random.Random(4), 24)
    for request in requests:
        request.seed = 3, request.tag
    # Up to 8 rows are multiplied in integers, 12 in float32.
    one, four, twelve = (answers(decoder, requests, slots)[0] for slots in (1, 4, 12))
    assert one == four == twelve


def test_samples_in_slots_have_the_law_of_plain_sampling():
    """Chi-square of the first two tokens against what the model's probabilities make of them."""
    backbone = Backbone(build_model("llama", vocab_size=4, spread=1.5))
    rule = AcceptanceRule("sampling", seed=0)
    tree = Tree.from_paths([(0,), (1,), (0, 0)])
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), tree, rule, cuda_graph=False)
    number, prompt = 4000, [1, 2, 3]
    counts = torch.zeros(4, 4, dtype=torch.double)
    for finished in decoder.slots(1000, 5).decode(
        Request(prompt, Limits(2), seed=(0, n)) for n in range(number)
    ):
        first, second = finished.response.tokens
        counts[first, second] += 1
    ids = torch.tensor([[*prompt, token] for token in range(4)])
    with torch.inference_mode():
        p_BTV = backbone.model(ids).logits.double().softmax(-1)
    expected = number * p_BTV[0, 2][:, None] * p_BTV[:, 3]
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert expected.min() > 5
    assert statistic < 37.7  # 15 degrees of freedom: one in a thousand is above


def test_the_batch_shrinks_by_halves(backbone, monkeypatch):
    sizes = []
    fit = CapturedSlots.fit

    def notes(source, step, num_rows, num_columns, *moves):
        sizes.append((num_rows, bucket(num_columns)))
        return fit(source, step, num_rows, num_columns, *moves)

    monkeypatch.setattr(CapturedSlots, "fit", notes)
    decoder = decoder_of(backbone, cuda_graph=True)
    requests = [Request([n], Limits(2 + 3 * n), tag=n) for n in range(24)]
    requests.sort(key=lambda request: -request.room)
    found, _ = answers(decoder, requests, 8)
    assert found == alone(backbone, requests)
    assert [rows for rows, _ in sizes if rows] == sorted((r for r, _ in sizes), reverse=True)
    assert {8, 4, 2} <= {rows for rows, _ in sizes} <= {8, 4, 2, 1}
    [source] = decoder._captured_slots.values()
    assert len(source._steps) == len(set(sizes))  # all in the memory of one cache
    base = source._base.layers[0].keys
    for step in source._steps.values():
        assert step.cache.layers[0].keys.data_ptr() == base.data_ptr()
    answers(decoder, requests, 8)
    assert len(source._steps) == len(set(sizes))


def test_sizes_of_steps():
    assert halves(13) == [13, 7, 4, 2, 1]
    assert [bucket(n) for n in (1, 256, 257, 385, 513, 769, 1025)] == [
        *(256, 256, 384, 512, 768, 1024, 1536),
    ]


def lengths_of_chats() -> list[list[tuple[int, int]]]:
    """Return, for each chat, the tokens of what comes before each answer, and of the answer."""
    rng = random.Random(5)
    return [
        [
            (rng.randint(2, 60), min(256, int(rng.lognormvariate(4.6, 0.8)) + 1))
            for _ in range(rng.choice((1, 1, 2, 3)))
        ]
        for _ in range(200)
    ]


def idle_share(chats, num_slots: int, cuda_graph: bool) -> float:
    """Answer chats of such lengths in slots, the longest first; return `Slots.idle_share`."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8192,
    )
    model = AutoModelForCausalLM.from_config(config)
    decoder = Decoder(Backbone(model.eval()), cuda_graph=cuda_graph)
    chats = [chat for chat in chats if sum(map(sum, chat)) < 2000]
    rooms = [sum(map(sum, chat)) for chat in chats]
    order = sorted(range(len(chats)), key=lambda n: (-bucket(rooms[n]), -rooms[n]))

    def request(number, before, turn):
        prompt = before + [1] * chats[number][turn][0]
        return Request(prompt, Limits(chats[number][turn][1]), rooms[number], tag=(number, turn))

    slots = decoder.slots(num_slots, max(rooms), decoder.root_only())
    done = 0
    for finished in slots.decode(request(number, [], 0) for number in order):
        (number, turn), done = finished.request.tag, done + 1
        if turn + 1 < len(chats[number]):
            said = finished.request.prompt + finished.response.tokens
            finished.next = request(number, said, turn + 1)
    assert done == sum(map(len, chats))
    return slots.idle_share


@FORMS
def test_slots_are_busy(cuda_graph):
    assert idle_share(lengths_of_chats()[:80], 8, cuda_graph) < (0.1 if cuda_graph else 0.02)


@pytest.mark.skipif("MEDUSA_EXP_TEST_DATA" not in os.environ, reason="needs chats of yours")
@pytest.mark.parametrize("num_slots", [8, 16, 32])
def test_slots_are_busy_on_real_chats(num_slots):
    path = Path(os.environ["MEDUSA_EXP_TEST_DATA"]) / "chat" / "mix_small_200.json"
    if not path.is_file():
        pytest.skip("there is no chat/mix_small_200.json")
    chats = []
    for conversation in read_conversations(path):
        turns, before = [], 0
        for message in conversation.messages:
            length = len(message.content) // 4 + 1
            if message.role == "assistant":
                turns.append((before + 1, min(length, 256)))
            before = 0 if message.role == "assistant" else before + length
        chats.append(turns)
    share = idle_share([turns for turns in chats if turns], num_slots, cuda_graph=True)
    print(f"{num_slots} slots: idle {share:.3f}")
    assert share <= 0.1


def test_nothing_of_the_last_prompt_stays_in_a_row():
    """A NaN that a mask hides would still be seen: 0 times it is one."""
    cache, prompt = GrowingCache(1, 6, 2), GrowingCache(1, 3, 1)
    for layer, size in ((cache.layers[0], 2), (prompt.layers[0], 1)):
        layer.update(*torch.full((2, size, 1, 3, 2), torch.nan if size == 2 else 1.0))
    prompt.set_lengths([2])
    cache.put([1], prompt)
    assert cache.layers[0].keys[1, 0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert cache.lengths == [0, 2]


def test_room_is_what_memory_has(backbone, monkeypatch, caplog):
    decoder = decoder_of(backbone, cuda_graph=False)
    given = decoder.root_only(), GREEDY
    column = memory.bytes_of_column(backbone)
    assert column == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, float32
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    assert decoder.slots_with_room(64, 1000, *given) == 64 and not caplog.messages
    monkeypatch.setattr(memory, "free_bytes", lambda device: 30_000_000)
    fewer = decoder.slots_with_room(64, 4000, *given)
    assert 1 <= fewer < 30_000_000 / (4000 * column) < 64
    [line] = caplog.messages
    assert f"room for {fewer} of 64 prompts at a time" in line
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(UserError, match=r"no room to decode 4000 tokens: .* needed"):
        decoder.slots_with_room(64, 4000, *given)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert decoder.slots_with_room(64, 4000, *given) == 64


def test_the_free_memory_of_this_machine():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14


def test_prompts_that_cannot_be_answered(backbone):
    decoder = decoder_of(backbone, cuda_graph=False)
    with pytest.raises(UserError, match="no token"):
        list(decoder.slots(2, 40).decode([Request([1], Limits(3)), Request([], Limits(3))]))
    with pytest.raises(UserError, match="the model has 128 positions"):
        list(decoder.slots(2, 400).decode([Request([1] * 127, Limits(3))]))
    [nothing] = decoder.slots(2, 40).decode([Request([1], Limits(0))])
    assert nothing.response.tokens == []
    assert list(decoder.slots(2, 40).decode([])) == []
