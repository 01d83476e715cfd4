"""Heads on the hub: what is uploaded, what never is, and what is said where it cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stub import HubStub

from medusa_exp import hub
from medusa_exp.errors import UserError
from medusa_exp.stages.heads_card import CARD

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a run directory with heads, and with much that is nobody's business."""
    out = tmp_path / "run"
    for folder in ("heads", "checkpoints", ".hydra", "wandb"):
        (out / folder).mkdir(parents=True)
        (out / folder / "secret.txt").write_text(TOKEN)
    config = {"kind": "medusa", "num_heads": 2, "backbone": f"{tmp_path}/private/llama"}
    (out / "heads" / "config.json").write_text(json.dumps(config))
    (out / "heads" / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (out / "heads" / "tokenizer.json").write_text("{}")
    (out / "heads" / "tokenizer_source.json").write_text(json.dumps({"path": str(tmp_path)}))
    (out / "heads" / CARD).write_text("# Heads\n")
    (out / "tree.json").write_text('{"parents": [-1], "ranks": [-1]}')
    (out / "checkpoints" / "last.ckpt").write_bytes(b"x")
    return out


def push(run: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(run.parent / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "medusa_exp.hub", "push", str(run), name]
    return subprocess.run(
        command, env={**plain, **home, **environment}, capture_output=True, text=True, timeout=120
    )


def test_heads_tree_and_card_are_uploaded_and_nothing_else(run):
    with HubStub() as stub:
        done = push(run, "me/heads", HF_ENDPOINT=stub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/heads") and TOKEN not in done.stdout + done.stderr
    assert set(stub.files) == {
        *("config.json", "model.safetensors", "tokenizer.json", "tree.json", "README.md")
    }
    assert stub.files["model.safetensors"] == (run / "heads/model.safetensors").read_bytes()
    assert json.loads(stub.files["config.json"])["backbone"] == "llama"
    assert stub.tokens == {f"Bearer {TOKEN}", ""} or stub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in stub.files.values())
    assert [(asked["name"], asked["organization"]) for asked in stub.created] == [("heads", "me")]


def test_a_hub_that_refuses_is_one_line(run):
    with HubStub(refuses=True) as stub:
        done = push(run, "me/heads", HF_ENDPOINT=stub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("the hub did not take me/heads: ") and "403" in line


def test_no_hub_is_one_line(run):
    with HubStub() as stub:
        gone = stub.url
    done = push(run, "me/heads", HF_ENDPOINT=gone, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the hub did not take me/heads: " in done.stderr


def test_without_a_token_nothing_is_asked(run):
    with HubStub() as stub:
        done = push(run, "me/heads", HF_ENDPOINT=stub.url)
    assert done.returncode == 1 and not stub.created
    assert done.stderr == (
        "no token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN.\n"
    )


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("heads/README.md", "at {home}/models", "README.md would publish a path of this machine"),
        ("heads/tokenizer_config.json", '{{"a": ["{run}/x"]}}', "a path of this machine"),
        ("heads/chat_template.jinja", "x {secret}", "environment variable WANDB_API_KEY"),
    ],
)
def test_no_path_and_no_secret_is_published(run, monkeypatch, tmp_path, file, text, what):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HOME", "/home/somebody")
    words = {"home": "/home/somebody", "run": run.resolve(), "secret": "0123456789abcdef"}
    (run / file).write_text(text.format(**words))
    with pytest.raises(UserError, match=what):
        hub.push(run, "me/heads")


@pytest.mark.parametrize("place", ["/app", "/root"])
def test_a_token_that_is_named_as_a_place_is_no_path(run, monkeypatch, tmp_path, place):
    monkeypatch.setenv("HOME", place)
    folder = tmp_path / "staged"
    folder.mkdir()
    (run / "heads" / "tokenizer.json").write_text(json.dumps({"vocab": {place: 7}}))
    hub.stage(run, folder)
    hub.check_contents(folder, run, {})
    (folder / "README.md").write_text(f"of {place}/models/llama")
    with pytest.raises(UserError, match="a path of this machine"):
        hub.check_contents(folder, run, {})


@pytest.mark.parametrize("name", ["heads", "a/b/c", "https://huggingface.co/a/b", "me/", ""])
def test_a_name_that_is_none(run, name):
    with pytest.raises(UserError, match="OWNER/NAME"):
        hub.push(run, name)


def test_files_that_no_run_has_written_are_not_published(run, tmp_path):
    (tmp_path / "folder").mkdir()
    with (run / "tree.json").open("wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(UserError, match=r"tree\.json is larger than 256 MiB"):
        hub.stage(run, tmp_path / "folder")
    (run / "tree.json").unlink()
    (run / "heads" / "config.json").write_text('{"kind": "\\ud800"}')
    with pytest.raises(UserError, match=r"config\.json holds text that is none of Unicode"):
        hub.stage(run, tmp_path / "folder")


def test_a_run_without_heads(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json and no model\.safetensors"):
        hub.push(tmp_path, "me/heads")


def test_names_on_the_hub_stay(run, tmp_path):
    config = run / "heads" / "config.json"
    config.write_text(json.dumps({"backbone": "meta/llama", "_name_or_path": ""}))
    (tmp_path / "staged").mkdir()
    hub.stage(run, tmp_path / "staged")
    staged = json.loads((tmp_path / "staged" / "config.json").read_text())
    assert staged == {"backbone": "meta/llama", "_name_or_path": ""}
    assert json.loads(config.read_text())["backbone"] == "meta/llama"
