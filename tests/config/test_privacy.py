"""What is taken out of what is sent."""

import json
import os
import subprocess

import pytest
from omegaconf import OmegaConf

from medusa_exp.config import Config, named_variables, to_shareable
from medusa_exp.config.privacy import bare_remote, by_name, shareable, shareable_text, shell_command


def test_values_of_the_environment_are_sent_as_their_names(tmp_path):
    config = Config(seed=3, name="auto")
    config.tree.path = config.logger.notes = "secret"
    config.logger.tags = ["public", "auto", "one more"]
    config.dataset.path = "auto/chats"
    (tmp_path / "config.yaml").write_text(
        "seed: ${oc.decode:${oc.env:N,7}}\n"
        "name: auto\n"
        "run_dir: ${hydra:runtime.output_dir}\n"
        "tree: {path: '${oc.env:TOKEN}'}\n"
        "logger: {notes: '${tree.path}', tags: [public, '${oc.env:WHAT}']}\n"
        "dataset: {path: '${oc.env:WHAT}/chats'}\n"
    )
    found = to_shareable(config, tmp_path / "config.yaml")
    assert found["tree"]["path"] == found["logger"]["notes"] == "${oc.env:TOKEN}"
    assert found["dataset"]["path"] == "${oc.env:WHAT}/chats"
    assert found["logger"]["tags"] == ["public", "${oc.env:WHAT}", "one more"]
    assert found["seed"] == "${oc.env:N,7}"
    assert found["name"] == found["device"] == "auto"
    assert found["run_dir"] == config.run_dir


def test_configs_that_cannot_be_read_name_no_variables(monkeypatch, tmp_path):
    """They are looked at as a stage fails, whose own error is the one to be told."""
    monkeypatch.setenv("TOKEN", "secret")
    for name, content in ((".hydra", b"name: ${oc.env:TOKEN}\n"), (".hydra-2", b"\xff" * 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_bytes(content)
    (tmp_path / ".hydra-3").mkdir()
    os.mkfifo(tmp_path / ".hydra-3/config.yaml")
    assert named_variables("no secret", tmp_path) == "no ${oc.env:TOKEN}"


def test_variables_have_their_values_again(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("name: ${oc.env:TOKEN}\n")
    to_shareable(Config(), tmp_path / "config.yaml")
    monkeypatch.setenv("TOKEN", "secret")
    assert OmegaConf.load(tmp_path / "config.yaml").name == "secret"


def test_home_and_passwords_are_taken_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert shareable({"/home/ada/x": ["/home/ada", 3, ("/home/adam/x",)]}) == {
        "~/x": ["~", 3, ["/home/adam/x"]]
    }
    assert (
        shareable_text("git clone https://ada:pw@git.test/a@b") == "git clone https://git.test/a@b"
    )
    assert shareable_text("s=http://a:p@w@x:1,http://b:q@y/z") == "s=http://x:1,http://y/z"
    assert shareable_text("http://git.test?to=a@b") == "http://git.test?to=a@b"
    signed = "http://x/a?X-Amz-Signature=ab12&v=2;access_token=cd%3D34&n=1#top http://y?sig=a"
    bare = "http://x/a?X-Amz-Signature=***&v=2;access_token=***&n=1#top http://y?sig=***"
    assert shareable_text(signed) == bare
    text = json.dumps([{"a": "GET http://x/v1?api_key=K", "b": "<a href='http://x?key=K'>, \\"}])
    assert json.loads(shareable_text(text))[0] == {
        "a": "GET http://x/v1?api_key=***",
        "b": "<a href='http://x?key=***'>, \\",
    }
    for whole in ("Which key=value? No.", "a ? b&token=c", "http://a?x,http://b/token/c?y=1"):
        assert shareable_text(whole) == whole


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("https://me:p%40:s/w@git.test/r.git", "https://git.test/r.git"),
        ("https://ghp_token@git.test/r", "https://git.test/r"),
        ("https://me:p@s#s@git.test/r?private_token=x", "https://git.test/r"),
        ("me:word@git.test:r.git", "git.test:r.git"),
        ("git@git.test:me/r.git", "git@git.test:me/r.git"),
        ("/srv/r.git", "/srv/r.git"),
    ],
)
def test_a_remote_has_no_password(remote, shown):
    assert bare_remote(remote) == shown


def test_a_command_can_be_pasted_into_a_shell_of_another_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    words = ["a", "run_dir=/home/ada/it's $5", "n='x y'", "~", "b=/home/adam"]
    command = shell_command(words)
    assert "/home/ada/" not in command
    printed = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command}"],
        env={"HOME": "/home/bob"},
        capture_output=True,
        text=True,
        check=True,
    )
    words[1] = "run_dir=/home/bob/it's $5"
    assert printed.stdout.splitlines() == words


def test_files_of_equal_names_are_all_there():
    files = {"/a/x.json": "1", "/b/x.json": "2", "/b/y.json": "3", "/c/x.json": "4"}
    assert by_name(files) == {"x.json": "1", "x.json (2)": "2", "y.json": "3", "x.json (3)": "4"}
