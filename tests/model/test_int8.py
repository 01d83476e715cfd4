"""Linear layers in 8-bit integers; `test_families.py` has heads of all kinds draft with them."""

import pytest
import torch
from torch import nn

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.on_cpu import pack_decoder, ready_to_draft
from medusa_exp.model import build_heads, int8
from medusa_exp.model.int8 import Int8Linear, is_supported, to_int8
from medusa_exp.tree import chain

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch without such products")


@pytest.fixture
def anyway(monkeypatch) -> None:
    """Take integers however small a layer is."""
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)


def quantized_layer(inputs: int, outputs: int, *, bias: bool = True) -> tuple:
    """Return a layer, and what it is in integers."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layers = nn.ModuleList([layer])
    assert to_int8(layers)
    assert type(layers[0]) is Int8Linear
    return layer, layers[0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_nearly_what_it_was(anyway, bias):
    layer, ours = quantized_layer(64, 300, bias=bias)
    x = torch.randn(2, 4, 64)
    x[0, 0] *= 1e4  # whose size is not the scale of its neighbors
    x[1, 1] *= 1e-6
    x[1, 2] = 0
    wanted, found = layer(x), ours(x)
    assert found.dtype == torch.float32
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
    assert 0 < error.max() < 0.01
    assert ours(x[:, :0]).shape == (2, 0, 300)


def test_a_row_is_the_same_beside_others(anyway):
    _, ours = quantized_layer(64, 300, bias=False)
    x = torch.randn(8, 64)
    together = ours(x)
    assert torch.equal(torch.cat([ours(row[None]) for row in x]), together)
    assert torch.equal(ours(x.view(2, 4, 64)).view(8, 300), together)
    many = ours(torch.cat([x, x]))  # in float32, and rounded alike
    assert (many[:8] != together).float().mean() < 0.05
    torch.testing.assert_close(many[:8], together, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_of_no_numbers_leaves_the_others_alone(anyway, value):
    _, ours = quantized_layer(64, 4)
    x = torch.ones(2, 64)
    x[0, 3] = value
    assert torch.equal(ours(x)[1], ours(torch.ones(1, 64))[0])


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 1), (96, 5), (32, 33), (640, 3)])
def test_outputs_may_be_of_any_number(anyway, inputs, outputs):
    layer, ours = quantized_layer(inputs, outputs)
    x = torch.randn(3, inputs)
    assert (ours(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_inputs_may_lie_anywhere(anyway):
    layer, ours = quantized_layer(64, 4)
    columns, shifted = torch.randn(64, 3).T, torch.randn(65)[1:].view(1, 64)
    for x in (columns, shifted, columns.bfloat16(), torch.randn(65).bfloat16()[1:].view(1, 64)):
        assert (ours(x) - layer(x.float())).norm() < 0.02 * layer(x.float()).norm()


def test_weights_may_lie_anywhere(anyway):
    layer = nn.Linear(64, 300)
    layer.weight = nn.Parameter(torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).T)
    x = torch.randn(1, 64)
    wanted, layers = layer(x), nn.ModuleList([layer])
    assert to_int8(layers)
    assert (layers[0](x) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("inputs", [1, 16, 40, 100])
def test_inputs_that_the_product_would_read_beyond_are_left_alone(anyway, inputs):
    assert not to_int8(nn.ModuleList([nn.Linear(inputs, 8)]))


def test_a_weight_of_zeros_is_none_of_nan(anyway):
    layer = nn.Linear(32, 4, bias=False)
    nn.init.zeros_(layer.weight)
    layers = nn.ModuleList([layer])
    assert to_int8(layers)
    assert layers[0](torch.ones(1, 32)).tolist() == [[0.0] * 4]


def test_gradients_pass_to_inputs(anyway):
    layer, ours = quantized_layer(64, 3)
    x = torch.randn(2, 64, requires_grad=True)
    ours(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1), rtol=0.02, atol=0.01)


def test_layers_stay_as_they_are_where_integers_are_no_help(monkeypatch):
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
    assert not to_int8(layers)  # too small
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)
    assert not to_int8(nn.ModuleList([*layers, nn.Identity()]))
    assert not to_int8(nn.ModuleList())
    assert not to_int8(nn.ModuleList([nn.Linear(64, 64).bfloat16()]))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert not to_int8(layers)
    with monkeypatch.context() as later:  # a torch without the operator
        later.setattr(torch.ops, "aten", object())
        assert not to_int8(layers)
    assert all(type(layer) is nn.Linear for layer in layers)
    assert to_int8(layers)


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("kind", ["medusa", "recurrent"])
def test_who_decodes_decides(backbone, anyway, kind, is_on, tmp_path):
    heads = build_heads(backbone, num_heads=2, kind=kind).requires_grad_(False)
    ready = ready_to_draft(heads, backbone, in_int8=is_on)
    pack_decoder(Decoder(backbone, ready, chain(2)), str(tmp_path))
    assert {isinstance(one, Int8Linear) for one in heads.lm_heads.output_layers()} == {is_on}
