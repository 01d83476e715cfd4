"""Stage export with export.format=hf_generate: a model that decodes with the tree of its run."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_exp.config.schema import ExportConfig, TreeConfig
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads, save_heads
from medusa_exp.stages import export
from medusa_exp.tree import Tree, chain


@pytest.fixture
def out(config, tmp_path, monkeypatch):
    """A run that has heads and a tree."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(config.model.path).eval())
    out = tmp_path / "run"
    save_heads(build_heads(backbone, num_heads=2), out / "heads")
    Tree.from_paths([(0,), (1,), (0, 0)]).save(out / "tree.json")
    config.run_dir = str(out)
    config.export = ExportConfig(format="hf_generate")
    return out


def test_the_export_generates_and_can_be_written_again(config, out):
    for _ in range(2):
        export.run(config, out)
    place = out / "export" / "hf_generate"
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    plain = AutoModelForCausalLM.from_pretrained(config.model.path).eval()
    ids = torch.tensor([[5, 9, 3]])
    options = {"max_new_tokens": 16, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert len(model._medusa_exp[1].tree) == 4
    card = (place / "README.md").read_text("utf-8")
    assert "transformers serve DIR --trust-remote-code" in card and str(out) not in card


def test_the_tree_is_the_configs_and_not_the_last_evaluations(config, out, caplog):
    config.tree = TreeConfig(kind="custom", paths=[[0]])
    export.run(config, out)
    place = out / "export" / "hf_generate"
    assert Tree.load(place / "tree.json") == Tree.from_paths([(0,)])
    assert "tree=custom of this run's config (2 nodes)" in caplog.text
    assert len(Tree.load(out / "tree.json")) == 4  # what was measured stays what it is
    config.tree = TreeConfig(kind="chain")
    chain(2).save(out / "tree.json")
    caplog.clear()
    export.run(config, out)
    assert Tree.load(place / "tree.json") == chain(2) and "last evaluation" not in caplog.text


def test_heads_that_know_a_rounded_model_by_its_former_name_are_exported(config, out):
    config.dtype.backbone, config.export.format = "float16", "vllm"
    rounded = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float16)
    save_heads(build_heads(Backbone(rounded.eval()), num_heads=2), out / "heads")
    export.run(config, out)
    assert (out / "export" / "vllm").is_dir()


def test_other_models_and_places_are_refused(config, out, tmp_path):
    config.export.out = str(tmp_path / "model")
    with pytest.raises(UserError, match="holds no export"):
        export.run(config, out)
    config.export.out = None
    stranger = AutoModelForCausalLM.from_pretrained(config.model.path)
    torch.nn.init.normal_(stranger.lm_head.weight)
    stranger.save_pretrained(config.model.path)
    with pytest.raises(UserError, match="identity"):
        export.run(config, out)
