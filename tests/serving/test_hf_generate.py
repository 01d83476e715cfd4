"""A directory whose `generate` decodes with heads: text, streaming, limits, draws, refusals."""

import logging
import os
import shutil

import pytest
import torch
from served_models import build_target, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import TextStreamer

from medusa_exp.errors import UserError
from medusa_exp.export import hf_generate
from medusa_exp.model import build_heads, save_heads
from medusa_exp.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])
PROMPT = torch.tensor([[5, 9, 3, 77, 120]])


KINDS = ("medusa", "hydra", "rooted", "recurrent")


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers copies the code of directories that it is told to trust."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("hf")
    backbone = build_target(place / "target", byte_tokenizer())
    for kind in KINDS:
        torch.manual_seed(0)
        heads = build_heads(backbone, num_heads=3, kind=kind)
        save_heads(heads, place / kind / "heads")
        TREE.save(place / kind / "tree.json")
        (place / "target" / "pytorch_model.bin").write_bytes(b"a pickle")
        parts = (place / kind / "heads", place / kind / "tree.json")
        hf_generate.write(*parts, str(place / "target"), place / f"{kind}_served")
    return place


def load(directory, kind="medusa"):
    return AutoModelForCausalLM.from_pretrained(
        directory / f"{kind}_served", trust_remote_code=True
    ).eval()


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


@pytest.fixture(scope="module")
def plain(directory):
    """The same model as transformers alone has it."""
    return AutoModelForCausalLM.from_pretrained(directory / "target").eval()


class Listener:
    """A streamer, as transformers' server has one."""

    def __init__(self, stop_after=None):
        self.heard, self.ended, self.stop_after = [], 0, stop_after

    def put(self, value):
        if self.stop_after is not None and len(self.heard) > self.stop_after:
            raise KeyboardInterrupt
        self.heard.append(value)

    def end(self):
        self.ended += 1


def test_the_directory_stands_alone_and_takes_no_room_for_weights(directory):
    place = directory / "medusa_served"
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"custom_generate/generate.py", "heads/config.json", "tree.json"} <= names
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert "pytorch_model.bin" not in names
    for one in ("model.safetensors", "heads/model.safetensors"):
        assert (place / one).stat().st_nlink == (
            len(KINDS) + 1 if one == "model.safetensors" else 2
        )
    assert AutoTokenizer.from_pretrained(place).chat_template


