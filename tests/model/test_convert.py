"""Old checkpoints: refused with a command that converts them, which runs no code of theirs."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import build_model

from medusa_exp.config import ModelConfig
from medusa_exp.errors import UserError
from medusa_exp.model import load_backbone
from medusa_exp.model.convert import convert, main
from medusa_exp.model.source import ModelSpec
from medusa_exp.runs.files import sha256_file


@pytest.fixture
def old(tmp_path):
    """Return a model, and its directory as one of years ago."""
    model = build_model("qwen2")  # its lm_head is its embedding
    directory = tmp_path / "old"
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return model, directory


def load(directory):
    return load_backbone(ModelSpec(ModelConfig(path=str(directory)))).model


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]], device=model.device)).logits.cpu()


def test_an_old_checkpoint_is_refused_with_the_command_that_converts_it(old):
    with pytest.raises(UserError, match=r"medusa_exp\.model\.convert .*old OUT; then set model"):
        load(old[1])


def test_gguf_is_refused_with_who_reads_it(old):
    directory = old[1]
    (directory / "pytorch_model.bin").rename(directory / "model.gguf")
    for name in ("", "config.json"):  # with a config, and without
        (directory / name).unlink() if name else None
        with pytest.raises(UserError, match=r"GGUF \(model\.gguf\) is not read .*save_pretrained"):
            load(directory)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_what_is_converted_is_the_same_model(old, tmp_path, caplog, legacy):
    model, directory = old
    if legacy:
        torch.save(
            model.state_dict(),
            directory / "pytorch_model.bin",
            _use_new_zipfile_serialization=False,
        )
    caplog.set_level(logging.INFO)
    out = convert(str(directory), tmp_path / "new")
    assert torch.equal(logits_of(load(out)), logits_of(model))
    assert not [*out.glob("*.bin*")]
    for path in (directory / "pytorch_model.bin", out / "model.safetensors"):
        assert sha256_file(path) in caplog.text


def test_shards(old, tmp_path):
    model, directory = old
    (directory / "pytorch_model.bin").unlink()
    tensors = model.state_dict()
    names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        shard = {name: tensors[name].clone() for name in tensors if names[name] == file}
        torch.save(shard, directory / file)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    out = convert(str(directory), tmp_path / "new")
    assert torch.equal(logits_of(load(out)), logits_of(model))
    assert not (out / index.name).exists()
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        convert(str(directory), tmp_path / "newer")


class Planted:
    """What a pickle may hold: a call, made where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_runs(old, tmp_path):
    planted = tmp_path / "planted"
    torch.save({"weight": Planted(str(planted))}, old[1] / "pytorch_model.bin")
    with pytest.raises(UserError, match="is refused: it is damaged, or holds more than tensors"):
        convert(str(old[1]), tmp_path / "new")
    assert not planted.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(b"PK nothing"), "is refused"),
        (lambda file: torch.save([torch.zeros(2)], file), "no table of tensors"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["damaged", "a list", "absent"],
)
def test_what_cannot_be_converted(old, tmp_path, spoil, message):
    spoil(old[1] / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        convert(str(old[1]), tmp_path / "new")


def test_nothing_is_overwritten(old, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", str(old[1]), str(tmp_path)])
    with pytest.raises(SystemExit, match="exists: name a directory that is yet to be made"):
        main()


def test_the_command(old, tmp_path):
    command = [sys.executable, "-m", "medusa_exp.model.convert", str(old[1]), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"model.path={tmp_path / 'new'}" in done.stderr
