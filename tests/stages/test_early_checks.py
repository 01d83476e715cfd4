"""What a later stage would refuse is refused before anything long."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import Lfm2Config, LlamaConfig

from medusa_exp.config import (
    Config,
    DecodeConfig,
    ExportConfig,
    HeadConfig,
    ModelConfig,
    TreeConfig,
)
from medusa_exp.errors import UserError
from medusa_exp.model.heads import MedusaHeadsConfig
from medusa_exp.stages.early_checks import check_drafts
from medusa_exp.stages.session import Session


def check(session):
    check_drafts(session.config, session.out, session.spec)


@pytest.mark.parametrize(
    ("tree", "head", "message"),
    [
        ({"kind": "medusa_63"}, {}, r"Set tree=chain or tree=calibrated"),
        ({"kind": "dynamic"}, {}, r"Set tree=chain or tree=calibrated"),
        ({"kind": "custom", "paths": [[0], [1]]}, {}, r"Set tree=chain or tree=calibrated"),
        ({"kind": "chain"}, {"prefix_attention": True}, r"set head\.prefix_attention=false"),
        ({"kind": "custom", "paths": [[0], [0, 0]]}, {}, None),
        ({"kind": "chain"}, {}, None),
        ({"kind": "calibrated"}, {}, None),
    ],
)
def test_what_recurrent_layers_cannot_check_is_refused_before_anything_long(
    tmp_path, tree, head, message
):
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    Lfm2Config(**layers).save_pretrained(tmp_path / "model")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "model")),
        tree=TreeConfig(**tree),
        head=HeadConfig(**head),
    )
    if message is None:
        check(Session(config, tmp_path))
        return
    with pytest.raises(UserError, match=message):
        check(Session(config, tmp_path))


def test_a_tree_with_ranks_beyond_the_vocabulary_is_refused_before_anything_long(tmp_path):
    LlamaConfig(vocab_size=100, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "mine.json").write_text("[[0], [999999]]")
    tree = TreeConfig(kind="custom", path=str(tmp_path / "mine.json"))
    model, stages = ModelConfig(path=str(tmp_path / "model")), ["train", "evaluate"]
    config = Config(model=model, tree=tree, stages=stages)
    session, said = Session(config, tmp_path), r"mine\.json\) has the rank 999999, .* 100 tokens"
    with pytest.raises(UserError, match=said):
        check(session)
    heads = SimpleNamespace(num_heads=2, config=MedusaHeadsConfig(vocab_size=100))
    with pytest.raises(UserError, match=said):
        session.tree(SimpleNamespace(heads=heads))
    (tmp_path / "mine.json").write_text("[[0], [99]]")
    check(session)
    assert len(session.tree(SimpleNamespace(heads=heads))) == 3
    heads.config.num_tokens = 99
    with pytest.raises(UserError, match="a head can propose 99 tokens"):
        session.tree(SimpleNamespace(heads=heads))
    config.head.num_tokens = 99
    with pytest.raises(UserError, match="a head can propose 99 tokens"):
        check(session)


def test_a_tree_that_an_export_is_to_have_is_asked_for_before_anything_long(tmp_path):
    LlamaConfig(vocab_size=100, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "model")),
        tree=TreeConfig(kind="custom", path=str(tmp_path / "none.json")),
        export=ExportConfig(format="vllm"),
        stages=["train", "export"],
    )
    check(Session(config, tmp_path))  # an engine's format has none
    config.export.format = "hf_generate"
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        check(Session(config, tmp_path))
    with pytest.raises(UserError, match=r"tree=custom needs either tree\.path"):
        replace(config, tree=TreeConfig(kind="custom"))


def test_where_tokens_are_drawn_none_is_looked_up(tmp_path):
    decode = DecodeConfig(rule="sampling", draft="sampled")
    with pytest.raises(UserError, match=r"set tree\.lookup=0, or decode\.draft=top"):
        check(Session(Config(decode=decode, tree=TreeConfig(lookup=2)), tmp_path))


@pytest.mark.parametrize(
    ("head", "draft", "message"),
    [
        ("hydra", "auto", r"heads of kind=hydra cannot guess ahead of a choice\. Set tree"),
        ("recurrent", "auto", r"heads of kind=recurrent cannot guess ahead"),
        ("medusa", "sampled", r"Set tree=calibrated, or decode\.draft=top"),
        ("rooted", "top", None),
    ],
)
def test_heads_of_which_no_nodes_can_be_picked_are_refused_before_anything_long(
    tmp_path, head, draft, message
):
    LlamaConfig(vocab_size=100, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "model")),
        tree=TreeConfig(kind="dynamic"),
        head=HeadConfig(kind=head),
        decode=DecodeConfig(rule="sampling", draft=draft),
        stages=["train", "calibrate"],
    )
    session = Session(config, tmp_path)
    check(session)  # calibration can do without
    config.stages.append("evaluate")
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check(session)
