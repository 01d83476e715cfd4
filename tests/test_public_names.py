"""The names that `import medusa_exp` gives, each used once as its documentation says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import medusa_exp
from medusa_exp import (
    Decoder,
    MedusaHeads,
    Tree,
    build_heads,
    compose,
    generate,
    load_heads,
    run,
)
from medusa_exp.config import from_hydra, load_saved
from medusa_exp.errors import UserError


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A finished run, made from Python."""
    folder = tmp_path_factory.mktemp("public")
    out = folder / "run"
    config = compose(
        [
            "+experiment=smoke",
            "head.num_heads=3",
            "stages=[pretrain,train,evaluate]",
            "tree=chain",
            "device=cpu",
            "logger=none",
            f"cache_dir={folder / 'cache'}",
        ]
    )
    metrics = run(config, out)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["eval/identical_fraction"] == 1
    return out


def test_all_names_are_there():
    assert set(medusa_exp.__all__) == set(dir(medusa_exp))
    for name in medusa_exp.__all__:
        assert getattr(medusa_exp, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        medusa_exp.nothing  # noqa: B018


def test_a_run_of_python_can_be_decoded_with(out):
    decoder = Decoder.from_run(out, device="cpu")
    assert len(decoder.tree) == 4 and decoder.limits.stop_ids
    text = "".join(step.text for step in decoder.stream("Hello"))
    model = decoder.backbone.model
    heads = load_heads(out / "heads", model)
    assert isinstance(heads, MedusaHeads) and heads.num_heads == 3
    ids = torch.tensor([decoder.tokenizer("Hello").input_ids])
    tree = Tree.load(out / "tree.json")
    tokens = decoder.limits.max_new_tokens
    stop_ids = sorted(decoder.limits.stop_ids)
    options = {"max_new_tokens": tokens, "eos_token_id": stop_ids}
    [sequence] = generate(model, heads, ids, tree=tree, **options).sequences
    assert decoder.tokenizer.decode(sequence, skip_special_tokens=True).rstrip("\ufffd") == text
    fresh = build_heads(model, num_heads=2)
    assert Decoder(model, fresh, Tree.from_paths([(0,)])).generate(ids, **options).sequences == [
        sequence
    ]
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])


def test_what_cannot_be_composed_or_opened(tmp_path):
    with pytest.raises(UserError, match="num_headz"):
        compose(["head.num_headz=3"])
    with pytest.raises(UserError, match="num_heads"):
        compose(["head.num_heads=-1"])
    with pytest.raises(UserError, match="is no run directory"):
        Decoder.from_run(tmp_path)


def test_a_run_of_python_saves_the_names_of_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_PLACE", "/secret/place")
    monkeypatch.setenv("SECRET_TAG", "secret-tag")
    arguments = ["model.path=${oc.env:SECRET_PLACE}", "logger.tags=['${oc.env:SECRET_TAG}']"]
    config = compose([*arguments, "stages=[report]", "logger=none", "device=cpu"])
    assert config.model.path == "/secret/place"
    config.train.max_steps = 7
    run(config, tmp_path / "run")
    saved = (tmp_path / "run/.hydra/config.yaml").read_text()
    assert "${oc.env:SECRET_PLACE}" in saved and "max_steps: 7" in saved
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    for file in files:  # a diff of the checkout may have this very test
        assert file.name == "uncommitted.diff" or b"secret" not in file.read_bytes(), file
    config.sweep_dir = ""  # made of the clock, and of no use to a later call
    assert from_hydra(load_saved(tmp_path / "run/.hydra/config.yaml")) == config
