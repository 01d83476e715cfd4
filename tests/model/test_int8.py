"""Projections in 8-bit integers: nearly what they were, and no answer changes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.model import build_heads, int8
from medusa_exp.model.heads import stack_heads
from medusa_exp.model.int8 import Int8Linear, to_int8
from medusa_exp.tree import Tree

pytestmark = pytest.mark.skipif(not int8._is_supported(), reason="torch without such products")

FAMILIES = {
    "medusa": {"kind": "medusa"},
    "medusa_lowrank": {"kind": "medusa_lowrank", "num_tokens": 48},
    "of a rank": {"kind": "medusa_lowrank", "rank": 32},
    "rooted": {"kind": "rooted"},
    "hydra": {"kind": "hydra"},
    "recurrent": {"kind": "recurrent"},
    "recurrent, one": {"kind": "recurrent", "own_projections": False},
}


@pytest.fixture
def anyway(monkeypatch) -> None:
    """Take integers however small a layer is, and however slow they are."""
    monkeypatch.setattr(int8, "_FEWEST", 1)
    monkeypatch.setattr(int8, "_is_faster", lambda *_: True)


def moved_heads(backbone, **family):
    draws = torch.Generator().manual_seed(0)
    counts = torch.rand(backbone.vocab_size, generator=draws)
    heads = build_heads(backbone, num_heads=3, token_counts=counts, **family)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.2)
    return heads.eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_nearly_what_it_was(anyway, bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 300, bias=bias).to(dtype)
    before = dict(layer.state_dict())
    x = torch.randn(2, 4, 64).to(dtype)
    x[0, 0] *= 1e4  # whose size is not the scale of its neighbors
    x[1, 1] *= 1e-6
    x[1, 2] = 0
    wanted = linear(x.float(), layer.weight.float(), None if not bias else layer.bias.float())
    assert to_int8([layer])
    found = layer(x)
    assert type(layer) is Int8Linear
    assert found.dtype == dtype
    error = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
    assert 0 < error.max() < 0.02
    many = torch.randn(9, 64).to(dtype)
    assert torch.equal(layer(many), linear(many, layer.weight, layer.bias))
    assert layer(many[:0]).shape == (0, 300)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_of_no_numbers_leaves_the_others_alone(anyway, value):
    layer = nn.Linear(64, 4)
    assert to_int8([layer])
    x = torch.ones(2, 64)
    x[0, 3] = value
    assert torch.equal(layer(x)[1], layer(torch.ones(1, 64))[0])


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 1), (96, 5), (32, 33), (640, 3)])
def test_outputs_may_be_of_any_number(anyway, inputs, outputs):
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs), torch.randn(3, inputs)
    wanted = layer(x).detach()
    assert to_int8([layer])
    assert (layer(x) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("inputs", [1, 16, 40, 100])
def test_inputs_that_the_product_would_read_beyond_are_left_alone(anyway, inputs):
    assert not to_int8([nn.Linear(inputs, 8)])


def test_a_weight_of_zeros_is_none_of_nan(anyway):
    layer = nn.Linear(32, 4, bias=False)
    nn.init.zeros_(layer.weight)
    assert to_int8([layer])
    assert layer(torch.ones(1, 32)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_changes(backbone, anyway, name):
    heads = moved_heads(backbone, **FAMILIES[name])
    hidden_BD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    is_parallel = not heads.is_sequential
    root_B = torch.arange(5)
    wanted = heads(hidden_BD, None, root_B) if is_parallel else None
    assert to_int8(heads.lm_heads.wide())
    ready = stack_heads(heads, backbone)
    if wanted is not None:
        found, kept = ready(hidden_BD, None, root_B), wanted > -torch.inf
        assert torch.equal(found > -torch.inf, kept)
        assert (found[kept] - wanted[kept]).norm() < 0.02 * wanted[kept].norm()
        assert torch.equal(ready(hidden_BD, 2, root_B), found[:, :2])
        assert torch.equal(ready(hidden_BD[:1], None, root_B[:1]), found[:1])
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 0, 0], [0, 1]])
    decoder = Decoder(backbone, ready, tree, limits=Limits(24))
    prompts = [[1, 2, 3], [7, 5]]
    plain = [answer.tokens for answer in decoder.decode_plain(prompts)]
    assert [answer.tokens for answer in decoder.decode(prompts)] == plain


def test_heads_stay_as_they_are_where_integers_are_no_help(backbone, monkeypatch):
    monkeypatch.setattr(int8, "_is_faster", lambda *_: True)
    heads = moved_heads(backbone)
    assert not to_int8(heads.lm_heads.wide())  # too small
    monkeypatch.setattr(int8, "_FEWEST", 1)
    assert not to_int8([*heads.lm_heads.wide(), nn.Identity()])
    monkeypatch.setattr(int8, "_is_faster", lambda *_: False)
    assert not to_int8(heads.lm_heads.wide())
    monkeypatch.setattr(int8, "_is_faster", lambda *_: True)
    monkeypatch.setattr(int8, "_is_supported", lambda: False)
    assert not to_int8(heads.lm_heads.wide())
    assert all(type(layer) is nn.Linear for layer in heads.lm_heads.wide())
    tied = moved_heads(backbone, kind="medusa_tied")
    assert not to_int8(tied.lm_heads.wide())


def test_which_is_faster_is_measured(monkeypatch):
    layers = [nn.Linear(64, 64, bias=False) for _ in range(2)]
    rounded = [int8._rounded(layer.weight.detach()) for layer in layers]
    monkeypatch.setattr(int8, "_WORTH", 1e9)
    assert int8._is_faster(layers, rounded)
    monkeypatch.setattr(int8, "_WORTH", 0)
    assert not int8._is_faster(layers, rounded)
