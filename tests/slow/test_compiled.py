"""Compiled layers on many architectures: the tokens of eager ones. `nox -s compiled`.

Tiny random models in float32. For those most in use inductor writes and compiles the code, and no
graph break is allowed; others are traced alone (aot_eager), and what cannot be is run as it is.
"""

import random

import pytest
import torch
from architectures import DECODED, NEW_TOKENS, WHOLE, Oracle, V, build, kinds_of_layers

from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.slots import Request
from medusa_exp.model import Backbone
from medusa_exp.tree import Tree, chain

OTHERS = {
    name: changed
    for name, changed in {**DECODED, "gpt2": DECODED["gpt_bigcode"], "phi": {}}.items()
    if name not in WHOLE
}
TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [2]])


@pytest.fixture(autouse=True)
def compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(name: str, changed: dict, backend: str) -> Decoder:
    """Decode plainly and over two trees, in batches of two sizes, and in slots."""
    backbone = Backbone(build(name, changed))
    rng = random.Random(name)
    prompts = [[rng.randrange(3, V) for _ in range(length)] for length in (7, 1, 30)]
    limits = Limits(NEW_TOKENS)
    expected = [a.tokens for a in decode_plain(backbone, prompts, limits)]
    decoder = Decoder(backbone, Oracle(expected), TREE, cuda_graph=True)
    decoder.layers = CompiledLayers(backbone, backend)
    for count in (3, 2):
        plain = decoder.decode_plain(prompts[:count], limits)
        trees = [decoder.decode(prompts[:count], limits, tree=tree) for tree in (TREE, chain(2))]
        for found in (plain, *trees):
            assert [a.tokens for a in found] == expected[:count]
    many = prompts * 6  # as in few slots prompts run one by one
    longest = max(map(len, prompts)) + NEW_TOKENS
    requests = [Request(prompt, limits, longest, tag=row) for row, prompt in enumerate(many)]
    slots = decoder.slots(len(many), longest, decoder.root_only())
    found = {one.request.tag: one.response.tokens for one in slots.decode(requests)}
    assert [found[row] for row in range(len(many))] == expected * 6
    return decoder


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", WHOLE)
def test_most_are_compiled_whole_and_once(name):
    decoder = check(name, WHOLE[name], "inductor")
    assert not decoder.layers.is_refused
    # For single tokens, for trees, and for prompts that run together.
    assert decoder.layers.num_graphs == 2 + kinds_of_layers(decoder.backbone.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_others_say_the_same(name):
    layers = check(name, OTHERS[name], "aot_eager").layers
    assert layers.is_refused or 0 < layers.num_graphs <= 12
