"""What load_tokenizer takes and refuses; its class, its fit to the model, the config's checks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build_model
from tiny_tokenizers import FAST, assert_same, load, saved, spec_for, write
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from medusa_exp.config import TokenizerConfig
from medusa_exp.errors import UserError
from medusa_exp.model import load_backbone, load_tokenizer

# What holds without any option.


def test_without_options_it_is_what_its_files_say(place):
    assert_same(load(place), AutoTokenizer.from_pretrained(place))


def test_it_may_lie_elsewhere(place, tmp_path, tokenizer):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    elsewhere = write(tmp_path / "elsewhere", tokenizer)
    assert "<|tool|>" in load(place, path=str(elsewhere), resize_embedding=True).get_vocab()


def test_paths_that_lead_nowhere(place):
    with pytest.raises(UserError, match=r"tokenizer\.path=/no/where: there is no such directory"):
        load(place, path="/no/where")
    with pytest.raises(UserError, match=r"tokenizer\.path=.* is a file"):
        load(place, path=str(place / "tokenizer.json"))


@pytest.mark.parametrize("text", ["{", '{"version": 3}', "version https://git-lfs"])
def test_a_broken_file(place, text):
    (place / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be loaded"):
        load(place)


def test_no_files_at_all(place, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("medusa_exp.model.tokenizer.find_spec", lambda name: None)
    elsewhere = write(tmp_path / "elsewhere", tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / name).unlink()
    with pytest.raises(UserError, match=r"it has no tokenizer files.* set tokenizer\.path"):
        load(place)
    assert load(place, path=str(elsewhere)).get_vocab() == tokenizer.get_vocab()
    (place / "tokenizer.model").write_bytes(b"?")
    with pytest.raises(UserError, match="only a SentencePiece model"):
        load(place)


def test_an_empty_vocabulary(place):
    (place / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokens but .*LlamaTokenizer found no vocabulary"):
        load(place, tokenizer_class="LlamaTokenizer")


def test_no_chat_template(place):
    (place / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(place)


def test_more_tokens_than_the_model_has_rows_for(tmp_path, tokenizer):
    place = write(tmp_path / "model", tokenizer, rows=258)
    message = (
        r"has 260 entries, the model in .* only 258: no row for '<\|user\|>', '<\|assistant\|>'"
        r"\. .*tokenizer\.resize_embedding=true"
    )
    with pytest.raises(UserError, match=message):
        load(place)
    assert len(load(place, resize_embedding=True)) == 260


def test_padded_models_are_usual_and_far_larger_ones_are_not(tmp_path, tokenizer, caplog):
    load(write(tmp_path / "padded", tokenizer, rows=320))
    assert "belong together" not in caplog.text
    load(write(tmp_path / "other", tokenizer, rows=32000))
    assert "has 260 entries" in caplog.text and "has 32000" in caplog.text


# The class.


def test_a_class_that_takes_the_file_as_it_stands(lowercasing):
    rebuilt, as_it_stands = load(lowercasing), load(lowercasing, tokenizer_class=FAST)
    assert type(rebuilt) is LlamaTokenizer
    assert rebuilt.tokenize("A") == ["\u2581", "A"]
    assert as_it_stands.tokenize("A") == ["\u2581", "a"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Llama", "is no tokenizer class"),
        ("AutoTokenizer", "is no tokenizer class"),
        ("LlamaModel", "is no tokenizer class"),
        ("os", "is no tokenizer class"),
        ("__import__", "is no tokenizer class"),
        ("", "is no tokenizer class"),
        ("PreTrainedTokenizer", "is not a fast one"),
        ("ByT5Tokenizer", "is not a fast one"),
    ],
)
def test_classes_that_are_refused(place, name, message):
    with pytest.raises(UserError, match=rf"tokenizer\.tokenizer_class={name} {message}"):
        load(place, tokenizer_class=name)


# Lengths and sides.


@pytest.mark.parametrize("tokenizer_class", ["auto", FAST])
def test_lengths_and_sides(lowercasing, tokenizer_class):
    settings = {"model_max_length": 77, "padding_side": "right", "truncation_side": "left"}
    spec = spec_for(lowercasing, tokenizer_class=tokenizer_class, **settings)
    tokenizer = load_tokenizer(spec)
    for result in (tokenizer, saved(tokenizer, spec)):
        assert {key: getattr(result, key) for key in settings} == settings


def test_a_side_that_only_the_class_knows_is_kept(lowercasing):
    tokenizer = load(lowercasing)
    assert tokenizer.padding_side == "left"  # LlamaTokenizer's, as a class
    assert saved(tokenizer, spec_for(lowercasing)).padding_side == "left"


# The model's rows.


def with_weights(tmp_path, tokenizer, architecture: str) -> Path:
    model = build_model(architecture)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


NEW = {
    "special_tokens": {"pad_token": "<|pad|>"},
    "additional_special_tokens": ["<|tool|>"],
    "tokenizer_class": FAST,  # to a qwen2 model belongs another one, which adds a token
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi"])  # plain; tied; with a bias
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, tokenizer, architecture, caplog):
    place = with_weights(tmp_path, tokenizer, architecture)
    spec = spec_for(place, **NEW, resize_embedding=True)
    caplog.set_level("INFO")
    old, new = load_backbone(spec_for(place)).model, load_backbone(spec).model
    assert "from 260 to 262 rows" in caplog.text
    assert len(load_tokenizer(spec)) == 262 == new.config.vocab_size
    for part in ("get_input_embeddings", "get_output_embeddings"):
        for before, after in zip(
            getattr(old, part)().parameters(), getattr(new, part)().parameters(), strict=True
        ):
            torch.testing.assert_close(after[:260], before)
            torch.testing.assert_close(
                after[260:], before.mean(0).expand(2, *before.shape[1:]), rtol=1e-2, atol=1e-2
            )
            assert not after.requires_grad
    tied = new.get_input_embeddings().weight is new.get_output_embeddings().weight
    assert tied == (architecture == "qwen2")


def test_the_enlarged_model_has_one_identity(tmp_path, tokenizer):
    place = with_weights(tmp_path, tokenizer, "llama")
    identities = set()
    for seed, dtype in enumerate(["float32", "float32", "bfloat16"]):
        torch.manual_seed(seed)
        spec = spec_for(place, **NEW, resize_embedding=True)
        identities.add(load_backbone(replace(spec, dtype=dtype)).identity())
    assert len(identities) == 1
    assert load_backbone(spec_for(place)).identity() not in identities


def test_nothing_grows_without_need(tmp_path, tokenizer):
    place = with_weights(tmp_path, tokenizer, "llama")
    backbone = load_backbone(spec_for(place, resize_embedding=True))
    assert backbone.vocab_size == len(tokenizer)
    assert backbone.identity() == load_backbone(spec_for(place)).identity()


# The config's own checks.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_side": "up"}, r"tokenizer\.padding_side=up .* left, right"),
        ({"truncation_side": "up"}, r"tokenizer\.truncation_side=up .* left, right"),
        ({"model_max_length": 0}, r"tokenizer\.model_max_length=0"),
        ({"special_tokens": {"end": "x"}}, r"tokenizer\.special_tokens=end .*bos_token, eos_token"),
        ({"special_tokens": {"eos_token": ""}}, r"tokenizer\.special_tokens\.eos_token"),
        ({"additional_special_tokens": [""]}, r"tokenizer\.additional_special_tokens"),
    ],
)
def test_values_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**settings)


def test_the_roles_are_those_of_transformers():
    for role in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES:
        TokenizerConfig(special_tokens={role: "x"})
