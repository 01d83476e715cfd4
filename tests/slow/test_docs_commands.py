"""Every command and all Python of README and docs: `nox -s docs_commands`.

On small settings, in one folder with a shared cache; docs/develop/testing.md says how pages mark
them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_files import conversation_record
from doc_commands import ROOT, SMALL, Block, blocks, in_place, overrides, script
from served_models import byte_tokenizer
from tiny_models import build_model

from medusa_exp import compose

NOT_COMPOSED = {
    "+experiment": "takes the place of the one that others are added to",
    "+sweep": "needs hydra's modes",
    "hydra": "needs launchers that are extras",
    "rerun.source": "goes with an experiment of its own",
}
"""Key, or its first word -> why an override of it is not composed here."""
GO_WITH_MORE = {
    "Ambiguous value": "values of a sweep",
    "heads_from is for runs that train no heads": "goes with other stages",
    "(with ": "goes with another key's word",
    "tree=custom needs either": "goes with one of its keys",
    "leaves stage evaluate no prompt": "goes with evaluate.path",
    "decode.draft=sampled goes with decode=sampling": "stands beside it on the page",
}
"""Part of a message -> why it is no fault of the page."""
SECONDS = 900
DONE: set[str] = set()
"""Commands that ran already: pages repeat some, word for word."""


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return what stands in the place of each word in capitals."""
    work = tmp_path_factory.mktemp("pages")
    tokenizer, model = byte_tokenizer(), build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    chats = work / "chats.json"
    chats.write_text(json.dumps([conversation_record(number) for number in range(40)]))
    torch.save({"0.0.linear.weight": torch.zeros(8, 8)}, work / "medusa_lm_head.pt")
    for name in ("scripts", "benchmarks", "docs", "constraints.txt", "pyproject.toml"):
        (work / name).symlink_to(ROOT / name)
    found = {
        "RUN_DIR": work / "run",
        "HEADS_DIR": work / "run" / "heads",
        "SWEEP_DIR": work / "sweeps",
        "FOLDER": work / "folder",
        "FILE": chats,
        "DIR": work / "model",
    }
    command = f"python -m medusa_exp +experiment=medusa1 model.path={found['DIR']} "
    command += f"dataset.path={chats} run_dir={found['RUN_DIR']} {' '.join(SMALL)}"
    run_bash(command, work)
    return found


def run_bash(commands: str, work: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "PYTHONWARNINGS": "default",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in blocks()])
def test_a_block_runs_as_its_page_says(block: Block, places: dict[str, Path]):
    if block.mark == "not run":
        pytest.skip(f"{block.name}: {block.words}")
    work = places["FILE"].parent
    (work / "folder").mkdir(exist_ok=True)
    # Each block is a reader's own: a sweep of one page is none of the next.
    of_block = {**places, "SWEEP_DIR": work / "sweeps" / block.name.replace("/", "-")}
    if block.language == "python":
        code = work / "block.py"
        code.write_text(in_place(block.code, of_block))
        run_bash(f"python {code}", work)
    elif (commands := script(block, of_block)) not in DONE:
        run_bash(commands, work)
        DONE.add(commands)


def test_every_override_of_the_pages_composes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ENGINE_URL", "http://localhost:8000")
    faults, tried = [], set()
    for page, words in overrides():
        keys = {word.partition("=")[0] for word in words}
        firsts = {key.split(".")[0].split("/")[0] for key in keys}
        is_a_form = any("..." in word or "NAME" in word for word in words)
        if (keys | firsts) & {*NOT_COMPOSED} or tuple(words) in tried or is_a_form:
            continue
        tried.add(tuple(words))
        base = ["+experiment=medusa1", "model.path=DIR", "dataset.path=FILE"]
        try:
            compose([*base, *words])
        except Exception as error:
            if any(part in str(error) for part in GO_WITH_MORE):
                continue
            faults.append(f"{page}: {' '.join(words)}: {str(error).splitlines()[0]}")
    assert faults == []
    assert len(tried) > 100
