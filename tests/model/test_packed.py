"""Packed linear layers say what the layers say, and can be made what they were."""

import pytest
import torch
from tiny_models import build_model
from torch import nn
from torch.nn.functional import linear

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.on_cpu import pack_decoder
from medusa_exp.model import Backbone, build_heads, packed
from medusa_exp.model.heads import layers as layers_of_heads
from medusa_exp.model.int8 import Int8Linear
from medusa_exp.model.packed import PackedLinear, pack, unpack
from medusa_exp.tree import Tree, chain

ALWAYS, NEVER, WIDE = [True] * 4, [False] * 4, [False, True, True, True]
pytestmark = pytest.mark.skipif(not packed._packs(torch.float32), reason="torch without oneDNN")
needs_bfloat16 = pytest.mark.skipif(
    not packed._packs(torch.bfloat16), reason="torch packs no bfloat16 on this processor"
)


@pytest.fixture
def choose(monkeypatch):
    """Return what says which form is faster, in place of a measurement."""

    def choose(uses: list[bool], fewest: int = 0) -> list[int]:
        asked: list[int] = []
        monkeypatch.setattr(packed, "_FEWEST", fewest)

        def measured(found):
            asked.extend(map(len, found.values()))
            return {packed._key(shape): uses for shape in found}

        monkeypatch.setattr(packed, "_measured", measured)
        return asked

    return choose


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48, bias=False), nn.Linear(48, 48))
    return made.requires_grad_(False)


@pytest.mark.parametrize("uses", [ALWAYS, WIDE])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
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


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # by rows, then by shape: as they are, packed
        (
            [([2, 9], [3, 8]), ([9, 9], [5, 9.5]), ([9, 9], [8.9, 8.9]), ([9, 9], [9.8, 10])],
            [[False, True, False, True], [True, False, False, False]],
        ),
        # prompts alone gain by the second
        (
            [([9, 9], [9, 9.1]), ([9, 9], [5, 9.5]), ([9, 9], [5, 9.5]), ([9, 9], [1, 1])],
            [[True, True, True, True], [False] * 4],
        ),
        # one row, and many, gain; those of trees too little
        (
            [([9, 9], [1, 1]), ([9, 9], [8.5, 9.5]), ([9, 9], [9, 9]), ([9, 9], [1, 1])],
            [[False] * 4, [False] * 4],
        ),
    ],
)
def test_packed_weights_are_used_where_a_whole_step_gains(layers, monkeypatch, seconds, expected):
    found = {packed._shape(layer): [layer] for layer in layers[:2]}
    times = iter(tuple(map(torch.tensor, pair)) for pair in seconds)
    monkeypatch.setattr(packed, "_times", lambda *_: next(times))
    uses = packed._measured(found)
    assert uses == dict(zip(map(packed._key, found), expected, strict=True))


def test_shapes_take_turns_and_stand_for_all_their_weights(monkeypatch):
    monkeypatch.setattr(packed, "_MOST", 64 * 64)
    monkeypatch.setattr(packed, "_SECONDS", 1000.0)
    small = [nn.Linear(16, 64).requires_grad_(False) for _ in range(6)]  # four of six
    large = [nn.Linear(64, 256).requires_grad_(False) for _ in range(3)]  # a quarter of the first
    shapes = [packed._Sample.of(group) for group in (small, large)]
    assert [one.factor for one in shapes] == [1.5, 12.0]
    asked = []
    took = {linear: 1.0, packed._product: 0.5}

    def seconds(_, call):
        x, weight, _bias = call.args
        asked.append((call.func, x.shape[1], len(weight)))
        return took[call.func] + len(asked) * 1e-9

    monkeypatch.setattr(packed, "_seconds", seconds)
    monkeypatch.setattr(packed, "_CALL", 0.1)
    plain_S, ours_S = packed._times(shapes, 8)
    once = [(16, 64), (64, 64), (16, 64), (16, 64), (16, 64)]
    assert asked == [(f, *one) for f in (linear, packed._product) for one in once] * packed._TRIES
    assert plain_S.tolist() == pytest.approx([6.0, 12.0])
    assert ours_S.tolist() == pytest.approx([6 * 0.6, 12 * 0.525])  # of a quarter a part of a call


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


def test_a_measurement_finds_one_of_the_two_forms_for_each_number_of_rows(layers, monkeypatch):
    monkeypatch.setattr(packed, "_SECONDS", 0.01)
    (uses,) = packed._measured({packed._shape(layers[0]): [layers[0]] * 2}).values()
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
    backbone.names.keep()
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
    assert sum(isinstance(module, PackedLinear) for module in heads.modules()) == 5
    assert heads.dtype == torch.float32


@needs_bfloat16
@torch.inference_mode()
def test_large_layers_of_stacked_heads_in_a_half_type_are_packed(choose, monkeypatch, tmp_path):
    choose(ALWAYS)
    monkeypatch.setattr(layers_of_heads, "_LARGE", 0)
    monkeypatch.setattr(layers_of_heads, "is_faster_unbatched", lambda layers: True)
    backbone = Backbone(build_model("llama").bfloat16())
    heads = build_heads(backbone, num_heads=3, num_layers=1, kind="medusa").bfloat16()
    for parameter in heads.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    decoder = Decoder(backbone, heads, chain(3))
    hidden_BD = torch.randn(2, 32).bfloat16()
    expected_BKV = decoder.heads(hidden_BD)
    pack_decoder(decoder, tmp_path)
    packed_layers = [m for m in decoder.heads.modules() if isinstance(m, PackedLinear)]
    assert len(packed_layers) == 6
    assert all(layer._parameters["weight"] is None for layer in packed_layers)
    torch.testing.assert_close(decoder.heads(hidden_BD), expected_BKV, rtol=0.05, atol=0.05)


def test_what_int8_heads_have_in_float32_is_not_packed(choose, tmp_path):
    choose(ALWAYS)
    backbone = Backbone(build_model("llama"))
    heads = build_heads(backbone, num_heads=2, num_layers=1, kind="medusa")
    for place, layer in enumerate(heads.lm_heads):
        heads.lm_heads[place] = Int8Linear(layer)
    decoder = Decoder(backbone, heads, chain(2))
    pack_decoder(decoder, tmp_path)
    assert all(type(one.in_float) is nn.Linear for one in heads.lm_heads)


def test_a_type_that_torch_does_not_pack_here_is_left(choose, layers, monkeypatch):
    choose(ALWAYS)
    packs = lambda dtype: dtype == torch.float32  # noqa: E731
    monkeypatch.setattr(packed, "_packs", packs)
    layers[1].to(torch.bfloat16)
    pack([layers])
    assert [type(layer) for layer in layers] == [PackedLinear, nn.Linear, PackedLinear]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_by_one_is_timed_against_batched(dtype, monkeypatch):
    layers = [nn.Linear(64, 96).to(dtype) for _ in range(3)]
    batched_takes = 2.0

    def seconds(_, call):
        call()
        return batched_takes if getattr(call, "func", None) is torch.bmm else 1.0

    monkeypatch.setattr(packed, "_seconds", seconds)
    assert packed.is_faster_unbatched(layers)
    batched_takes = 0.5
    assert not packed.is_faster_unbatched(layers)
