"""The identity of a model: the same from its files as from the whole model in memory."""

import pytest
from tiny_models import ARCHITECTURES, build_model

from medusa_exp.identity import identity_of_files
from medusa_exp.model import Backbone


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
