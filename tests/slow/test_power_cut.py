"""Power is lost at any moment of a run: the same command makes of what is left the same run.

What is left is simulated (`tests/support/power_cut.py`): all names, and contents as last synced.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import SMOKE, medusa_exp, read

from medusa_exp.runs.metric_table import is_timed

pytestmark = pytest.mark.slow
CUT = Path(__file__).parents[1] / "support" / "power_cut.py"
RUN = [
    *SMOKE,
    *("dtype=fp32", "head.num_heads=1", "model.pretrain.hidden_size=16"),
    *("model.pretrain.intermediate_size=32", "model.pretrain.num_hidden_layers=1"),
    *("tokenizer.vocab_size=320", "tree=chain", "evaluate.num_prompts=2", "run_dir=done"),
    *("stages=[regenerate,train,evaluate]", "train.text=regenerated", "train.features=cache"),
    *("regenerate.num_documents=6", "regenerate.num_val_documents=2"),
    *("regenerate.max_new_tokens=8", "train.checkpoint_every=1"),
]
PRETRAINED = [*RUN, "stages=[pretrain,regenerate,train,evaluate]"]
EVERY = int(os.environ.get("POWER_CUT_EVERY", "7"))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory) -> Path:
    """Run once, and return the folder of what each cut would have left, the last of a whole run."""
    place, kept = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cuts")
    command = [sys.executable, str(CUT), str(kept), str(EVERY), *PRETRAINED]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return kept


def _numbers(place: Path) -> dict[str, float]:
    found = read(place / "done/metrics.json")
    return {name: value for name, value in found.items() if not is_timed(name)}


def test_no_name_is_there_before_its_contents(cuts):
    grow = (".lock", ".log", "history.jsonl")  # the last is synced with each checkpoint
    for cut in cuts.iterdir():
        empty = [str(p) for p in cut.rglob("*") if p.is_file() and not p.stat().st_size]
        assert all(n.endswith(grow) or ".partial-" in n for n in empty), (cut, empty)


def test_the_same_command_makes_the_same_run_of_what_is_left(cuts):
    *cut_short, whole = sorted(cuts.iterdir())
    assert cut_short
    weights = (whole / "done/heads/model.safetensors").read_bytes()
    for cut in cut_short:
        done = medusa_exp(*PRETRAINED, cwd=cut)
        assert done.returncode == 0, (cut, done.stderr)
        assert _numbers(cut) == _numbers(whole), cut
        assert (cut / "done/heads/model.safetensors").read_bytes() == weights, cut
        assert not list(cut.rglob("*.partial-*")), cut
