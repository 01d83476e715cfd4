"""Responses that engines give to the stage are those of this process, whatever is killed."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from chat_files import conversation_record
from engine_stub import Engine
from sessions import documents_of
from tiny_models import build_model

from medusa_exp.config import Config, RegenerateConfig
from medusa_exp.errors import UserError
from medusa_exp.stages import regenerate, train
from medusa_exp.stages.session import Session

SUPPORT = Path(__file__).parents[1] / "support"


def write_chats(path: Path, number: int) -> None:
    """Write chats, every other one of two turns."""
    records = [conversation_record(i) for i in range(number)]
    for record in records[::2]:
        record["conversations"] += [
            {"from": "human", "value": "And more?"},
            {"from": "gpt", "value": "Two."},
        ]
    path.write_text(json.dumps(records))


@pytest.fixture
def exact(config, tokenizer, sharegpt_file, tmp_path) -> Config:
    write_chats(sharegpt_file, 40)
    # The model of `config` repeats itself: the new rows of its embedding are all about the same.
    build_model("llama", seed=1, vocab_size=len(tokenizer)).save_pretrained(config.model.path)
    config.dtype.precision = "32-true"
    config.regenerate = RegenerateConfig(16, num_val_documents=4, batch_size=8, max_new_tokens=10)
    config.decode.stop_ids = list(range(0, 250, 7))
    (tmp_path / "run").mkdir()
    return config


@pytest.fixture
def engine(exact, tmp_path):
    with Engine(Session(exact, tmp_path / "run").backbone()) as engine:
        yield engine


@pytest.mark.parametrize("end", ["returned", "named"])
def test_an_engine_gives_the_documents_that_this_process_gives(exact, engine, tmp_path, end):
    out, engine.end = tmp_path / "run", end
    regenerate.run(exact, out)
    expected = documents_of(exact, out)
    engine.faults = ["", "drop", "503", "cut"]
    exact.regenerate.server, exact.regenerate.server_concurrency = engine.url, 4
    session = Session(exact, out)
    metrics = regenerate.run(exact, out, session)
    assert documents_of(exact, out) == expected
    assert metrics["regenerate/documents"] == len(expected) == 20
    assert session.notes.entry["engines"] == [[f"{engine.url}/v1", "tiny", "stub-1"]]
    assert 1 < engine.most_at_once <= 4
    second = [body for body in engine.seen if len(body["prompt"]) > 32]
    assert second and metrics["regenerate/answers"] > 22  # of documents with another turn


def test_training_finds_what_an_engine_has_said(exact, engine, tmp_path):
    exact.regenerate.server = engine.url
    exact.train.text = "regenerated"
    regenerate.run(exact, tmp_path / "run")
    exact.regenerate.server = "http://elsewhere:1"  # nobody asks there
    exact.decode.verifier, exact.dtype.precision = "torch", "bf16-mixed"
    assert train.run(exact, tmp_path / "run")["train/steps"] == 12
    exact.regenerate.server = None
    with pytest.raises(UserError, match=r"regenerate\.server too: an engine's responses are kept"):
        train.run(exact, tmp_path / "run")


def test_an_engine_does_not_answer_beside_workers_or_heads():
    for options in ({"workers": 2}, {"use_heads": True}):
        with pytest.raises(UserError, match=r"regenerate\.server leaves the work to engines"):
            RegenerateConfig(server="http://a", **options)


def test_nothing_is_lost_or_twice_whatever_is_killed(exact, sharegpt_file, tmp_path):
    write_chats(sharegpt_file, 340)
    exact.regenerate.num_documents, exact.regenerate.num_val_documents = 190, 10
    exact.regenerate.max_new_tokens = 6
    config = tmp_path / "config.pickle"
    config.write_bytes(pickle.dumps(exact))
    found = subprocess.run(
        [sys.executable, SUPPORT / "killed_engines.py", config, tmp_path / "run", "3", "10"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    killed = result.pop("killed")
    assert result == {"status": 0, "number": 200, "same": True}
    assert sum(killed.values()) == 10 and len(killed) == 2
