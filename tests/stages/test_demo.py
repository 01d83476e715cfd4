"""What stage demo shows: the answers of both ways of decoding, step by step, and what they cost."""

import io
import json
import shutil
from itertools import accumulate

import pytest
import torch
from rich.console import Console
from tiny_models import build_model

from medusa_exp import compose, demo, run
from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.detokenizer import IncrementalDetokenizer
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.stages.demo import Racer, of_each_category, race, racers, verdict
from medusa_exp.stages.session import Session
from medusa_exp.tree import chain

CPU = torch.device("cpu")


@pytest.fixture
def decoder(tokenizer) -> Decoder:
    backbone = Backbone(build_model("llama", vocab_size=len(tokenizer)))
    heads = build_heads(backbone, num_heads=2)
    return Decoder(backbone, heads, chain(2), limits=Limits(12), tokenizer=tokenizer)


def steps_of(*added: list[int]):
    return iter([[tokens] for tokens in added])


def test_accepted_drafts_are_colored_and_what_the_backbone_said_is_not(tokenizer):
    ids = tokenizer("abcdef", add_special_tokens=False).input_ids
    racer = Racer(
        "x", steps_of(ids[:1], ids[1:4], ids[4:5], ids[5:6]), IncrementalDetokenizer(tokenizer), CPU
    )
    while not racer.is_done:
        racer.advance()
    assert racer.text.plain == "abcdef" and racer.num_steps == 4
    colored = [(span.start, span.end) for span in racer.text.spans if span.style]
    assert colored == [(1, 3)]  # of three tokens, the third is the backbone's own


def test_both_answer_as_plain_decoding_does(decoder):
    ids = decoder.tokenizer("<|user|>hello<|end|>", add_special_tokens=False).input_ids
    plain, heads = racers(decoder, ids)
    race(plain, heads, Console(file=io.StringIO()))
    [expected] = decode_plain(decoder.backbone, [ids], Limits(12))
    assert plain.tokens == heads.tokens == expected.tokens
    assert plain.num_steps == 12 and 1 <= heads.num_steps <= 12
    assert "the same tokens" in verdict(plain, heads, "greedy")
    heads.tokens[0] += 1
    assert "NOT the same tokens" in verdict(plain, heads, "greedy")
    assert "same tokens" not in verdict(plain, heads, "sampling")


def test_the_one_whose_clock_is_behind_goes_next(tokenizer, monkeypatch):
    clock = accumulate([0, 3] + [0, 1] * 20)  # the first step of the first takes 3, all others 1
    monkeypatch.setattr("medusa_exp.stages.demo.time.perf_counter", lambda: next(clock))
    order = []
    slow, quick = (
        Racer(name, steps_of(*[[65]] * 4), IncrementalDetokenizer(tokenizer), CPU)
        for name in ("slow", "quick")
    )
    for racer in (slow, quick):
        advance = racer.advance
        racer.advance = lambda racer=racer, advance=advance: (order.append(racer.name), advance())
    race(slow, quick, Console(file=io.StringIO()))
    assert order[:5] == ["slow", "quick", "quick", "quick", "slow"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_colors_are_for_terminals(decoder, is_terminal):
    ids = decoder.tokenizer("hello", add_special_tokens=False).input_ids
    file = io.StringIO()
    race(*racers(decoder, ids), Console(file=file, force_terminal=is_terminal, width=80))
    written = file.getvalue()
    assert ("\x1b[" in written) == is_terminal
    assert ("plain decoding" in written) == is_terminal  # beside the other, which is printed alone


def test_prompts_of_different_kinds_are_shown():
    of = [("a", 5), ("b", 3), ("a", 2)]
    prompts = [Prompt(f"{k}{n}", k, "", [0] * n) for k, n in of]
    assert [prompt.prompt_id for prompt in of_each_category(prompts)] == ["a2", "b3"]


def test_the_files_of_the_demo_are_those_that_were_published(tmp_path, monkeypatch):
    demo.check()
    size = sum(path.stat().st_size for path in demo.PLACE.rglob("*") if path.suffix != ".pyc")
    assert size <= 4_000_000
    place = tmp_path / "demo"
    shutil.copytree(demo.PLACE, place)
    monkeypatch.setattr(demo, "PLACE", place)
    demo.check()
    weights = place / "heads" / demo.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"heads/model\.safetensors is not the file of the demo"):
        demo.check()
    config = compose(["+experiment=quickstart", f"model.path={place / 'backbone'}"])
    with pytest.raises(UserError, match="is not the file of the demo"):
        Session(config, tmp_path / "run").backbone()


def test_the_demo_shows_a_gain_and_the_same_answers(tmp_path, capsys):
    out = tmp_path / "run"
    config = compose(["+experiment=demo", f"cache_dir={tmp_path}/cache", "evaluate.num_prompts=2"])
    config.stages = ["demo", "evaluate"]
    metrics = run(config, out)
    assert metrics["eval/identical_fraction"] == 1 and metrics["eval/tokens_per_step"] > 3
    written = capsys.readouterr().out
    assert written.count("the same tokens") == 4 and "NOT" not in written and "\x1b" not in written
    saved = (out / ".hydra" / "config.yaml").read_text()
    assert "path: ${medusa_exp.demo:backbone}" in saved  # wherever the package lies another day
    assert Decoder.from_run(out).heads is not None
    config = json.loads((out / "heads" / "config.json").read_text())
    assert "/" not in config["backbone"]
