"""Stage export, and heads that are not for this model: of other formats, for other weights."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from report_pages import WHY
from safetensors.torch import load_file, save_file
from sessions import session_of
from tiny_models import build_model
from transformers import AutoModelForCausalLM

from medusa_exp.errors import UserError
from medusa_exp.export.card import command
from medusa_exp.export.check import check
from medusa_exp.export.settings import chain_rates, schedule, settings
from medusa_exp.model import Backbone, build_heads, save_heads, save_tokenizer
from medusa_exp.runs.files import write_json, write_jsonl
from medusa_exp.stages.export import run
from medusa_exp.tree import chain
from medusa_exp.tree.calibration import Timing, choose, heads_sha256, save_calibration, summarize
from medusa_exp.tree.search import best_tree


def heads_of(config, seed=0, **family):
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(config.model.path))
    torch.manual_seed(seed)
    heads = build_heads(backbone, num_heads=3, **(family or {"kind": "medusa"}))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return heads


@pytest.fixture
def finished(config, tmp_path):
    """The config of a run that has heads, and what calibrate and evaluate leave."""
    config.run_dir = str(tmp_path / "run")
    out = tmp_path / "run"
    save_heads(heads_of(config), out / "heads")
    save_calibration(calibration_of(heads_sha256(out)), out)
    chain(3).save(out / "tree.json")
    records = [
        {"method": "chain", "batch_size": 1, "accept_lengths": [1, 4, 2, 1, 3]},
        {"method": "tree", "batch_size": 1, "accept_lengths": [1, 1, 1, 1, 1]},
        {"method": "chain", "batch_size": 2, "accept_lengths": [1, 1, 1, 1, 1]},
    ]
    write_jsonl(out / "records.jsonl", [{"category": "math", **record} for record in records])
    write_json(out / "metrics.json", {"eval/speedup": 1.5, "eval/is_lossless": 1.0})
    return config


def calibration_of(digest):
    """A calibration of heads of which the first is right half of the time, at two batch sizes."""
    ranks = [np.array([[0, 0, 3], [9, 9, 9]] * 8)]
    trees = list(dict.fromkeys(best_tree(ranks, size, 9) for size in (2, 3, 4)))
    curves = [
        choose(ranks, Timing(size, {tree: 1 + cost * len(tree) for tree in trees}, 1.0, 1.0))
        for size, cost in ((1, 0.01), (8, 5.0))
    ]
    return summarize(curves, ranks, 9, choices=trees[-1], heads_sha256=digest)


def test_an_export_has_what_one_serves_it_with(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(finished, tmp_path / "run") == {}
    place = tmp_path / "run" / "export" / "vllm"
    names = {path.name for path in place.iterdir()}
    beside = {"README.md", "tree.json", "calibration.json", "speculative_config.json"}
    assert names == {"config.json", "model.safetensors", *beside}
    assert "read back" in caplog.text and f'"model": "{place}"' in caplog.text
    found = json.loads((place / "speculative_config.json").read_text())
    assert found["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 3}
    assert found["synthetic_acceptance_rates"] == [0.75, 0.5, 0.25]
    assert found["num_speculative_tokens_per_batch_size"] == [[1, 7, 3], [8, 8, 0]]
    card = (place / "README.md").read_text()
    assert "license: unknown" in card and "vllm serve TARGET" in card and "1.50x" in card
    assert str(tmp_path) not in card  # nothing of this machine
    assert "base_model" not in card  # a local directory is none that the hub knows
    assert check(str(place), finished.model.path, "cpu")[1] != []  # random heads: accept nothing


@pytest.mark.parametrize("format_", ["vllm_medusa", "tgi", "mlc"])
def test_every_format_by_its_word(finished, tmp_path, format_, caplog):
    caplog.set_level(logging.INFO)
    finished.export.format, finished.export.out = format_, str(tmp_path / "out")
    finished.export.license, finished.export.dtype = "apache-2.0", "bfloat16"
    for _ in range(2):  # an export may be made anew
        run(finished, tmp_path / "run")
    assert [fault for fault in check(str(tmp_path / "out"))[1] if fault.is_error] == []
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert {
        t.dtype for t in load_file(next((tmp_path / "out").glob("*.safetensors"))).values()
    } == {torch.bfloat16}


def test_a_whole_model_is_known_by_what_it_is(finished, tmp_path):
    """What it generates is in test_export_whole_model.py."""
    before = (tmp_path / "run" / "heads" / "config.json").read_bytes()
    finished.export.format = "hf_generate"
    run(finished, tmp_path / "run")
    place = tmp_path / "run" / "export" / "hf_generate"
    what, faults = check(str(place))
    assert faults == [] and "heads of this project: 3 heads" in what
    assert "loaded by: transformers with medusa_exp installed beside it" in what
    assert "loaded by: medusa_exp itself" in check(str(place / "heads"))[0]
    assert (tmp_path / "run" / "heads" / "config.json").read_bytes() == before


def test_tied_heads_are_exported_with_the_targets_matrix(finished, tmp_path):
    save_heads(heads_of(finished, kind="medusa_tied"), tmp_path / "run" / "heads")
    (tmp_path / "run" / "calibration.json").unlink()
    finished.export.format = "vllm_medusa"
    run(finished, tmp_path / "run")
    written = load_file(tmp_path / "run" / "export" / "vllm_medusa" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(finished.model.path)
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("kind", ["link", "dangling", "in a file", "config", "code"])
def test_a_place_that_is_no_exports_is_left_alone(finished, tmp_path, kind):
    place, file = tmp_path / "place", tmp_path / "file"
    file.write_text("5")
    if kind in ("link", "dangling"):
        place.symlink_to(tmp_path if kind == "link" else "nowhere")
    elif kind == "in a file":
        place = file / "place"
    elif kind == "config":
        place.mkdir()
        (place / "config.json").write_text("5")
    else:
        (place / "custom_generate").mkdir(parents=True)
        (place / "custom_generate" / "generate.py").write_text("of others")
    finished.export.out = str(place)
    with pytest.raises(UserError, match=r"export.out=.*: name a new directory"):
        run(finished, tmp_path / "run")
    assert file.read_text() == "5" and (kind != "code" or any(place.iterdir()))


def test_what_is_refused(finished, tmp_path):
    out = tmp_path / "run"
    finished.export.out = str(out)
    with pytest.raises(UserError, match=r"export.out=.* is there already, and holds no export"):
        run(finished, out)
    finished.export.out = None
    save_heads(heads_of(finished, kind="hydra"), out / "heads")
    finished.export.format = "tgi"
    with pytest.raises(UserError, match=r"export.format=tgi cannot hold the heads of this run"):
        run(finished, out)
    finished.export.format = "vllm"
    other = build_model("llama", seed=5)
    other.resize_token_embeddings(260)
    other.save_pretrained(finished.model.path)
    with pytest.raises(UserError, match=r"identity|vocabulary"):
        run(finished, out)
    assert not (out / "export").exists()


def test_rates_of_a_chain_fall(finished, tmp_path):
    calibration = calibration_of("x")
    rates, source = chain_rates([], calibration, 3)
    assert source == "estimated from the calibration"
    assert 1 >= rates[0] >= rates[1] >= rates[2] >= 0
    assert chain_rates([], None, 3) is None
    assert schedule(calibration, [0.0, 0.0, 0.0]) == [[1, 7, 0], [8, 8, 0]]
    with pytest.raises(UserError, match="shares of 3 heads, and there are 4"):
        chain_rates([], calibration, 4)
    assert settings("tgi", 3, [], calibration) is None
    assert "num_speculative_tokens_per_batch_size" not in settings("vllm", 3, [], None)


def test_what_whole_responses_took_says_when_an_engine_stops(finished, tmp_path):
    write_json(tmp_path / "run" / "why.json", {**WHY, "schedule": [[1, 5, 3], [6, 8, 0]]})
    run(finished, tmp_path / "run")
    place = tmp_path / "run" / "export" / "vllm"
    found = json.loads((place / "speculative_config.json").read_text())
    assert found["num_speculative_tokens_per_batch_size"] == [[1, 5, 3], [6, 8, 0]]
    assert "which batch size (measured over whole responses)" in (place / "README.md").read_text()


def test_commands_are_quoted():
    assert command("tgi", "t", "/a b", 3) == "text-generation-launcher --model-id '/a b'"
    assert command("vllm_medusa", "org/t", "d", 2) == (
        "vllm serve org/t --speculative-config "
        '\'{"model": "d", "method": "medusa", "num_speculative_tokens": 2}\''
    )
    assert command("mlc", "t", "d", 2).count("\n") == 2


def foreign(config, place, **family):
    """Write heads that do not say for which weights they were trained."""
    save_heads(heads_of(config, **family), place / "run" / "heads")
    config.run_dir, config.export.format = str(place / "run"), "vllm_medusa"
    run(config, place / "run")
    exported = place / "run" / "export" / "vllm_medusa"
    file = exported / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in said.items() if "backbone" not in k}))
    config.run_dir = str(place / "second")
    return exported


def test_heads_of_unknown_origin_are_tried_once(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config.heads_from = str(foreign(config, tmp_path))
    config.decode.max_new_tokens = 8
    session_of(config).adopt_heads(config.heads_from)
    assert "nothing says for which weights they were trained" in caplog.text
    first = session_of(config).decoder(is_tree_known=False)
    assert "the first choice of each head is this backbone's token for" in caplog.text
    noted = json.loads((tmp_path / "second" / "imported_heads.json").read_text())
    assert len(noted["first_choices"]) == 3 and noted["num_prompts"] >= 1
    caplog.clear()
    session_of(config).decoder(is_tree_known=False)
    assert "first choice" not in caplog.text
    config.run_dir = str(tmp_path / "run")
    own = session_of(config).decoder(is_tree_known=False)
    states = torch.randn(4, first.backbone.hidden_size)
    assert torch.equal(first.heads(states), own.heads(states))


def test_heads_tied_to_the_matrix_of_another_model_are_refused(config, tmp_path):
    config.heads_from = str(foreign(config, tmp_path, kind="medusa_tied"))
    file = tmp_path / "run" / "export" / "vllm_medusa" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, file)
    session_of(config).adopt_heads(config.heads_from)
    with pytest.raises(UserError, match="tied to an lm_head that came with them"):
        session_of(config).decoder(is_tree_known=False)


def fine_tuned(config, tmp_path):
    """Let the config name a model of the same lm_head and final norm, with other layers."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight.mul_(1.01)
    place = tmp_path / "fine-tuned"
    model.save_pretrained(place)
    for file in Path(config.model.path).iterdir():
        if not (place / file.name).exists():
            shutil.copy(file, place)
    config.model.path = str(place)


