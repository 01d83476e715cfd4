"""Compiled layers say what the model's own say, and one compilation serves all of them."""

import logging
import random

import pytest
import torch
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode import compiled
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.slots import Request
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

SMALL = Tree.from_paths([(0,), (1,), (0, 0)])
LARGE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])


@pytest.fixture
def backbone():
    torch._dynamo.reset()
    yield Backbone(build_model("llama"))
    torch._dynamo.reset()


def compiling(backbone: Backbone) -> Decoder:
    decoder = Decoder(backbone, build_heads(backbone, num_heads=3), LARGE, cuda_graph=True)
    decoder.layers = CompiledLayers(backbone, "aot_eager")
    return decoder


def test_one_compilation_serves_all_layers_trees_and_batches(backbone, caplog):
    decoder = compiling(backbone)
    rng = random.Random(0)
    caplog.set_level(logging.INFO)
    for count in (3, 2):
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n * 5 + 1)] for n in range(count)]
        expected = [a.tokens for a in decode_plain(backbone, prompts, Limits(12))]
        found = {
            name: [a.tokens for a in decoder.decode(prompts, Limits(12), tree=tree)]
            for name, tree in {"small": SMALL, "chain": chain(3), "large": LARGE}.items()
        }
        found["plain"] = [a.tokens for a in decoder.decode_plain(prompts, Limits(12))]
        assert found == dict.fromkeys(found, expected)
        assert decoder.layers.num_graphs == 2  # of trees, and of single tokens
    slots = decoder.slots(2, 64, decoder.root_only())
    requests = [Request(prompt, Limits(12), tag=tuple(prompt)) for prompt in [*prompts, [7] * 9]]
    answered = {f.request.tag: f.response.tokens for f in slots.decode(requests)}
    assert [answered[tuple(prompt)] for prompt in prompts] == expected
    assert decoder.layers.num_graphs == 2  # a batch that shrinks keeps two rows
    assert not any("forward" in layer.__dict__ for layer in decoder.layers.layers)
    assert decoder.layers.seconds > 0
    said = [line for line in caplog.messages if "compiled a decoder layer for all 2" in line]
    assert len(said) == 2 and "2 graphs" in said[-1]


def test_slots_of_all_sizes_share_a_graph_with_those_before_them(backbone):
    """The first lie in a memory of their own size, later ones in a larger cache's."""
    decoder, requests = compiling(backbone), [Request([4, 5, 6], Limits(4)) for _ in range(4)]
    for drafter, columns in (
        (decoder.root_only(), 64),
        (decoder.drafter(LARGE), 64),
        (decoder.root_only(), 64),
        (decoder.root_only(), 356),
        (decoder.drafter(LARGE), 64),
    ):
        list(decoder.slots(4, columns, drafter).decode(requests))
    assert decoder.layers.num_graphs == 2


@pytest.mark.parametrize("num_slots", [16, 17])
def test_prompts_that_run_together_for_many_slots_have_a_graph_of_their_own(backbone, num_slots):
    """In few slots most prompts run one by one, as slots become free: these run uncompiled."""
    decoder, rng = compiling(backbone), random.Random(0)
    lengths = [rng.randrange(1, 30) for _ in range(40)]
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    requests = [Request(p, Limits(3 + n % 5), tag=n) for n, p in enumerate(prompts)]
    slots = decoder.slots(num_slots, 64, decoder.root_only())
    found = {f.request.tag: f.response.tokens for f in slots.decode(requests)}
    for number, prompt in enumerate(prompts):
        [alone] = decode_plain(backbone, [prompt], Limits(3 + number % 5))
        assert found[number] == alone.tokens
    assert decoder.layers.num_graphs == (2 if num_slots > 16 else 1)


def test_what_cannot_be_compiled_runs_as_it_is_and_is_named_once(backbone, monkeypatch, caplog):
    norm = type(backbone.body.layers[0].input_layernorm)
    forward = norm.forward

    def printing(self, hidden):
        torch._dynamo.graph_break()
        return forward(self, hidden)

    monkeypatch.setattr(norm, "forward", printing)
    decoder = compiling(backbone)
    expected = [a.tokens for a in decode_plain(backbone, [[3, 4, 5]], Limits(12))]
    for _ in range(2):
        assert [a.tokens for a in decoder.decode([[3, 4, 5]], Limits(12))] == expected
    [warning] = [r.getMessage() for r in caplog.records if r.name.startswith("medusa_exp")]
    assert "its layers are not compiled (Unsupported" in warning
    assert decoder.layers.is_refused and decoder.layers.num_graphs == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_steps_mask_is_made_outside_of_the_layers(architecture, monkeypatch):
    torch._dynamo.reset()
    backbone, graphs = Backbone(build_model(architecture)), []
    assert backbone.body.layers[0].self_attn.num_key_value_groups > 1
    fuse = compiled.fuse

    def kept(graph, groups):
        fuse(graph, groups)
        graphs.append({getattr(n.target, "__name__", n.target) for n in graph.graph.nodes})

    monkeypatch.setattr(compiled, "fuse", kept)
    decoder = compiling(backbone)
    expected = [a.tokens for a in decode_plain(backbone, [[3, 4, 5]], Limits(12))]
    assert [a.tokens for a in decoder.decode([[3, 4, 5]], Limits(12))] == expected
    assert [a.tokens for a in decoder.decode_plain([[3, 4, 5]], Limits(12))] == expected
    made = {"masked_fill_", "masked_fill", "new_zeros", "where", "invert"}
    assert len(graphs) == 2 and not any(names & made for names in graphs)


def test_a_layer_that_reads_the_mask_is_given_it_as_it_is(backbone, monkeypatch):
    attention = type(backbone.body.layers[0].self_attn)
    forward = attention.forward

    def reading(self, hidden_states, *args, attention_mask=None, **kwargs):
        if attention_mask is not None:  # a row for each token
            hidden_states = hidden_states + attention_mask[:, 0, :, :1].clamp(0, 0)
        return forward(self, hidden_states, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(attention, "forward", reading)
    decoder = compiling(backbone)
    expected = [a.tokens for a in decode_plain(backbone, [[3, 4, 5]], Limits(12))]
    assert [a.tokens for a in decoder.decode([[3, 4, 5]], Limits(12))] == expected
    assert not decoder.layers.is_refused and not decoder.layers._folds_masks


def test_layers_that_hooks_run_are_left_alone(backbone, caplog):
    layer = backbone.body.layers[1]
    layer.forward = layer.forward
    layers = CompiledLayers(backbone, "aot_eager")
    assert layers.is_refused and "run by hooks" in caplog.text


def test_a_cpu_without_a_compiler_is_told(backbone, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"decode.compile=true needs a C\+\+ compiler"):
        Decoder(backbone, compiles=True)
