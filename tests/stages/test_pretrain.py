"""What stage pretrain says before it begins."""

from medusa_exp.stages import pretrain


def test_a_long_run_says_first_how_long_it_takes(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    config.stages = ["pretrain", "train", "evaluate", "report"]
    config.model.pretrain.max_steps, config.model.pretrain.batch_tokens = 900, 1000
    config.train.max_steps, config.train.batch_tokens = 600, 1000
    config.evaluate.num_prompts, config.decode.max_new_tokens = 40, 100
    monkeypatch.setattr(pretrain, "_time_steps", lambda *given: (0.4e-3, 0.003))
    pretrain._say_how_long(config)
    [line] = caplog.messages  # 900 * 0.4 s, 600 * 0.56 * 0.4 s, 40 * 100 * 5 * 0.003 s
    assert "takes about 9 minutes (pretrain 6.0, train 2.2, evaluate 1.0)" in line
    assert "model.pretrain.max_steps=300 train.max_steps=200" in line
    config.model.pretrain.max_steps = 20
    pretrain._say_how_long(config)
    assert len(caplog.messages) == 1


def test_steps_are_timed_in_less_than_a_second_or_two(config):
    config.model.pretrain.hidden_size, config.model.pretrain.num_hidden_layers = 32, 2
    assert all(0 < seconds < 10 for seconds in pretrain._time_steps(config, "32-true"))
