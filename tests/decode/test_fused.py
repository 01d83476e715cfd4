"""Products of one input become one, on the same weights, and say what they said."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_model
from torch import nn
from torch.nn.functional import linear

from medusa_exp.decode import compiled
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.fused import Group, fuse, groups_of
from medusa_exp.decode.loop import Limits, decode_plain
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
    joined = tuple(group.paths for group in groups_of(layer) if group.join())
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
    for layer in model.model.layers:
        assert all(group.join() for group in groups_of(layer))
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    [memory] = {part.untyped_storage().data_ptr() for part in parts}
    assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    place = memory
    for group in groups_of(model.model.layers[0]):
        assert group.join()  # which leaves what lies joined where it is
    assert parts[0].data_ptr() == place
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_only_products_of_one_input_are_fused(counted):
    layer = Mlp()
    x, other = torch.randn(2, 3, 8)
    expected = layer(x, other)
    assert [group.paths for group in groups_of(layer)] == [
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    ]
    torch.testing.assert_close(run_compiled(layer, x, other), expected)
    assert counted == [4]  # of five; gate and up are called in the other order


def test_weights_that_were_moved_are_joined_again(counted):
    layer, other = Mlp(), Mlp()
    given = torch.randn(2, 3, 8)
    run_compiled(layer, *given)
    for weight in layer.parameters():
        weight.data = weight.data + 1
    torch.testing.assert_close(run_compiled(layer, *given), layer(*given))
    # Another of the same kind is given the same graph.
    torch.testing.assert_close(run_compiled(other, *given), other(*given))
    assert counted == [4]


def test_layers_that_differ_are_not_joined(counted):
    layer = Mlp()
    layer.up_proj = nn.Linear(8, 6, bias=False)
    given = torch.randn(2, 3, 8)
    assert not groups_of(layer)[1].join()
    torch.testing.assert_close(run_compiled(layer, *given), layer(*given))
    assert counted == [5]
    assert not Group(("a", "b"), (nn.Linear(8, 6), nn.Linear(8, 6).double())).join()
    assert not Group(("a", "b"), (nn.Linear(8, 6), nn.Linear(4, 6))).join()

    class Own(nn.Linear):
        """Of a library that quantizes, say."""

    layer.up_proj = Own(8, 6)
    assert len(groups_of(layer)) == 1
