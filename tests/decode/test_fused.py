"""Products of one input become one, on the same weights, and say what they said."""

import operator

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_model
from torch import nn
from torch.nn.functional import linear

from medusa_exp.decode import compiled
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.fused import fuse, groups_of, join
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.model import Backbone


class Mlp(nn.Module):
    """Gate and up, and queries with keys and values of another input."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 6, bias=bias)
        self.up_proj = nn.Linear(8, 6, bias=bias)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n, bias=False) for n in (6, 2, 2))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        crossed = self.q_proj(x) * self.k_proj(other).sum() * self.v_proj(other).sum()
        return self.up_proj(x) * self.gate_proj(x).sigmoid() + crossed


@pytest.fixture
def counted(monkeypatch):
    """Products of each graph that is made."""
    torch._dynamo.reset()
    found = []

    def counting(graph, groups):
        fuse(graph, groups)
        found.append(sum(node.target is linear for node in graph.graph.nodes))

    monkeypatch.setattr(compiled, "fuse", counting)
    yield found
    torch._dynamo.reset()


def compiling(backbone: Backbone) -> Decoder:
    decoder = Decoder(backbone, cuda_graph=True)
    decoder.layers = CompiledLayers(backbone, "aot_eager")
    return decoder


def tokens_of(decoder: Decoder) -> list[int]:
    return decoder.decode_plain([[3, 4, 5]], Limits(12))[0].tokens


def run_compiled(layer: nn.Module, *given: torch.Tensor) -> torch.Tensor:
    joined = tuple(group.paths for group in groups_of(layer) if group.lies_joined(layer))
    call, _ = compiled._compiler("aot_eager", joined)
    with torch.inference_mode():
        return call(layer, given, {})


@pytest.mark.parametrize(
    ("architecture", "products"),
    [("llama", 4), ("qwen2", 4), ("qwen3", 4), ("mistral", 4), ("phi3", 4), ("gpt_neox", 4)],
)
def test_a_layer_has_one_product_for_each_input(architecture, products, counted):
    backbone = Backbone(build_model(architecture))  # qwen2: with biases
    expected = decode_plain(backbone, [[3, 4, 5]], Limits(12))[0].tokens
    assert tokens_of(compiling(backbone)) == expected
    assert counted == [products]


def test_joined_weights_are_what_they_were_and_held_once(tmp_path):
    model = build_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    join(model.model.layers)
    for layer in model.model.layers:
        assert [group.lies_joined(layer) for group in groups_of(layer)] == [True, True]
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    [memory] = {part.untyped_storage().data_ptr() for part in parts}
    assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    join(model.model.layers)  # which leaves what lies joined where it is
    assert parts[0].data_ptr() == memory
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_only_products_of_one_input_are_fused(counted):
    layer = Mlp()
    join([layer])
    x, other = torch.randn(2, 3, 8)
    expected = layer(x, other)
    assert [group.paths for group in groups_of(layer)] == [
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    ]
    torch.testing.assert_close(run_compiled(layer, x, other), expected)
    assert counted == [4]  # of five; gate and up are called in the other order


def test_layers_of_a_kind_of_which_one_lies_joined_say_what_they_say(counted):
    layers, given = [Mlp() for _ in range(3)], torch.randn(2, 3, 8)
    join(layers[:2])
    for layer in [*layers, *layers]:
        torch.testing.assert_close(run_compiled(layer, *given), layer(*given))
    assert counted == [4, 5]  # the second of the joined is given the graph of the first


def test_weights_that_were_moved_have_products_of_their_own(counted):
    layer, given = Mlp(), torch.randn(2, 3, 8)
    join([layer])
    run_compiled(layer, *given)
    layer.gate_proj.weight.data = layer.gate_proj.weight + 1
    torch.testing.assert_close(run_compiled(layer, *given), layer(*given))
    join([layer])
    layer.up_proj = nn.Linear(8, 6)  # what lies behind gate is not its weight any more
    torch.testing.assert_close(run_compiled(layer, *given), layer(*given))
    assert counted == [4, 5]


def test_a_projection_that_is_replaced_while_decoding(backbone, counted):
    decoder = compiling(backbone)
    tokens_of(decoder)
    for layer in backbone.body.layers:
        for parent, name in ((layer.self_attn, "k_proj"), (layer.mlp, "up_proj")):
            old = getattr(parent, name)
            setattr(parent, name, nn.Linear(old.in_features, old.out_features, bias=False))
    expected = decode_plain(backbone, [[3, 4, 5]], Limits(12))[0].tokens
    assert tokens_of(decoder) == expected
    assert counted == [4, 7]


def drawn(linear_: nn.Linear) -> torch.Tensor:
    return torch.randn(linear_.out_features)


CHANGES = {
    "another bias": lambda a: setattr(a.v_proj, "bias", nn.Parameter(drawn(a.v_proj))),
    "no bias": lambda a: setattr(a.k_proj, "bias", None),
    "another bias's memory": lambda a: setattr(a.k_proj.bias, "data", drawn(a.k_proj)),
    "turned": lambda a: setattr(a.q_proj.weight, "data", a.q_proj.weight.data.t()),
    "a wrapper": lambda a: setattr(a, "q_proj", nn.Sequential(a.q_proj)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_while_decoding_is_seen(change, counted):
    backbone = Backbone(build_model("qwen2"))
    decoder = compiling(backbone)
    tokens_of(decoder)
    for layer in backbone.body.layers:
        CHANGES[change](layer.self_attn)
    expected = decode_plain(backbone, [[3, 4, 5]], Limits(12))[0].tokens
    assert tokens_of(decoder) == expected and not decoder.layers.is_refused


def test_a_part_that_is_gone_or_of_another_kind(counted):
    backbone = Backbone(build_model("llama"))
    decoder = compiling(backbone)
    tokens_of(decoder)
    for layer in backbone.body.layers:
        layer.mlp = nn.Linear(layer.mlp.gate_proj.in_features, layer.mlp.down_proj.out_features)
    expected = decode_plain(backbone, [[3, 4, 5]], Limits(12))[0].tokens
    assert tokens_of(decoder) == expected

    class Own(torch.Tensor):
        """As libraries keep quantized weights, in a layer that stays a Linear."""

    layer = Mlp()
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.data.as_subclass(Own))
    join([layer])
    assert [group.lies_joined(layer) for group in groups_of(layer)] == [True, False]


def test_weights_can_be_trained_and_loaded_on_when_they_lie_joined():
    layer, plain = Mlp(), Mlp()
    plain.load_state_dict(layer.state_dict())
    join([layer])
    given = torch.randn(2, 3, 8)
    for one in (layer, plain):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        one(*given).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(*given), plain(*given))
    assert all(group.lies_joined(layer) for group in groups_of(layer))
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(Mlp().state_dict())
    assert all(group.lies_joined(layer) for group in groups_of(layer))


def test_what_differs_or_is_tied_is_not_joined(counted):
    layer = Mlp()
    layer.up_proj = nn.Linear(8, 6, bias=False)  # gate has one
    layer.v_proj.weight = layer.k_proj.weight
    given = torch.randn(2, 3, 8)
    join([layer])
    assert not any(group.lies_joined(layer) for group in groups_of(layer))
    torch.testing.assert_close(run_compiled(layer, *given), layer(*given))
    assert counted == [5]

    class Own(nn.Linear):
        """Of a library that quantizes, say."""

    layer.up_proj = Own(8, 6)
    assert len(groups_of(layer)) == 1
    one, other = Mlp(), Mlp()
    other.k_proj.weight = one.k_proj.weight  # layers that share a weight
    join([one, other])
    assert [group.lies_joined(one) for group in groups_of(one)] == [True, True]
    assert [group.lies_joined(other) for group in groups_of(other)] == [False, True]
    before = [group.place(layer) for layer in (one, other) for group in groups_of(layer)]
    join([one, other])
    assert before == [g.place(layer) for layer in (one, other) for g in groups_of(layer)]


def test_weights_of_inference_mode_stay_where_they_are():
    with torch.inference_mode():
        layer = Mlp()
    join([layer])
    assert not any(group.lies_joined(layer) for group in groups_of(layer))
    layer.gate_proj(torch.randn(1, 8))


def test_products_that_are_not_just_two_by_two_weights_stay(counted):
    class Twice(Mlp):
        def forward(self, x):
            return self.gate_proj(self.gate_proj(x) @ self.up_proj.weight) + self.gate_proj(x)

    class Changed(Mlp):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def forward(self, x):
            x = x + 0
            found = self.gate_proj(x)
            self.change(x)
            return found + self.up_proj(x)

    changes = (
        lambda x: x.add_(1),
        lambda x: x[..., :4].add_(1),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.nn.functional.relu(x, inplace=True),
        lambda x: x.__setitem__((..., 0), 1.0),
        lambda x: operator.iadd(x, 1),
    )
    given = torch.randn(3, 8)
    for layer, products in ((Twice(), 3), *((Changed(change), 2) for change in changes)):
        join([layer])
        expected = layer(given)
        torch.testing.assert_close(run_compiled(layer, given), expected)
        assert counted.pop() == products
