"""Causes of a small speed-up, planted in real evaluations: each is found, and its advice is given.

A tiny Llama on one thread: what a cause costs is made far larger than all else, so that a busy
machine changes nothing.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from chat_files import conversation_record
from cli_runs import medusa_exp, read
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp.config import Config
from medusa_exp.decode.step import EagerStep
from medusa_exp.model import build_heads
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.runs.files import read_json
from medusa_exp.stages import evaluate
from medusa_exp.stages.session import Session

BACKWARDS = (
    '{% for m in messages %}{% if m.role == "user" %}{{ m.content | upper | reverse }}zq'
    "{% else %}{{ m.content }}zq{% endif %}{% endfor %}"
)
TRAINED = (
    *("+experiment=smoke", "device=cpu", "run_dir=run", "cache_dir=cache", "logger=none"),
    *("stages=[pretrain,train]", "tree=chain", "dataset=sharegpt", "dataset.path=sums.json"),
    *("model.pretrain.hidden_size=64", "model.pretrain.intermediate_size=128", "dtype=fp32"),
    *("model.pretrain.max_steps=120", "model.pretrain.batch_tokens=1024", "head.num_heads=4"),
    *("train.max_steps=150", "train.val_every=150", "train.batch_tokens=1024"),
    *("decode.max_new_tokens=24", "evaluate.num_prompts=8", "evaluate.baselines=[]"),
)
SUM = "The sum of {} and 1 is of course {}, my friend. Ask me for more of these!"


def sum_chat(number: int) -> dict:
    said = SUM.format(number, number + 1)
    turns = [("human", f"What is {number} + 1?"), ("gpt", said)]
    return {"id": f"s-{number}", "conversations": [{"from": f, "value": v} for f, v in turns]}


def session_of(config: Config, tmp_path: Path, tokenizer, *, hidden: int, **heads) -> Session:
    """Return a session of a run with random heads, for a Llama of such a width."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    model.save_pretrained(config.model.path)
    records = [conversation_record(number) for number in range(64)]
    Path(config.dataset.path).write_text(json.dumps(records))
    config.dataset.test_fraction = 0.5
    config.evaluate.num_prompts, config.evaluate.baselines = 4, []
    config.decode.max_new_tokens, config.decode.stop_ids = 24, []
    config.tree.kind, config.device, config.run_dir = "chain", "cpu", str(tmp_path / "run")
    session = Session(config, tmp_path / "run")
    save_heads(build_heads(session.backbone(), **{"num_heads": 2, **heads}), session.out / "heads")
    return session


def wide(config: Config, num_nodes: int) -> None:
    """Have a tree of so many nodes, all of them guesses of the first head."""
    config.tree.kind, config.tree.paths = "custom", [[rank] for rank in range(num_nodes - 1)]


def evaluated(session: Session) -> tuple[dict, list[str]]:
    """Return the shares of the last waterfall, which add up, and what is advised."""
    metrics = evaluate.run(session.config, session.out, session)
    why = read_json(session.out / "why.json")
    shares = {part["name"]: part["share"] for part in why["waterfalls"][-1]["parts"]}
    size = why["waterfalls"][-1]["batch_size"]
    assert sum(shares.values()) + metrics[f"why/b{size}/kept"] == pytest.approx(1, abs=0.01)
    return shares, why["advice"]


def largest(shares: dict[str, float]) -> str:
    return max(shares, key=lambda name: shares[name])


def test_heavy_heads(config, tmp_path, tokenizer):
    session = session_of(config, tmp_path, tokenizer, hidden=256, num_heads=8, num_layers=16)
    shares, advice = evaluated(session)
    assert largest(shares) == "heads", shares
    assert "take head.num_layers=1, which is 16 now" in advice[0]


def test_a_wide_tree(config, tmp_path, tokenizer):
    session = session_of(config, tmp_path, tokenizer, hidden=512, num_heads=1)
    wide(config, 200)
    shares, advice = evaluated(session)
    assert largest(shares) == "width", shares
    assert (
        "the 200 nodes of the tree" in advice[0] and "tree=calibrated` takes as many" in advice[0]
    )


def test_a_large_batch(config, tmp_path, tokenizer):
    session = session_of(config, tmp_path, tokenizer, hidden=384, num_heads=1)
    wide(config, 8)
    config.evaluate.batch_sizes, config.evaluate.num_prompts = [1, 24], 24
    shares, advice = evaluated(session)
    assert largest(shares) == "batch", shares
    assert "24 prompts at a time keep the device busy without drafts" in advice[-1]


def test_a_slow_host(config, tmp_path, tokenizer, monkeypatch):
    session = session_of(config, tmp_path, tokenizer, hidden=64)
    keep = EagerStep.keep_rows

    def slowly(self, places):
        time.sleep(0.03)
        keep(self, places)

    monkeypatch.setattr(EagerStep, "keep_rows", slowly)
    shares, advice = evaluated(session)
    assert largest(shares) == "host", shares
    assert "The host takes" in advice[0] and "decode.compile=true" in advice[0]


def test_another_chat_template_than_in_training(tmp_path):
    """A model learns to answer sums, and heads what it says; then prompts come from their end."""
    (tmp_path / "sums.json").write_text(json.dumps([sum_chat(number) for number in range(300)]))
    trained = medusa_exp(*TRAINED, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    known = medusa_exp("stages=[evaluate]", "run_dir=run", cwd=tmp_path)
    assert known.returncode == 0, known.stderr
    found = read(tmp_path / "run/why.json")
    [gap] = [p for p in found["waterfalls"][0]["parts"] if p["name"] == "acceptance"]
    assert abs(gap["share"]) < 0.1 and "chat template" not in "".join(found["advice"])

    template = f"tokenizer.chat_template='{BACKWARDS}'"
    other = medusa_exp("stages=[evaluate]", "run_dir=run", template, cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    found = read(tmp_path / "run/why.json")
    shares = {part["name"]: part["share"] for part in found["waterfalls"][0]["parts"]}
    assert largest(shares) == "acceptance", shares
    assert "the chat template differs from what the heads were trained with" in found["advice"][0]
    assert "Acceptance falls from" in other.stdout
