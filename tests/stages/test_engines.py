"""Engines that are measured from outside, and how stages know that they are right."""

import json
from dataclasses import replace

import pytest
import torch
from engine_stub import Engine
from tiny_models import build_model

from medusa_exp.config import Config, ServingConfig
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import GREEDY
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.runs.files import read_json, read_jsonl
from medusa_exp.runs.metric_table import metric_of
from medusa_exp.runs.record import _LEFT_BY
from medusa_exp.serving import measurement
from medusa_exp.serving.client import Probe
from medusa_exp.serving.measurement import Drafts, _between, of_answers, positions_of, read_counters
from medusa_exp.stages import evaluate
from medusa_exp.stages.engines import SERVING, SERVING_RECORDS, _is_same, _levels, open_engines
from medusa_exp.stages.session import Session
from medusa_exp.tracking.run_report import write_report

NUM_PROMPTS, NEW_TOKENS = 4, 20


@pytest.fixture
def run(config: Config, tokenizer, tmp_path):
    """A run with heads that guess right now and then, and a session of it."""
    build_model("llama", seed=4, vocab_size=len(tokenizer), spread=2).save_pretrained(
        config.model.path
    )
    config.evaluate.num_prompts, config.evaluate.warmup_prompts = NUM_PROMPTS, 1
    config.evaluate.baselines, config.evaluate.server_concurrency = ["chain"], [1, 4]
    config.decode.max_new_tokens = NEW_TOKENS
    config.tree.kind, config.device, config.run_dir = "chain", "cpu", str(tmp_path / "run")
    session = Session(config, tmp_path / "run")
    # New heads repeat what the backbone says next, which is right now and then.
    save_heads(build_heads(session.backbone(), num_heads=2), tmp_path / "run" / "heads")
    return session


