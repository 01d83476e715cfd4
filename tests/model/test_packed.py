"""Packed linear layers say what the layers say, and can be made what they were."""

import pytest
import torch
from tiny_models import build_model
from torch import nn

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.model import Backbone, build_heads, packed
from medusa_exp.model.packed import PackedLinear, pack, unpack
from medusa_exp.stages.session import pack_decoder
from medusa_exp.tree import Tree, chain

ALWAYS, NEVER, WIDE = [True] * 4, [False] * 4, [False, True, True, True]
pytestmark = pytest.mark.skipif(packed._operators() is None, reason="torch without oneDNN")


@pytest.fixture
def choose(monkeypatch):
    """Return what says which form is faster, in place of a measurement."""

    def choose(uses: list[bool], fewest: int = 0) -> list[int]:
        asked: list[int] = []
        monkeypatch.setattr(packed, "_FEWEST", fewest)
        monkeypatch.setattr(
            packed, "_compare", lambda layers, *_: asked.append(len(layers)) or uses
        )
        return asked

    return choose


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48, bias=False), nn.Linear(48, 48))
    return made.requires_grad_(False)


@pytest.mark.parametrize("uses", [ALWAYS, WIDE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_same_and_unpacking_is_exact(choose, layers, uses, dtype):
    choose(uses)
    layers.to(dtype)
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    inputs = [torch.randn(shape).to(dtype) for shape in ((1, 48), (2, 9, 48), (300, 48), (0, 48))]
    expected = [layers(x) for x in inputs]
    pack([layers])
    assert all(isinstance(layer, PackedLinear) for layer in layers)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(layers(x), y, **tolerance)
    assert (layers[0]._parameters["weight"] is None) == (uses == ALWAYS)
    saved = layers.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert torch.equal(layers[0].weight, before["0.weight"])  # made anew where it is gone
    unpack([layers])
    assert {type(layer) for layer in layers} == {nn.Linear}
    assert list(layers.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_a_row_does_not_depend_on_those_beside_it(choose, layers):
    choose(ALWAYS)
    pack([layers])
    x = torch.randn(64, 48)
    assert torch.equal(layers(x), torch.cat([layers(rows) for rows in x.split((1, 7, 16, 40))]))
    many = nn.Sequential(nn.Linear(4096, 64)).requires_grad_(False)
    pack([many])
    x = torch.randn(64, 4096)
    assert torch.equal(many(x), torch.cat([many(rows) for rows in x.split((2, 6, 16, 40))]))
    torch.testing.assert_close(many(x[:1]), many(x)[:1])


def test_each_number_of_rows_takes_the_form_measured_for_it(choose, layers, monkeypatch):
    choose([False, False, True, False])
    pack([layers[0]])
    seen, product = [], packed._product
    monkeypatch.setattr(
        packed, "_product", lambda x, *rest: seen.append(len(x)) or product(x, *rest)
    )
    for rows in (1, 2, 12, 13, 24, 25, 64, 300):
        layers[0](torch.randn(rows, 48))
    assert seen == [13, 24]


def test_a_packed_call_counts_for_more_than_it_takes(monkeypatch):
    monkeypatch.setattr(packed, "_ROWS", (1, 8))
    layer = nn.Linear(64, 64).requires_grad_(False)
    times = iter([3e-5, 2.5e-5] * 2 * packed._TRIES)
    monkeypatch.setattr(packed, "_seconds", lambda *_: next(times))
    assert packed._compare([layer], lambda weight: weight, 10.0) == [False, False]
    monkeypatch.setattr(packed, "_MOST", 64 * 8)  # an eighth of the layer: an eighth of the call
    times = iter([3e-5, 2.5e-5] * 2 * packed._TRIES)
    assert packed._compare([layer], lambda weight: weight, 10.0) == [True, True]


def test_gradients_and_autocast_take_the_weights_as_they_were(choose, layers):
    choose(ALWAYS)
    x = torch.randn(4, 48, requires_grad=True)
    layers(x).sum().backward()
    expected, x.grad = x.grad, None
    pack([layers])
    layers(x).sum().backward()
    assert torch.equal(x.grad, expected)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layers(x).dtype == torch.bfloat16


def test_what_is_faster_is_measured_once_for_a_shape_and_machine(choose, layers, tmp_path):
    asked = choose(WIDE)
    for _ in range(2):
        pack([layers], tmp_path)
        unpack([layers])
    assert asked == [1, 1, 1]
    pack([nn.Linear(48, 80).requires_grad_(False)], tmp_path)  # other shapes, another entry
    assert len(asked) == 4


def test_a_measurement_finds_one_of_the_two_forms_for_each_number_of_rows(layers):
    uses = packed._compare([layers[0], layers[0]], packed._operators(), 0.01)
    assert len(uses) == len(ALWAYS) and set(uses) <= {True, False}


def test_small_layers_and_those_that_do_not_gain_are_left(choose, layers):
    choose(NEVER)
    pack([layers])
    choose(ALWAYS, fewest=48 * 80)
    pack([layers[2]])
    assert not any(isinstance(layer, PackedLinear) for layer in layers)
    packed_one = nn.Sequential(nn.Linear(48, 80))  # it would be trained
    pack([packed_one])
    assert type(packed_one[0]) is nn.Linear


def test_without_the_operators_nothing_happens(choose, layers, monkeypatch):
    choose(ALWAYS)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    pack([layers])
    assert {type(layer) for layer in layers} == {nn.Linear}


@pytest.mark.parametrize("kind", ["medusa", "medusa_tied", "recurrent"])
@pytest.mark.parametrize("uses", [ALWAYS, WIDE])
@torch.inference_mode()
def test_decoding_says_the_same_tokens(choose, kind, uses):
    choose(uses)
    backbone = Backbone(build_model("llama"))
    heads = build_heads(backbone, num_heads=2, num_layers=1, kind=kind).requires_grad_(False)
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0]])
    decoder = Decoder(backbone, heads, tree, limits=Limits(12, frozenset()))
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    expected = [response.tokens for response in decoder.decode_plain(prompts)]
    fingerprints = backbone.identity(), backbone.weights_fingerprint()
    backbone.remember_fingerprints()
    pack([backbone.model, decoder.heads], kept=[backbone.lm_head])
    number = sum(isinstance(module, PackedLinear) for module in backbone.model.modules())
    assert number == 7 * backbone.num_layers + 1
    assert [response.tokens for response in decoder.decode_plain(prompts)] == expected
    assert [response.tokens for response in decoder.decode(prompts)] == expected
    assert (backbone.identity(), backbone.weights_fingerprint()) == fingerprints
    assert backbone.lm_head._parameters["weight"] is not None
    unpack([backbone.model])
    assert (Backbone(backbone.model).weights_fingerprint()) == fingerprints[1]


def test_heads_are_packed_as_they_are_loaded_and_still_say_their_type(choose, tmp_path):
    choose(ALWAYS)
    backbone = Backbone(build_model("llama"))
    heads = build_heads(backbone, num_heads=2, num_layers=1, kind="recurrent", bias=False)
    pack_decoder(Decoder(backbone, heads, chain(2)), str(tmp_path))
    assert sum(isinstance(module, PackedLinear) for module in heads.modules()) == 4
    assert heads.dtype == torch.float32
