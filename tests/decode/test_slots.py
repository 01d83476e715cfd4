"""Continuous batching answers every request as if it were alone, and keeps the batch full."""

import random

import pytest
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits, decode_plain
from medusa_exp.decode.slots import Request
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])
FORMS = pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "fixed"])


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


@FORMS
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equal_to_one_by_one(architecture, cuda_graph):
    backbone = Backbone(build_model(architecture))
    decoder = Decoder(backbone, build_heads(backbone, num_heads=3), TREE, cuda_graph=cuda_graph)
    rng = random.Random(architecture)
    requests = requests_of(rng, 14)
    expected = alone(backbone, requests)
    for num_slots in (1, 3, 5):
        assert answers(decoder, requests, num_slots)[0] == expected
        assert answers(decoder, requests, num_slots, is_plain=True)[0] == expected
