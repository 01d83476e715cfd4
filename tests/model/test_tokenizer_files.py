"""What save_tokenizer writes beside the heads."""

import json
import os
from pathlib import Path

import pytest
from tiny_models import build_model
from tiny_tokenizers import FAST, assert_same, saved, spec_for
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from medusa_exp.model import (
    Backbone,
    MedusaHeads,
    build_heads,
    load_heads,
    load_tokenizer,
    save_heads,
    save_tokenizer,
)
from medusa_exp.model.source import ModelSpec

REAL = Path(os.environ.get("MEDUSA_EXP_TEST_DATA", "no such folder")) / "tokenizers"
"""Tokenizers of yours, as in tests/data/test_real_data.py."""
OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def test_the_files_beside_the_heads(roomy, tmp_path):
    heads = tmp_path / "heads"
    spec = spec_for(roomy, additional_special_tokens=["<|tool|>"])
    tokenizer = load_tokenizer(spec)
    backbone = Backbone(build_model("llama"))
    for _ in range(2):
        save_heads(build_heads(backbone, num_heads=2), heads)
        save_tokenizer(tokenizer, spec, heads)
    assert isinstance(AutoModel.from_pretrained(heads), MedusaHeads)
    assert load_heads(heads, backbone).num_heads == 2
    assert_same(tokenizer, AutoTokenizer.from_pretrained(heads))
    assert not list(tmp_path.glob(".*"))
    again = spec_for(roomy, path=str(heads))
    assert_same(tokenizer, load_tokenizer(again))


def source_of(spec: ModelSpec) -> dict:
    directory = Path(spec.model.path).parent / "heads"
    save_tokenizer(load_tokenizer(spec), spec, directory)
    return json.loads((directory / "tokenizer_source.json").read_text())


def test_the_source_names_what_made_it(lowercasing):
    source = source_of(spec_for(lowercasing))
    assert source["path"] == str(lowercasing) and source["class"] == "LlamaTokenizer"
    assert set(source["versions"]) == {"transformers", "tokenizers"}
    assert source["vocab_size"] == 268 and source["overrides"] == {}
    assert len(source["backend_sha256"]) == len(source["chat_template_sha256"]) == 64


def test_digests_tell_tokenizers_apart(lowercasing):
    plain = source_of(spec_for(lowercasing))
    for settings, changed in (
        ({"padding_side": "left"}, set()),
        ({"tokenizer_class": FAST}, {"backend_sha256"}),
        ({"add_eos_token": True}, {"backend_sha256"}),
        ({"chat_template": OTHER}, {"chat_template_sha256"}),
    ):
        source = source_of(spec_for(lowercasing, **settings))
        digests = {key for key in source if key.endswith("sha256") and source[key] != plain[key]}
        assert digests == changed and source["overrides"] == settings


def test_what_a_call_asked_for_is_no_part_of_the_digest(place):
    spec = spec_for(place)
    before = source_of(spec)
    tokenizer = load_tokenizer(spec)
    tokenizer("long", truncation=True, max_length=2)
    save_tokenizer(tokenizer, spec, place.parent / "heads")
    after = json.loads((place.parent / "heads" / "tokenizer_source.json").read_text())
    assert before == after


@pytest.mark.parametrize("name", ["phi3-mini-4k", "vicuna-v1.5"])
@pytest.mark.skipif(not REAL.is_dir(), reason="needs real tokenizers")
def test_real_tokenizers(tmp_path, name):
    LlamaConfig(vocab_size=32064, hidden_size=32).save_pretrained(tmp_path / "model")
    spec = spec_for(tmp_path / "model", path=str(REAL / name), add_eos_token=True)
    tokenizer = load_tokenizer(spec)
    assert tokenizer("x").input_ids[-1] == tokenizer.eos_token_id
    assert_same(tokenizer, saved(tokenizer, spec))
