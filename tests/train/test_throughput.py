"""How fast a training is said to be: operations are those that torch counts, times are honest."""

import json
from types import SimpleNamespace

import architectures
import pytest
import torch
from tiny_models import build_model
from torch.utils.flop_counter import FlopCounterMode

from medusa_exp.config import LoraSettings
from medusa_exp.data.datamodule import collate
from medusa_exp.data.examples import Example
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.adapters import add_adapters
from medusa_exp.runs.machine import matrix_rate
from medusa_exp.stages import train
from medusa_exp.train import throughput
from medusa_exp.train.throughput import Operations, Throughput

ROWS = 24
FAMILIES = [
    {"kind": "medusa"},
    {"kind": "medusa", "num_layers": 2},
    {"kind": "medusa", "num_layers": 0},
    {"kind": "medusa_tied", "num_layers": 2},
    {"kind": "medusa_lowrank", "rank": 8},
    {"kind": "hydra", "num_layers": 2},
    {"kind": "rooted"},
    {"kind": "recurrent", "num_layers": 2},
]


def operations(backbone, heads, **how) -> Operations:
    return Operations.of(backbone, heads, **{"runs_layers": True, "asks_lm_head": True, **how})


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_operations_of_heads_are_those_that_torch_counts(backbone, family):
    backbone.model.requires_grad_(False)
    heads = build_heads(backbone, num_heads=2, **family)
    counted = operations(backbone, heads).of_label
    for k in range(2):
        drafted = (torch.ones(ROWS, k + 1, dtype=torch.long),) if heads.sees_tokens else ()
        with FlopCounterMode(display=False) as counter:
            heads.head_logits(k, torch.randn(ROWS, 32), *drafted).sum().backward()
        expected = counted[k + 1]
        if heads.is_recurrent and k:  # `head_logits` makes the states of the heads before it again
            expected += counted[1] - 6 * sum(p.numel() for p in heads.lm_heads.parameters_of(0))
        if k and heads.root_block is not None:  # so it does with the root
            expected += counted[1] - counted[2]
        assert counter.get_total_flops() == ROWS * expected
    with FlopCounterMode(display=False) as counter:
        backbone.next_logits(torch.randn(ROWS, 32))
    assert counter.get_total_flops() == ROWS * counted[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
def test_operations_of_a_backbone_are_those_that_torch_counts(architecture):
    backbone = Backbone(build_model(architecture))
    backbone.model.set_attn_implementation("eager")  # whose products torch counts on a CPU too
    found = operations(backbone, build_heads(backbone, num_heads=1))
    ids_BT = torch.randint(0, 64, (2, ROWS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.hidden_states(ids_BT)
    # What torch counts of attention are all pairs, those too that a mask leaves out.
    every_pair = 2 * ROWS * (found.of_token + ROWS * found.of_pair)
    assert counter.get_total_flops() == pytest.approx(every_pair, rel=0.02)


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe", "deepseek_v3"])
def test_operations_of_experts_are_those_of_the_ones_that_a_token_is_sent_to(name):
    """Experts that all share see every token."""
    backbone = Backbone(architectures.build(name, architectures.DECODED[name]))
    backbone.model.set_attn_implementation("eager")
    backbone.model.set_experts_implementation("eager")
    found = operations(backbone, build_heads(backbone, num_heads=1))
    ids_BT = torch.randint(0, 40, (2, ROWS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.hidden_states(ids_BT)
    every_pair = 2 * ROWS * (found.of_token + ROWS * found.of_pair)
    assert counter.get_total_flops() == pytest.approx(every_pair, rel=0.01)


def test_adapters_hide_no_weight_and_count_none_twice(backbone):
    pytest.importorskip("peft")
    before = operations(backbone, build_heads(backbone, num_heads=1)).of_token
    adapted = add_adapters(backbone, LoraSettings())
    new = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    after = operations(backbone, build_heads(backbone, num_heads=1)).of_token
    assert new and after == before + 2 * new


def test_operations_of_a_batch(backbone):
    heads = build_heads(backbone, num_heads=2)
    documents = [
        Example(torch.arange(1, n).int().numpy(), (torch.arange(1, n) > 4).numpy()) for n in (9, 13)
    ]
    batch = collate([documents], num_heads=2)
    found = operations(backbone, heads)
    pairs = 8 * 9 / 2 + 12 * 13 / 2
    of_labels = sum(n * len(i) for n, i in zip(found.of_label, batch.labeled, strict=True))
    of_backbone = 20 * found.of_token + pairs * found.of_pair
    assert found.of_batch(batch) == of_backbone + of_labels
    assert found.of_batch(batch, 2.0) == 2 * of_backbone + of_labels
    cached = operations(backbone, heads, runs_layers=False, asks_lm_head=False)
    assert cached.of_batch(batch) == of_labels - found.of_label[0] * len(batch.labeled[0])


def test_the_matrix_rate_draws_no_random_number():
    state = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32, 0.0)
    assert rate is not None and 1e8 < rate < 1e15
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_counted(backbone, monkeypatch):
    """Neither the first step, nor the time of a validation, a checkpoint or a measurement."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "matrix_rate", lambda *given: 1e6)
    heads = build_heads(backbone, num_heads=1)
    callback = Throughput(operations(backbone, heads))
    batch = collate([[Example(torch.arange(1, 11).int().numpy(), torch.ones(10).numpy() > 0)]])
    batch.labeled.append(batch.labeled[0])
    trainer = SimpleNamespace(
        accumulate_grad_batches=2, world_size=3, global_step=1, log_every_n_steps=100
    )
    module = SimpleNamespace(is_joint=lambda: False, device=torch.device("cpu"))

    def step(seconds):
        for place in range(2):
            now[0] += seconds / 2
            callback.on_train_batch_end(trainer, module, None, batch, place)

    step(100)
    assert callback.metrics() == {} and callback.describe() == ""
    step(2)
    step(4)
    assert callback.metrics()["train/tokens_per_second"] == 2 * 2 * 10 * 3 / 6
    for before in (
        lambda: callback.on_validation_start(trainer, module),
        lambda: callback.on_save_checkpoint(trainer, module, {}),
        lambda: callback.measure_rate(module.device, 60.0),
    ):
        before()
        now[0] += 50
        step(1)
    step(6)
    found = callback.metrics()
    assert found["train/tokens_per_second"] == 3 * 2 * 10 * 3 / 12
    assert found["train/mfu"] == 3 * 2 * callback.operations.of_batch(batch) / 12 / 1e6
    assert callback.describe().startswith("15 tokens/s, ") and "matrix rate" in callback.describe()


def test_a_training_says_how_fast_it_is(config, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("medusa_exp.train.trainer.LOG_EVERY", 1)
    monkeypatch.setattr("medusa_exp.runs.progress.BETWEEN_LINES", 0.0)
    (tmp_path / "run").mkdir()
    metrics = train.run(config, tmp_path / "run")
    names = {"train/tokens_per_second", "train/mfu", "train/peak_memory_gb"}
    assert all(metrics[name] > 0 for name in names) and metrics["train/mfu"] < 1
    text = (tmp_path / "run/history.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert names <= set(lines[-1] | lines[-2])
    assert "tokens/s, " in next(m for m in caplog.messages if m.startswith("training: 12 of 12"))
    assert "(a matrix product: " in caplog.text
