"""What must stay the same to the last bit while code moves: a small run, and rendered chats.

`python tests/test_golden.py` writes the files in tests/golden anew, for a change that is meant.
Runs use the plainest instructions that every x86-64 processor has, so that nearly all is rounded
alike: the metrics are the same on all that were seen, and the heads' last bits are one of a few.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from chat_templates import TEMPLATES, TOKENIZERS, build_tokenizer

from medusa_exp.data import Conversation, Message, render
from medusa_exp.runs.files import read_json

GOLDEN = Path(__file__).with_name("golden")
ROUNDS_ALIKE = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "WANDB_MODE": "offline",
    "COVERAGE_PROCESS_CONFIG": "",
}
TIMED = (
    *("second", "speedup", "outside_backbone", "eval/time/", "baseline_vs_hf", "calibrate/"),
    *("train/mfu", "train/peak_memory", "why/"),
)
"""Texts inside the names of metrics that the clock or the machine decides."""
COMMON = (
    *("+experiment=smoke", "dtype=fp32", "seed=0", "device=cpu", "head.num_heads=4"),
    *("train.loss_form=recompute", "train.learning_rate=2e-3"),  # the defaults of the golden run
)
RUNS = {
    "chain": (*COMMON, "tree=chain"),
    "medusa_63": ("tree=medusa_63", "stages=[evaluate]"),
}
"""The second goes on in the directory of the first, with the same heads."""
MESSAGES = {
    "short": [("user", "a"), ("assistant", "b")],
    "system": [("system", "be brief"), ("user", "hello I am"), ("assistant", "I am a user")],
    "long": [("user", " x\n"), ("assistant", "  y \n"), ("user", "x"), ("assistant", "y")],
    "marks": [("user", "ASSISTANT: <|end|>"), ("assistant", "[/INST] <|user|> </s>")],
    "odd": [("user", "e\u0301\ud800"), ("assistant", "\U0001f600\ufb01"), ("user", "open")],
}


def golden_runs(folder: Path) -> dict[str, dict]:
    """Run the smoke experiment with each fixed tree; return what each left."""
    found = {}
    for name, arguments in RUNS.items():
        command = [sys.executable, "-m", "medusa_exp", *arguments, "run_dir=run"]
        environment = {**os.environ, **ROUNDS_ALIKE}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        metrics = json.loads((folder / "run/metrics.json").read_text())
        heads = (folder / "run/heads/model.safetensors").read_bytes()
        tree = read_json(folder / "run/tree.json")  # without its checksum
        found[name] = {
            "heads": hashlib.sha256(heads).hexdigest(),
            "tree": hashlib.sha256(json.dumps(tree).encode()).hexdigest(),
            "metrics": {k: v for k, v in metrics.items() if not any(word in k for word in TIMED)},
        }
    return found


def golden_renderings() -> dict[str, str]:
    """Render every conversation by every template and tokenizer; return a hash of each."""
    found = {}
    for template in TEMPLATES:
        for kind in TOKENIZERS:
            tokenizer = build_tokenizer(kind, TEMPLATES[template].source)
            for name, said in MESSAGES.items():
                conversation = Conversation("c", [Message(role, text) for role, text in said])
                rows = render(conversation, tokenizer)
                outputs = [[row.text, row.input_ids, list(row.is_trained)] for row in rows]
                text = json.dumps(outputs).encode()
                key = f"{template} / {kind} / {name}"
                found[key] = hashlib.sha256(text).hexdigest()[:16]
    return found


def of_known_heads(found: dict, known: list[str]) -> dict:
    """Return what a run left, with the heads named by the first of those that count as the same."""
    return {**found, "heads": known[0] if found["heads"] in known else found["heads"]}


def machine() -> list[str]:
    """Name what decides how numbers are rounded, given ROUNDS_ALIKE."""
    return [platform.machine(), torch.__version__.partition("+")[0]]


def test_a_run_is_equal_to_the_last_bit(tmp_path):
    golden = json.loads((GOLDEN / "runs.json").read_text())
    found = golden_runs(tmp_path)
    for name, expected in golden["runs"].items():
        if machine() == golden["machine"]:
            assert of_known_heads(found[name], golden["heads"]) == expected
        # Elsewhere numbers are rounded in other ways, and few-step training keeps that small.
        assert found[name]["metrics"] == pytest.approx(expected["metrics"], rel=0.1, abs=0.1)
        assert found[name]["tree"] == expected["tree"]


def test_renderings_are_equal():
    assert golden_renderings() == json.loads((GOLDEN / "renderings.json").read_text())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as there:
        found = golden_runs(Path(there))
        # To be added by hand: what processors of another make give of the same code.
        runs = {"machine": machine(), "heads": [found["chain"]["heads"]], "runs": found}
    (GOLDEN / "runs.json").write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
    texts = json.dumps(golden_renderings(), indent=1, sort_keys=True) + "\n"
    (GOLDEN / "renderings.json").write_text(texts)
