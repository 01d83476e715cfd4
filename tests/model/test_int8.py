"""Linear layers in 8-bit integers; `test_families.py` has heads of all kinds draft with them."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from medusa_exp.config import Config, DecodeConfig
from medusa_exp.decode.decoder import Decoder
from medusa_exp.model import build_heads, int8
from medusa_exp.model.int8 import Int8Linear, is_supported, to_int8
from medusa_exp.stages.session import pack_decoder, ready_to_draft
from medusa_exp.tree import chain

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch without such products")


@pytest.fixture
def anyway(monkeypatch) -> None:
    """Take integers however small a layer is."""
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)


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
    assert 0 < error.max() < 0.01
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


def test_a_row_is_the_same_beside_others(anyway):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 300).requires_grad_(False), torch.randn(8, 64)
    assert to_int8([layer])
    together = layer(x)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)
    assert torch.equal(layer(x.view(2, 4, 64)).view(8, 300), together)


def test_inputs_that_ask_for_gradients_take_the_weights(anyway):
    layer = nn.Linear(64, 3)
    assert to_int8([layer])
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, -1))


def test_layers_stay_as_they_are_where_integers_are_no_help(monkeypatch):
    layers = [nn.Linear(64, 64) for _ in range(2)]
    assert not to_int8(layers)  # too small
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)
    assert not to_int8([*layers, nn.Identity()])
    assert not to_int8([])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert not to_int8(layers)
    with monkeypatch.context() as later:  # a torch without the operator
        later.delattr(torch.ops.aten, "_weight_int8pack_mm")
        later.setattr(torch.ops, "aten", object())
        assert not to_int8(layers)
    assert all(type(layer) is nn.Linear for layer in layers)
    assert to_int8(layers)


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("kind", ["medusa", "recurrent"])
def test_the_config_decides(backbone, anyway, kind, is_on, tmp_path):
    heads = build_heads(backbone, num_heads=2, kind=kind).requires_grad_(False)
    saved = {name: value.clone() for name, value in heads.state_dict().items()}
    config = Config(decode=DecodeConfig(int8_heads=is_on))
    ready = ready_to_draft(heads, backbone, config)
    pack_decoder(Decoder(backbone, ready, chain(2)), str(tmp_path))
    assert {isinstance(one, Int8Linear) for one in heads.lm_heads.output_layers()} == {is_on}
    assert all(torch.equal(heads.state_dict()[name], saved[name]) for name in saved)
