"""Directories of models that would hang or fill the memory are refused at once, by the file."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa_exp.config import ModelConfig, TokenizerConfig
from medusa_exp.errors import UserError
from medusa_exp.model.source import ModelSpec

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.zeros(512)}, tmp_path / "model.safetensors")
    return tmp_path


def refused(model: Path, said: str) -> None:
    start = time.perf_counter()
    for spec in (
        ModelSpec(ModelConfig(path=str(model))),
        ModelSpec(ModelConfig(), TokenizerConfig(path=str(model))),
    ):
        with pytest.raises(UserError, match=said) as caught:
            spec.tokenizer_path()
        assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def test_a_model_passes(model):
    (model / "LICENSE").write_text("any")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert ModelSpec(ModelConfig(path=str(model))).tokenizer_path() == str(model)


def test_a_file_that_was_cut_off_is_named(model):
    path = model / "model.safetensors"
    tensors = {name: torch.ones(64) for name in "ab"}
    save_file(tensors, path, {"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    refused(model, r"model.safetensors .* was cut off \(.*not fully covered'\)\. Copy it again")

    damaged = tensor_file("a\n\x1b[2J" * 1_000, data_offsets=[4, 8])
    path.write_bytes(damaged)
    refused(
        model, r"was cut off \('.*invalid offset for tensor `a\\n\\x1b\[2J.*'\)\. Copy it again"
    )


def test_tensors_of_a_type_that_is_not_known_ask_for_an_update(model):
    (model / "model.safetensors").write_bytes(tensor_file("a", dtype="F5\x1b[2J" * 1_000))
    refused(model, r"does not know \('.*unknown variant `F5\\x1b.*'\)\. Update safetensors\.$")


def tensor_file(name, **changes):
    """Bytes of a safetensors file of one tensor, whose header says something else."""
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({name: {**whole, **changes}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "x.safetensors"]
)
def test_pipes_devices_and_directories_are_refused(model, name):
    os.mkfifo(model / name)
    refused(model, f"{name} is a pipe")
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    refused(model, f"{name} is a device")
    (model / name).unlink()
    (model / name).mkdir()
    refused(model, f"{name} is a directory")
    (model / name).rmdir()
    (model / name).symlink_to("nowhere")
    refused(model, f"{name} cannot be read")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is beyond 2,000"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers is beyond 2,000"),
        ({"num_attention_heads": -(10**9)}, "num_attention_heads is beyond"),
        ({"n_layer": 10**9}, "n_layer is beyond 2,000"),
        ({"num_local_experts": 10**7}, "num_local_experts is beyond 1,048,576"),
        ({"num_experts": 10**6}, "asks for 8,000,000 weights"),
        ({"vocab_size": 10**15}, "vocab_size is beyond"),
        (
            {"vocab_size": 10**9},
            r"asks for 8,000,000,000 weights and more, and .* have 2,\d\d\d bytes",
        ),
        ({"hidden_size": 10**6}, "asks for"),
        ({"text_config": {"hidden_size": 10**6}}, "asks for"),
        ({"x": [1] * 200_000}, "100,000 numbers"),
        ({"x": "y" * (1 << 20)}, "config.json is larger than 1 MiB"),
    ],
)
def test_configs_beyond_any_model_are_refused(model, changes, said):
    (model / "config.json").write_text(json.dumps(CONFIG | changes))
    refused(model, said)


def test_experts_may_be_many(model):
    """As many as the weights have room for; a library's own checks come later."""
    (model / "config.json").write_text(json.dumps(CONFIG | {"num_experts": 4_000}))
    ModelSpec(ModelConfig(path=str(model))).tokenizer_path()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"[" * 100_000, "config.json is not valid JSON"),
        ("config.json", b"[1]", "config.json is no object of keys"),
        ("config.json", b"\xff\xfe", "config.json is not valid JSON"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors is no safetensors file, or was cut"),
        ("model.safetensors", b"", "cut off"),
        ("a.safetensors", struct.pack("<Q", 1 << 40), "a.safetensors is no safetensors file"),
        (INDEX, b'{"weight_map": {"a": "../b.safetensors"}}', "names '../b.safetensors'"),
        (INDEX, b'{"weight_map": {"a": "b.pkl"}}', "names 'b.pkl'"),
        (INDEX, b'{"weight_map": 3}', "has no weight_map"),
        (INDEX, b"[]", "has no weight_map"),
    ],
)
def test_files_that_are_none_are_refused(model, name, content, said):
    (model / name).write_bytes(content)
    refused(model, said)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"hidden_size": [1]},
        {"num_attention_heads": 0},
        {"rope_scaling": 3},
        {"model_type": 3},
        {"model_type": "nothing"},
        {"vocab_size": None},
        {"layer_types": {"a": 1}},
        {"dtype": "float1"},
        {"quantization_config": []},
    ],
)
def test_configs_of_wrong_types_are_no_tracebacks(model, changes):
    from medusa_exp.model.loading import load_backbone

    (model / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError, match=r"model\.path="):
        load_backbone(ModelSpec(ModelConfig(path=str(model)), device="cpu"))


def test_what_nobody_opens_is_not_looked_at(model, monkeypatch):
    """Weights of other libraries beside ours, and what a training leaves."""
    (model / "flax_model.msgpack.index.json").write_text('{"weight_map": {"a": "a.msgpack"}}')
    monkeypatch.setattr("medusa_exp.model.limits._MOST_OF_OTHERS", 64)
    (model / "trainer_state.json").write_text(json.dumps(list(range(99))))
    ModelSpec(ModelConfig(path=str(model))).tokenizer_path()
    (model / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 1 << 20}))
    (model / "pytorch_model.bin").write_bytes(bytes(9))  # how many weights it has is not known
    os.utime(model, (1, 1))  # another look
    ModelSpec(ModelConfig(path=str(model))).tokenizer_path()
