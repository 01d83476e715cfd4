"""Fixtures of the tests of decoding."""

import pytest

from medusa_exp.decode.step import CapturedStep, tokens_of


@pytest.fixture
def beside(monkeypatch):
    """Let captured steps be taken beside the host, as by a device: they are done when begun.

    Until they are finished, nothing that a device may be reading or writing meanwhile changes.
    """
    before = {}

    def start(step):
        assert not step.is_at_work
        step._run()
        step.is_at_work, before[step] = True, _held(step)

    def finish(step):
        assert step.is_at_work
        assert all(now.equal(then) for now, then in zip(_held(step), before[step], strict=True))
        step.is_at_work = False
        rows = step.outcome.tolist()
        return tokens_of([rows[row] for row in step.active])

    monkeypatch.setattr(CapturedStep, "start", start)
    monkeypatch.setattr(CapturedStep, "finish", finish)


def _held(step):
    """Return copies of what a step reads and writes."""
    held = [step.root_B, step.hidden_BD, step.is_active_B, step.last, step.outcome]
    held += [step.cache.lengths_B, step.verifier.uniforms_BN]
    held += [states for layer in step.cache.layers for states in (layer.keys, layer.values)]
    held += [getattr(step.found, "tokens_BL", None)]
    return [tensor.clone() for tensor in held if tensor is not None]
