"""Backbones whose weights bitsandbytes holds in 8 or 4 bits, on the CPU."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp import build_heads, generate
from medusa_exp.config import LoraSettings, ModelConfig
from medusa_exp.errors import UserError
from medusa_exp.model.adapters import add_adapters
from medusa_exp.model.loading import load_backbone, load_ends
from medusa_exp.model.source import ModelSpec
from medusa_exp.tree import Tree

nn = pytest.importorskip("bitsandbytes.nn")
KINDS = {"8bit": nn.Linear8bitLt, "4bit": nn.Linear4bit}


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    shape = LlamaConfig(  # bitsandbytes packs 4-bit weights for a CPU in blocks of 64 columns
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def quantized(path: str, bits: str | None) -> ModelSpec:
    return ModelSpec(ModelConfig(path=path, quantization=bits), device="cpu")


@pytest.mark.parametrize("bits", KINDS)
def test_layers_are_quantised_and_the_lm_head_is_not(path, bits):
    whole, backbone = load_backbone(quantized(path, None)), load_backbone(quantized(path, bits))

    layers = backbone.body.layers
    assert all(type(layer.mlp.up_proj) is KINDS[bits] for layer in layers)
    assert torch.equal(backbone.lm_head.weight, whole.lm_head.weight)
    # Heads of the one fit the other; what is made of its answers or states does not.
    assert backbone.identity() == whole.identity()
    assert backbone.weights_fingerprint() != whole.weights_fingerprint()


@pytest.mark.parametrize("bits", KINDS)
def test_it_decodes_losslessly(path, bits):
    backbone = load_backbone(quantized(path, bits))
    heads = build_heads(backbone.model, num_heads=2)
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "eos_token_id": []}

    over_tree = generate(
        backbone.model, heads, ids, tree=Tree.from_paths([[0], [0, 0], [1]]), **options
    )

    plain = generate(backbone.model, heads, ids, tree=Tree.from_paths([]), **options)
    assert over_tree.sequences == plain.sequences


@pytest.mark.parametrize("bits", KINDS)
def test_its_ends_are_found_without_its_layers(path, bits):
    spec = quantized(path, bits)
    whole = load_backbone(spec)

    ends = load_ends(spec, whole.identity(), whole.weights_fingerprint())

    hidden_RD = torch.randn(3, whole.hidden_size)
    assert torch.equal(ends.next_logits(hidden_RD), whole.next_logits(hidden_RD))


def test_adapters_cannot_be_merged_into_it(path):
    backbone = load_backbone(quantized(path, "4bit"))

    with pytest.raises(UserError, match=r"train\.lora\.output=adapter"):
        add_adapters(backbone, LoraSettings(output="merged"))
    assert add_adapters(backbone, LoraSettings(output="adapter"))


def test_without_bitsandbytes(path, monkeypatch):
    monkeypatch.setattr("medusa_exp.model.loading.find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"model\.quantization=4bit needs bitsandbytes: pip"):
        load_backbone(quantized(path, "4bit"))