def test_heads_for_other_weights_are_measured_or_refused(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    record = tmp_path / "run" / "imported_heads.json"
    session_of(finished).decoder(is_tree_known=False)
    assert not record.exists() and not caplog.messages
    fine_tuned(finished, tmp_path)
    finished.decode.max_new_tokens = 8
    session_of(finished).decoder(is_tree_known=False)
    assert "were trained for other weights of" in caplog.text
    assert "the first choice of each head is this backbone's token for" in caplog.text
    assert len(json.loads(record.read_text())["first_choices"]) == 3
    finished.heads_match = "strict"
    with pytest.raises(UserError, match=r"other weights.*or set heads_match=warn"):
        session_of(finished).decoder(is_tree_known=False)
    caplog.clear()
    finished.heads_match = "any"
    session_of(finished).decoder(is_tree_known=False)
    assert "other weights" not in caplog.text


def test_heads_that_do_not_say_for_which_weights_are_taken(finished, tmp_path, caplog):
    path = tmp_path / "run" / "heads" / "config.json"
    said = json.loads(path.read_text())
    del said["backbone_weights"]
    path.write_text(json.dumps(said))
    path.with_name("sha256.json").unlink()  # whoever wrote no such weights wrote no seal
    fine_tuned(finished, tmp_path)
    finished.heads_match = "strict"
    session_of(finished).decoder(is_tree_known=False)
    assert "other weights" not in caplog.text


def test_another_tokenizer_than_the_heads_were_trained_with_is_refused(finished, tmp_path, caplog):
    session = session_of(finished)
    save_tokenizer(session.tokenizer(), session.spec, tmp_path / "run" / "heads")
    session.decoder(is_tree_known=False)
    other = tmp_path / "other"
    shutil.copytree(finished.model.path, other)
    backend = json.loads((other / "tokenizer.json").read_text())
    backend["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(backend))
    finished.tokenizer.path = str(other)
    with pytest.raises(UserError, match=r"with other tokens than this.*or heads_match=any"):
        session_of(finished).decoder(is_tree_known=False)
    finished.heads_match = "any"
    session_of(finished).decoder(is_tree_known=False)
    assert "with other tokens" in caplog.text
