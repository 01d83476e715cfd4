import json

import pytest
import torch
from tiny_models import ARCHITECTURES, build_model
from transformers import AutoConfig, AutoModel

import medusa_exp
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, MedusaHeads, build_heads, load_heads, save_heads
from medusa_exp.model.heads import StackedHeads


def test_blocks_share_no_storage(backbone):
    heads = build_heads(backbone, num_heads=3, num_layers=2)
    pointers = [parameter.data_ptr() for parameter in heads.parameters()]
    assert len(set(pointers)) == len(pointers) == 3 * (2 * 2 + 1)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_fresh_heads_say_what_the_lm_head_says(architecture):
    """Tied or not, with a bias (Phi) or without."""
    model = build_model(architecture)
    backbone = Backbone(model)
    heads = build_heads(model, num_heads=2)
    ids_BT = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        hidden_BD = backbone.hidden_states(ids_BT)[:, -1]
        expected_BV = model.get_output_embeddings()(hidden_BD)
        logits_BKV = heads(hidden_BD)
    assert logits_BKV.shape == (1, 2, backbone.vocab_size)
    assert torch.equal(logits_BKV, expected_BV[:, None].expand(-1, 2, -1))
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
    assert heads.lm_heads[0].weight.data_ptr() != backbone.lm_head.weight.data_ptr()


def test_files_load_with_the_auto_classes(backbone, tmp_path):
    heads = build_heads(backbone, num_heads=2)
    save_heads(heads, tmp_path / "heads")
    assert sorted(p.name for p in (tmp_path / "heads").iterdir()) == [
        "config.json",
        "model.safetensors",
        "sha256.json",
    ]
    config = AutoConfig.from_pretrained(tmp_path / "heads")
    loaded = AutoModel.from_pretrained(tmp_path / "heads")
    assert isinstance(loaded, MedusaHeads) and config.num_heads == 2
    for name, value in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert medusa_exp.load_heads(tmp_path / "heads").num_heads == 2


def test_heads_take_the_backbones_dtype(tmp_path):
    save_heads(build_heads(build_model("llama"), num_heads=1), tmp_path / "heads")
    backbone = Backbone(build_model("llama", dtype=torch.bfloat16))
    assert load_heads(tmp_path / "heads", backbone).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.model.norm.weight.data.add_(1), "whose identity is"),
        (lambda m: m.lm_head.weight.data.add_(1), "whose identity is"),
        (lambda m: m.resize_token_embeddings(70), "whose vocabulary is 64"),
    ],
    ids=["norm", "lm_head", "vocabulary"],
)
def test_heads_of_another_backbone_are_refused(tmp_path, change, message):
    save_heads(build_heads(build_model("llama"), num_heads=1), tmp_path / "heads")
    other = build_model("llama")
    change(other)
    with pytest.raises(UserError, match=message):
        load_heads(tmp_path / "heads", Backbone(other))


def test_heads_that_are_not_there_or_broken(backbone, tmp_path):
    with pytest.raises(UserError, match="run stage train first"):
        load_heads(tmp_path)
    save_heads(build_heads(backbone, num_heads=2), tmp_path / "heads")
    weights = tmp_path / "heads" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written there"):
        load_heads(tmp_path / "heads")
    (tmp_path / "heads" / "sha256.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_heads(tmp_path / "heads")


@pytest.mark.parametrize("planted", [{"dtype": -1}, {"quantization_config": 3}])
def test_keys_of_transformers_that_make_no_sense_are_one_message(backbone, tmp_path, planted):
    save_heads(build_heads(backbone, num_heads=1), tmp_path / "heads")
    (tmp_path / "heads" / "sha256.json").unlink()
    path = tmp_path / "heads" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | planted))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_heads(tmp_path / "heads")


def test_an_unknown_kind(backbone):
    with pytest.raises(ValueError, match="kind=eagle"):
        build_heads(backbone, num_heads=1, kind="eagle")


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("architecture", ["llama", "phi"])  # phi's lm_head has a bias
def test_stacked_heads_are_the_same_heads(architecture, num_layers):
    heads = build_heads(Backbone(build_model(architecture)), num_heads=3, num_layers=num_layers)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    hidden_BD = torch.randn(5, 32)
    stacked = StackedHeads(heads, torch.float32)
    for count in (None, 2):
        torch.testing.assert_close(stacked(hidden_BD, count), heads(hidden_BD, count))
    half = StackedHeads(heads, torch.bfloat16)(hidden_BD)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), heads(hidden_BD), rtol=0.1, atol=0.2)
