"""What the evaluation does before the clock counts."""

from types import SimpleNamespace

import pytest
from sessions import session_of

from medusa_exp.data.prompts import Prompt
from medusa_exp.stages.evaluate import _agreement, _warm_up, of_each_size


@pytest.mark.parametrize(
    ("num_prompts", "batch_size", "expected"),
    [(2, 1, [1, 1]), (2, 4, [4]), (3, 5, [5]), (2, 64, [10]), (0, 4, [])],
)
def test_every_size_of_batch_that_is_timed_has_been_seen(num_prompts, batch_size, expected):
    prompts = [SimpleNamespace(input_ids=[number]) for number in range(10)]
    seen: list[int] = []
    _warm_up({"tree": lambda batch: seen.append(len(batch))}, prompts, num_prompts, batch_size)
    assert sorted(seen) == expected


def test_prompts_of_each_size_are_few():
    lengths = [10, 300, 620, 1300, 20, 290]
    prompts = [Prompt(str(n), "", "", [1] * n) for n in lengths]
    found = [len(prompt.input_ids) for prompt in of_each_size(prompts, 10)]
    assert found == [1300, 620, 300, 20]


def test_prompts_of_a_file_need_no_held_out_text(config, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    config.dataset.test_fraction, config.evaluate.path = 0.0, str(tmp_path / "questions.txt")
    session = session_of(config)
    assert _agreement(session, session.backbone(), tokenizer) == {}
    assert "no held-out loss" in caplog.text
