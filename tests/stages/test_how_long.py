"""What is said before the first long stage."""

from dataclasses import replace
from types import SimpleNamespace

from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp import demo
from medusa_exp.stages import how_long
from medusa_exp.stages.how_long import FROM_SCRATCH, QUICKSTART, say_how_long, say_of_quickstart


def small_llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=300))


def of(config):
    """Stand in for the session of a run: its config is all that is asked for."""
    return SimpleNamespace(config=config)


def long_run(config):
    config.stages = ["pretrain", "train", "evaluate", "report"]
    config.model.pretrain.max_steps = 900
    config.train.max_steps, config.train.batch_tokens = 600, 1000
    config.evaluate.num_prompts, config.decode.max_new_tokens = 40, 100
    return config


def test_a_long_run_says_first_how_long_it_takes(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    long_run(config)
    monkeypatch.setattr(how_long, "time_steps", lambda *given: (0.4e-3, 0.003))
    say_how_long(of(config), small_llama(), FROM_SCRATCH, pretraining=900 * 1000)
    [line] = caplog.messages  # 900 * 0.4 s, 600 * 0.56 * 0.4 s, 40 * 100 * 5 * 0.003 s
    assert "takes about 9 minutes (pretrain 6.0, train 2.2, evaluate 1.0)" in line
    assert "model.pretrain.max_steps=300 train.max_steps=200" in line
    config.train.max_steps = 20
    say_how_long(of(config), small_llama(), FROM_SCRATCH, pretraining=20 * 1000)
    assert len(caplog.messages) == 1


def test_of_the_backbone_that_comes_along(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    config = long_run(replace(config, stages=["regenerate", "train"]))
    config.stages, config.regenerate.num_documents = ["regenerate", "train"], 1000
    monkeypatch.setattr(how_long, "time_steps", lambda *given: (0.1e-3, 0.003))
    say_of_quickstart(of(config))
    assert not caplog.messages, "of other models nothing is known"
    config.model.path = str(demo.PLACE / "backbone")
    say_of_quickstart(of(replace(config, model=replace(config.model, kind="tiny"))))
    unknown = replace(config.regenerate, num_documents=None)
    say_of_quickstart(of(replace(config, regenerate=unknown)))
    assert not caplog.messages, "nor of one made first, nor how many documents all are"
    say_of_quickstart(of(config))
    of_document, of_trained = QUICKSTART.of_document, QUICKSTART.of_trained
    regenerate, train = 1000 * of_document * 1e-4 / 60, 600 * 1000 * of_trained * 1e-4 / 60
    [line] = caplog.messages
    assert f"(regenerate {regenerate:.1f}, train {train:.1f})" in line
    assert "worse: train.max_steps=200;" in line


def test_steps_are_timed_in_less_than_a_second_or_two():
    assert all(0 < seconds < 10 for seconds in how_long.time_steps(small_llama(), "32-true"))
