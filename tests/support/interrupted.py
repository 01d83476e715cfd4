"""A training that an error ends between two of its steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from medusa_exp.train.module import MedusaModule


@contextmanager
def dies_at(step: int) -> Iterator[None]:
    """Let the training within die as it begins this step, which it must reach."""
    training_step = MedusaModule.training_step

    def dies(module, batch, batch_idx):
        if module.global_step == step:
            raise RuntimeError("power cut")
        return training_step(module, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MedusaModule, "training_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            yield
