"""The identity of a model: the same from its files as from the whole model in memory."""

import pytest
import torch
from tiny_models import ARCHITECTURES, build_model

from medusa_exp.config import ModelConfig
from medusa_exp.identity import identity_of_files
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.checkpoint import check_fit
from medusa_exp.model.loading import identity_from, load_backbone, load_ends
from medusa_exp.model.source import ModelSpec


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_files_have_the_models_identity(tmp_path, architecture):
    model = build_model(architecture)
    model.save_pretrained(tmp_path)
    assert identity_of_files(str(tmp_path)) == Backbone(model).identity()
    model.config.medusa_adapter = "abc"
    model.config.save_pretrained(tmp_path)
    assert identity_of_files(str(tmp_path)) == Backbone(model).identity()


def test_what_cannot_be_known_is_none(tmp_path):
    assert identity_of_files(str(tmp_path / "nothing")) is None
    build_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert identity_of_files(str(tmp_path)) is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_has_one_name_in_whatever_dtype_it_is_loaded(tmp_path, stored):
    build_model("llama", dtype=stored).save_pretrained(tmp_path)
    names = set()
    for dtype in ("float32", "bfloat16", "float16"):
        spec = ModelSpec(ModelConfig(path=str(tmp_path)), dtype=dtype, device="cpu")
        backbone, ends = load_backbone(spec), load_ends(spec, "", "")
        assert str(backbone.model.dtype) == f"torch.{dtype}"
        names.add((backbone.identity(), backbone.weights_fingerprint()))
        assert identity_from(spec, ends, backbone.num_layers) == backbone.identity()
    assert len(names) == 1
    assert identity_of_files(str(tmp_path)) == names.pop()[0]


def test_heads_that_know_a_rounded_model_by_its_former_name_still_fit(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    spec = ModelSpec(ModelConfig(path=str(tmp_path)), dtype="float16", device="cpu")
    backbone = load_backbone(spec)
    rounded = Backbone(backbone.model)
    heads = build_heads(rounded, num_heads=2)
    assert rounded.identity() != backbone.identity()
    check_fit(heads, backbone, tmp_path)
    assert backbone.names.has_fingerprint(rounded.weights_fingerprint())
    assert not backbone.names.has_fingerprint("others")