def test_weights_in_a_cache_of_the_hub_are_linked(directory, tmp_path):
    """There a file's name is a link to one that is named by its digest."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    shutil.copytree(directory / "target", snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.replace(blobs / str(number))
        file.symlink_to(blobs / str(number))
    parts = (directory / "medusa" / "heads", directory / "no tree.json")
    hf_generate.write(*parts, str(snapshot), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 2
    assert (tmp_path / "out" / "config.json").stat().st_nlink == 1


def test_another_file_system_gets_copies_and_is_told(directory, tmp_path, monkeypatch, caplog):
    def refuse(source, target):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    caplog.set_level(logging.INFO)
    parts = (directory / "medusa" / "heads", directory / "no tree.json")
    hf_generate.write(*parts, str(directory / "target"), tmp_path / "out")
    assert "1.8 MB were copied, not linked" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["medusa", "hydra", "rooted", "recurrent"])
def test_text_is_that_of_plain_greedy_decoding(directory, plain, kind):
    model = load(directory, kind)
    prompts = torch.tensor([[0, 0, 5, 9, 3], [7, 7, 2, 60, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for _ in range(2):  # one request after the other
        options = {"attention_mask": mask, "max_new_tokens": 40, "pad_token_id": 0}
        assert torch.equal(model.generate(prompts, **options), plain.generate(prompts, **options))
    config = GenerationConfig(max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    given = {"input_ids": PROMPT, "generation_config": config}
    assert torch.equal(model.generate(**given), plain.generate(**given))


@pytest.mark.parametrize("width", [2, 30])  # transformers' default is 20 tokens behind either
def test_without_a_limit_a_response_is_as_long_as_transformers_own(model, plain, width):
    prompt = torch.arange(5, 5 + width)[None]
    with pytest.warns(UserWarning, match="model-agnostic default"):
        expected = plain.generate(prompt, eos_token_id=-1)
    assert torch.equal(model.generate(prompt, eos_token_id=-1), expected)


def test_a_model_from_elsewhere_is_told_where_the_heads_are(directory, plain):
    served = str(directory / "medusa_served")
    options = {"max_new_tokens": 20, "custom_generate": served, "trust_remote_code": True}
    with pytest.raises(UserError, match=r"holds no heads/config\.json"):
        plain.generate(PROMPT, **options)
    found = plain.generate(PROMPT, heads=served, **options)
    assert torch.equal(found, plain.generate(PROMPT, max_new_tokens=20))


def test_tokens_come_as_steps_commit_them(model, plain):
    listener = Listener()
    found = model.generate(PROMPT, max_new_tokens=30, streamer=listener)
    prompt, *parts = listener.heard
    assert torch.equal(prompt, PROMPT) and listener.ended == 1
    assert 5 < len(parts) <= 30 and torch.equal(torch.cat(parts), found[0, 5:])
    assert torch.equal(found, plain.generate(PROMPT, max_new_tokens=30))


def test_a_streamer_that_raises_ends_the_request_and_not_the_next_one(model, plain):
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_new_tokens=30, streamer=Listener(stop_after=3))
    found = model.generate(PROMPT, max_new_tokens=8)
    assert torch.equal(found, plain.generate(PROMPT, max_new_tokens=8))


def test_transformers_own_streamer_takes_several_tokens_at_once(directory, model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(directory / "medusa_served")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    found = model.generate(PROMPT, max_new_tokens=20, streamer=streamer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(found[0, 5:]).strip()


def test_stop_strings_and_stop_tokens_end_it(directory, model, plain):
    tokenizer = AutoTokenizer.from_pretrained(directory / "medusa_served")
    whole = plain.generate(PROMPT, max_new_tokens=30, eos_token_id=-1)[0, 5:].tolist()
    eos = whole[11]
    found = model.generate(PROMPT, max_new_tokens=30, eos_token_id=eos)[0, 5:].tolist()
    assert found == whole[: whole.index(eos) + 1]
    word = next(
        text
        for token in whole[6:]
        if (text := tokenizer.decode([token])).isascii() and text.strip()
    )
    options = {"stop_strings": [word], "max_new_tokens": 30, "tokenizer": tokenizer}
    assert torch.equal(model.generate(PROMPT, **options), plain.generate(PROMPT, **options))
    with pytest.raises(UserError, match="stop_strings need tokenizer="):
        model.generate(PROMPT, stop_strings="x", max_new_tokens=5)


def test_draws_come_again_by_their_seed(model):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 24}

    def draw(**more):
        return model.generate(PROMPT, **options, **more)[0].tolist()

    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert [draw(), draw()] == [first, second] and first != second


def test_temperature_top_k_and_top_p_are_honored(model, plain):
    greedy = plain.generate(PROMPT, max_new_tokens=12)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        found = model.generate(PROMPT, do_sample=True, max_new_tokens=12, seed=0, **options)
        assert torch.equal(found, greedy)
    # The first token of many draws, against the law that the model and the options make.
    options = {"do_sample": True, "temperature": 2.0, "top_k": 3, "max_new_tokens": 1}
    many = PROMPT.repeat(2000, 1)
    drawn = model.generate(many, seed=0, **options)[:, -1]
    with torch.no_grad():
        top = (plain(PROMPT).logits[0, -1] / 2).topk(3)
    shares = torch.stack([(drawn == token).float().mean() for token in top.indices])
    torch.testing.assert_close(shares, top.values.softmax(-1), atol=0.04, rtol=0)


def test_more_tokens_than_positions_end_at_the_last_one(model, plain):
    prompt = PROMPT.repeat(1, 50)  # 250 of 256 positions
    assert model.generate(prompt, max_new_tokens=1024, eos_token_id=-1).shape[1] == 256


def test_decoders_are_kept_but_not_for_any_number_of_rules(model):
    model.generate(PROMPT, max_new_tokens=2)
    first = model._medusa_exp[1]
    model.generate(PROMPT, max_new_tokens=2)
    assert model._medusa_exp[1] is first
    for number in range(10):
        temperature = 1 + number / 10
        model.generate(PROMPT, max_new_tokens=2, do_sample=True, temperature=temperature)
    assert len(model._medusa_exp[2]) <= 8 and model._medusa_exp[1] is not first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "does not honor num_beams=2"),
        ({"repetition_penalty": 1.1}, "does not honor repetition_penalty=1.1"),
        ({"min_new_tokens": 1}, "does not honor min_new_tokens=1"),
        ({"sequence_bias": {(1,): 2.0}}, "does not honor sequence_bias"),
        ({"return_dict_in_generate": True}, "does not honor return_dict_in_generate"),
        ({"num_return_sequences": 2, "do_sample": True}, "does not honor num_return_sequences"),
        ({"logits_processor": [print]}, "does not take logits_processor"),
        ({"stopping_criteria": [print]}, "does not take stopping_criteria"),
        ({"assistant_model": "x"}, "does not take assistant_model"),
        ({"pixel_values": torch.zeros(1)}, "does not take pixel_values"),
        ({"max_length": 3}, "leaves no room"),
        ({"do_sample": True, "top_p": -1.0}, "top_p"),
    ],
)
def test_what_is_not_honored_is_refused(model, options, message):
    if "max_length" not in options:
        options = options | {"max_new_tokens": 5}
    with pytest.raises(UserError, match=message):
        model.generate(PROMPT, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": PROMPT[0]}, r"token ids: input_ids=, \[B, T\]"),
        ({"input_ids": PROMPT[:0]}, r"token ids: input_ids=, \[B, T\]"),
        ({"input_ids": PROMPT, "attention_mask": torch.ones(2, 9)}, "attention_mask has the shape"),
    ],
)
def test_prompts_and_masks_have_two_dimensions(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.generate(**arguments, max_new_tokens=4)


def test_a_streamer_takes_one_prompt(model):
    with pytest.raises(UserError, match="one prompt at a time"):
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=2, streamer=Listener())


def test_what_cannot_be_served_is_refused(directory, tmp_path):
    parts = (directory / "medusa" / "heads", directory / "medusa" / "tree.json")
    with pytest.raises(UserError, match="is not on this machine"):
        hf_generate.write(*parts, "nobody/nothing", tmp_path / "out")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"train\.lora\.output=merged"):
        hf_generate.write(*parts, str(adapters), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_are_told_to_a_callback(directory, plain):
    from medusa_exp.decode import generate
    from medusa_exp.model import load_heads

    heard = []
    heads = load_heads(directory / "medusa" / "heads", plain)
    prompts = torch.cat([PROMPT, PROMPT + 1])
    found = generate(plain, heads, prompts, tree=TREE, max_new_tokens=16, on_step=heard.append)
    assert len(heard) == found.num_steps
    for row, tokens in enumerate(found.sequences):
        assert [token for step in heard for token in step[row]] == tokens
        lengths = [len(step[row]) for step in heard if step[row]]
        assert lengths == found.accept_lengths[row]
