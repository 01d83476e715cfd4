"""Saved runs and YAML files of others: what they may not say, and that it says so in one line."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import OmegaConf

from medusa_exp.cli import compose
from medusa_exp.config import continuation, load_saved, register
from medusa_exp.config.trust import _check_passwords, check_saved
from medusa_exp.decode.decoder import Decoder
from medusa_exp.errors import UserError
from medusa_exp.stages.session import Session

COMMAND = ["stages=[report]"]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    place = tmp_path / "a run"
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra/config.yaml").write_text("seed: 3\n")
    (place / ".hydra/overrides.yaml").write_text("- seed=3\n")
    (place / "run.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    "planted",
    [
        "+hydra.callbacks.x._target_=torch.load",
        "+hydra.job.env_set.PATH=/tmp",
        "hydra/job_logging=none",
        "~hydra.callbacks",
        "+head@hydra.callbacks=x",
    ],
)
def test_no_saved_override_reaches_hydra(run_dir, planted):
    (run_dir / ".hydra/overrides.yaml").write_text(json.dumps(["seed=3", planted]))
    with pytest.raises(UserError, match=r"overrides\.yaml: .* take that line out"):
        continuation.arguments([*COMMAND, f"run_dir='{run_dir}'"])


def test_a_call_is_newer_than_whatever_lies_there(run_dir):
    call = [*COMMAND, f"run_dir='{run_dir}'"]
    assert continuation.newest_saved(run_dir) == run_dir / ".hydra/config.yaml"
    for name in (".hydra-x", ".hydra-2", ".hydra-17", ".hydra-30"):
        (run_dir / name).mkdir()
    for name in (".hydra-2", ".hydra-17"):  # the last was killed before it had written its own
        (run_dir / name / "config.yaml").touch()
    assert continuation.newest_saved(run_dir) == run_dir / ".hydra-17/config.yaml"
    assert continuation.arguments(call)[-1] == "hydra.output_subdir=.hydra-31"


def test_no_log_is_written_elsewhere(run_dir):
    log = run_dir / "medusa_exp.log"
    log.symlink_to("/dev/null")
    with pytest.raises(UserError, match=r"medusa_exp\.log is a link"):
        continuation.arguments([*COMMAND, f"run_dir='{run_dir}'"])
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(UserError, match=r"medusa_exp\.log is a pipe"):
        continuation.arguments([*COMMAND, f"run_dir='{run_dir}'"])


@pytest.mark.parametrize("text", ["3", "x", "{a: 1}", "[[1]]"])
def test_what_is_no_list_of_overrides_is_refused(run_dir, text):
    (run_dir / ".hydra/overrides.yaml").write_text(text)
    with pytest.raises(UserError, match=r"overrides\.yaml is no list"):
        continuation.arguments([*COMMAND, f"run_dir='{run_dir}'"])


def test_overrides_that_were_saved_go_on(run_dir):
    for written in (f"'{run_dir}'", str(run_dir).replace(" ", "\\ ")):
        call = [*COMMAND, f"run_dir={written}"]
        given = continuation.arguments(call)
        assert given == ["seed=3", *call, "hydra.mode=RUN", "hydra.output_subdir=.hydra-2"]


@pytest.mark.parametrize(
    ("text", "said", "key"),
    [
        ("model: {trust_remote_code: true}", [], "model.trust_remote_code"),
        ("model: {trust_remote_code: true}", ["seed"], "model.trust_remote_code"),
        ("name: '${oc.env:HOME}'", [], "name"),
        ("logger: {project: 'x${oc.decode:${oc.env:A}}'}", ["logger.tags"], "logger.project"),
        ("name: oc\nlogger: {project: '${${name}.env:A}'}", [], "logger.project"),
        ("name: env\nlogger: {project: 'x${oc.${name}:A}'}", [], "logger.project"),
        ("stages: '${logger.tags}'\nexport: {out: /etc/x}", [], "export.out"),
        ("stages: [export]\nexport: {out: /etc/x}", [], "export.out"),
        ("evaluate: {server: http://a}\nserving: {key_variable: K}", [], "serving.key_variable"),
    ],
)
def test_what_reaches_beyond_a_run_is_said_again(run_dir, text, said, key):
    saved = run_dir / ".hydra/config.yaml"
    saved.write_text(text)
    with pytest.raises(UserError, match=f"{key}=.* again on this command line"):
        check_saved(load_saved(saved), saved, said)
    check_saved(load_saved(saved), saved, [key])
    check_saved(load_saved(saved), saved, [key.split(".")[0]])


def test_a_config_of_ours_passes(run_dir):
    saved = run_dir / ".hydra/config.yaml"
    register()
    with initialize_config_module("medusa_exp.conf", version_base="1.3"):
        composed = hydra_compose("config", ["+experiment=rerun", "rerun.source=x", "run_dir=y"])
    saved.write_text(OmegaConf.to_yaml(composed))
    check_saved(load_saved(saved), saved)


def test_python_allows_code_of_a_model_by_an_argument(run_dir):
    (run_dir / ".hydra/config.yaml").write_text("model: {trust_remote_code: true}")
    with pytest.raises(UserError, match=r"Decoder\.from_run\(\.\.\., trust_remote_code=True\)"):
        Decoder.from_run(run_dir)
    session = Session.of_run(run_dir, trust_remote_code=True)
    assert session.config.model.trust_remote_code
    with pytest.raises(UserError, match=r"model\.path is not set"):
        Decoder.from_run(run_dir, trust_remote_code=True)


def test_aliases_are_not_expanded(run_dir):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (run_dir / ".hydra/config.yaml").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"has YAML aliases"):
        load_saved(run_dir / ".hydra/config.yaml")


@pytest.mark.parametrize(
    "value", ["${" * 9000 + "a" + "}" * 9000, "${oc.env:" + "x," * 9000 + "}"], ids=["deep", "long"]
)
def test_references_of_references_are_not_parsed(run_dir, value):
    (run_dir / ".hydra/config.yaml").write_text(f"name: '{value}'\n")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: its values with \$\{"):
        load_saved(run_dir / ".hydra/config.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=torch.load",
        "hydra.launcher._target_=os.system",
        "+hydra.job.env_set.PATH=/tmp",
        "+hydra.job_logging.handlers.x={class: logging.FileHandler, filename: /etc/x}",
        "+hydra.job_logging.formatters.x.class=os.system",
        "+hydra.job_logging.handlers.x.stream='ext://os.environ'",
        "hydra.job.name=../../x",
    ],
)
def test_no_node_of_hydra_names_code_or_places(override):
    register()
    with (
        initialize_config_module("medusa_exp.conf", version_base="1.3"),
        pytest.raises(HydraException, match=r"hydra\..*which no config may"),
    ):
        hydra_compose("config", [override], return_hydra_config=True)


@pytest.mark.parametrize("folder", ["experiment", "sweep"])
def test_an_experiment_of_others_names_no_code(tmp_path, folder):
    (tmp_path / folder).mkdir()
    text = "# @package _global_\nhydra: {callbacks: {x: {_target_: torch.load, f: x}}}\n"
    (tmp_path / folder / "bad.yaml").write_text(text)
    path = f"hydra.searchpath=[file://{tmp_path}]"
    with pytest.raises(UserError, match=r"hydra\.callbacks\.x\._target_=torch\.load names code"):
        compose([path, f"+{folder}=bad"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"num_heads": 1_000_000}, "num_heads"),
        ({"kind": "evil"}, "kind"),
        ({"hidden_size": "x"}, "hidden_size"),
    ],
)
def test_heads_that_are_none_are_refused(tmp_path, changes, said):
    from medusa_exp.model.checkpoint import load_heads

    shape = {"model_type": "medusa", "kind": "medusa", "num_heads": 1, "hidden_size": 8}
    written = json.dumps(shape | {"vocab_size": 16} | changes)
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(UserError, match=f"is no config of heads: .*{said}"):
        load_heads(tmp_path)


def test_heads_in_other_formats_and_of_no_numbers_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    from medusa_exp.model.checkpoint import load_heads
    from medusa_exp.model.heads import MedusaHeads, MedusaHeadsConfig

    heads = MedusaHeads(MedusaHeadsConfig(hidden_size=8, vocab_size=16, num_heads=1))
    heads.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    assert load_heads(tmp_path).num_heads == 1
    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    for broken in (weights[name] * float("nan"), torch.zeros(weights[name].shape, dtype=torch.int)):
        file = tmp_path / "model.safetensors"
        save_file(weights | {name: broken}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"are integers, or not all of them are finite"):
            load_heads(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors: heads are read from"):
        load_heads(tmp_path)


def test_no_password_is_kept_in_a_run(monkeypatch):
    key = "regenerate.server"
    with pytest.raises(UserError, match=rf"{key} is an address with a password") as caught:
        compose([f"{key}='http://me:p@ss@host:8000'"])
    assert "p@ss" not in str(caught.value)
    monkeypatch.setenv("ENGINE", "http://me:p@ss@host:8000")
    assert compose([f"{key}=${{oc.env:ENGINE}}"]).regenerate.server == "http://me:p@ss@host:8000"
    assert compose([f"{key}='http://host:8000/a@b'"]).regenerate.server


@pytest.mark.parametrize(
    ("kept", "is_refused"),
    [
        ("http://me:p@ss@host", True),
        ("http://me:pa/s?s#@host", True),
        ("http://hf_abcdefghijkl@host", True),
        ("http://a:1/ http://me:p://ss@host", True),
        ("https://host/v1?x=1&api_key=abc", True),
        ("s3://x/y?X-Amz-Signature=abc", True),
        ("http://host:8000/a@b", False),
        ("http://me:${oc.env:WORD}@host", False),
        ("ssh://git@host/a.git", False),
        ("https://host/v1?page=3", False),
        ("<img src='https://host/x.png'>", False),
        # Minutes, if each were followed to the end of the text.
        pytest.param("://?" * 60_000, False, id="many queries"),
        pytest.param("://a:" * 50_000, False, id="many users"),
    ],
)
def test_what_an_address_may_hold(kept, is_refused):
    with pytest.raises(ConfigCompositionException) if is_refused else nullcontext():
        _check_passwords({"logger": {"notes": kept}})


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("sk-abcdefghijkl", True),
        ("hf_abcdefghijklmnop", True),
        ("a" * 48, True),
        ("OPENAI_API_KEY", False),
        ("${oc.env:NAME}", False),
    ],
)
def test_a_key_is_no_name_of_a_variable(name, is_refused):
    with pytest.raises(ConfigCompositionException) if is_refused else nullcontext() as caught:
        _check_passwords({"serving": {"key_variable": name}})
    assert not is_refused or name not in str(caught.value)