def test_the_report_shows_what_users_of_an_engine_have(run, tmp_path):
    decoder = run.decoder()
    with Engine(decoder.backbone) as heads, Engine(decoder.backbone) as plain:
        heads.decoder = decoder
        run.config.evaluate.server, run.config.evaluate.server_plain = heads.url, plain.url
        metrics = evaluate.run(run.config, run.out, run)
    for level in (1, 4):
        assert metrics[f"eval/server/c{level}/identical_fraction"] == 1
        assert metrics[f"eval/server_plain/c{level}/identical_fraction"] == 1
        rates = [
            metrics[f"eval/{s}/c{level}/tokens_per_second"] for s in ("server", "server_plain")
        ]
        assert metrics[f"eval/server/c{level}/speedup"] == pytest.approx(rates[0] / rates[1])
        assert 0 < metrics[f"eval/server/c{level}/ms_per_token"] < 1e4
    for name in ("tokens_per_step", "accepted_position1", "accepted_position2"):
        assert metrics[f"eval/server/{name}"] == metrics[f"eval/server/predicted_{name}"]
    assert 0 < metrics["eval/server/accepted_position1"] < 1
    assert all(metric_of(name) for name in metrics)
    about = read_json(run.out / SERVING)
    assert about["heads"]["drafts"]["1"] == about["heads"]["predicted_drafts"]
    assert about["heads"]["fingerprint"] == "stub-1" and not about["plain"]["drafts"]
    assert {SERVING, SERVING_RECORDS} <= {*_LEFT_BY["evaluate"]}, "whose sha256 run.json has"
    records = read_jsonl(run.out / SERVING_RECORDS)
    assert len(records) == 2 * 2 * NUM_PROMPTS
    assert sum(r["new_tokens"] for r in records) == 4 * sum(
        record["new_tokens"]
        for record in read_jsonl(run.out / "records.jsonl")
        if record["method"] == "plain"
    )
    (run.out / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(run.out).read_text()
    assert "Measured from outside" in page and "stub-1" in page


def test_an_engine_that_tells_nothing_is_measured_for_its_speed(run, caplog):
    decoder = run.decoder()
    with Engine(decoder.backbone) as engine:
        run.config.evaluate.server = engine.url
        metrics = evaluate.run(run.config, run.out, run)
    assert metrics["eval/server/c4/tokens_per_second"] > 0
    assert "eval/server/tokens_per_step" not in metrics and "no counters of drafts" in caplog.text
    assert "eval/server/c4/speedup" not in metrics


def test_an_engine_that_others_use_has_no_counters_of_its_own(run, caplog, monkeypatch):
    monkeypatch.setattr(measurement, "_SETTLED", 0.01)  # they never settle, which takes 25 readings
    decoder = run.decoder()
    with Engine(decoder.backbone) as engine:
        engine.decoder = decoder
        read = engine.get

        def get(handler):
            engine.count(2, 2)  # as if somebody else went on asking
            read(handler)

        engine.get = get
        run.config.evaluate.server = engine.url
        metrics = evaluate.run(run.config, run.out, run)
    assert metrics["eval/server/c4/tokens_per_second"] > 0
    assert "eval/server/tokens_per_step" not in metrics and "others use it too" in caplog.text


def test_an_engine_that_does_not_answer_is_noticed_before_the_long_work(run):
    run.config.evaluate.server, run.config.serving.patience = "http://127.0.0.1:9", 1
    with pytest.raises(UserError, match="no answer for 2 seconds"):
        evaluate.run(run.config, run.out, run)
    assert not (run.out / "records.jsonl").exists()


def test_no_more_prompts_are_said_to_be_on_their_way_than_there_are(caplog):
    assert _levels([8, 1, 8], 8) == [1, 8] and not caplog.text
    assert _levels([1, 4, 8, 32], 6) == [1, 4, 6]
    assert "only 6 prompts" in caplog.text


def test_counters_of_a_restarted_engine_are_of_nothing(caplog):
    before = {"drafts": 10.0, "draft_tokens": 20.0, "accepted_tokens_per_pos@0": 3.0}
    assert _between(before, {name: value + 5 for name, value in before.items()}).steps == 5
    assert _between(before, {name: value - 1 for name, value in before.items()}) is None
    assert "has been restarted" in caplog.text
    assert _between(before, {}) is None and _between(None, before) is None
    assert _between({}, before) == Drafts(10, 20, [3])


def test_drafts_are_no_more_than_their_answers_can_have_had():
    drafts = Drafts(10, 20, [5, 2])
    assert of_answers(drafts, [[0] * 8, [0] * 5]) == drafts
    assert of_answers(drafts, [[0] * 7, [0] * 5]) is None


def test_counters_are_those_of_the_model_summed_over_processes():
    page = """
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a"} 121.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a"} 3.0
vllm:spec_decode_num_drafts_total{engine="0",model_name="b"} 9.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a"} 1.7e9
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="1"} 7.0
vllm:num_requests_running{engine="0",model_name="a"} 9.0
"""
    assert read_counters(page, "a") == {"drafts": 124, "accepted_tokens_per_pos@1": 7}
    assert read_counters("", "a") == {}


def test_more_draft_tokens_than_heads_are_those_of_others():
    assert positions_of(Drafts(10, 20, [5, 2]), 3) == 2
    assert positions_of(Drafts(10, 25, [5, 2]), 3) is None
    with pytest.raises(UserError, match="drafts 6 tokens a step, and this run has 3 heads"):
        positions_of(Drafts(10, 60, [5, 2]), 3)


def test_a_plain_engine_alone_and_several_are_refused(run):
    with pytest.raises(UserError, match=r"evaluate\.server, the engine with heads"):
        replace(run.config.evaluate, server_plain="http://a")
    run.config.evaluate.server = "http://a,http://b"
    with pytest.raises(UserError, match=r"evaluate\.server takes one URL"):
        evaluate.run(run.config, run.out, run)
    run.config.evaluate.server = ","
    with pytest.raises(UserError, match=r"evaluate\.server=, names no engine"):
        evaluate.run(run.config, run.out, run)


def test_a_key_is_named_and_not_given(backbone, monkeypatch):
    def engines(variable):
        return open_engines(
            "evaluate.server",
            "http://a",
            ServingConfig(key_variable=variable),
            backbone,
            [[3]],
            limits=Limits(4),
            rule=GREEDY,
            max_length=64,
        )

    with pytest.raises(UserError, match="not the key itself") as refused:
        engines("sk-secret")
    assert "sk-secret" not in str(refused.value)
    monkeypatch.setenv("ENGINE_KEY", "abc")
    assert engines("ENGINE_KEY")._http.headers["authorization"] == "Bearer abc"


def test_only_what_ties_may_differ(backbone):
    prompt = [3, 4, 5]
    logits = backbone.model(torch.tensor([prompt])).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    probe = Probe(prompt, [first])
    assert _is_same(backbone, probe, [first])
    assert not _is_same(backbone, probe, [second])
    with torch.no_grad():  # now they tie
        rows = backbone.model.lm_head.weight
        rows[second] = rows[first]
    assert _is_same(Backbone(backbone.model), probe, [second])
