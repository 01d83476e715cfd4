"""Fixtures of the tests of decoding."""

import pytest

from medusa_exp.decode.step import CapturedStep, tokens_of


@pytest.fixture
def beside(monkeypatch):
    """Let captured steps be taken beside the host, as by a device: they are done when begun."""

    def start(step):
        assert not step.is_at_work
        step._run()
        step.is_at_work = True

    def finish(step):
        assert step.is_at_work
        step.is_at_work = False
        rows = step.outcome.tolist()
        return tokens_of([rows[row] for row in step.active])

    monkeypatch.setattr(CapturedStep, "start", start)
    monkeypatch.setattr(CapturedStep, "finish", finish)
