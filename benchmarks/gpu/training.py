"""Online training of heads on Llamas of random weights: its share of the GPU's matrix rate.

What is timed is the stage's own training with its defaults, Lightning and all: the frozen backbone
in bfloat16, the labels that it predicts itself, the loss of all heads and the optimizer. The rate
is compared with that of a large bfloat16 matrix product on the same device, just before, as
`train/mfu` is.

T tokens of a document, D hidden, V vocabulary, K heads.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from gpu.models import Scale, random_llama

from medusa_exp.config import Config, HeadConfig
from medusa_exp.data.examples import Examples, Table
from medusa_exp.model import Backbone, build_heads
from medusa_exp.runs.machine import matrix_rate, synchronize
from medusa_exp.stages.train import build_module, operations_of
from medusa_exp.stages.training_inputs import Inputs
from medusa_exp.train.defaults import settled_of
from medusa_exp.train.throughput import Operations
from medusa_exp.train.trainer import AUTOCAST, build_trainer, pick_precision

NUM_HEADS = 5
TRAINED_SHARE = 0.6
WARM_UP_STEPS, STEPS = 3, 10
PLANNED_STEPS = 10_000
"""Of the training whose first steps these are: what pays in a long one is on."""


def measure_training(
    name: str, kinds: tuple[str, ...], scale: Scale, is_over: Callable[[], bool]
) -> Iterator[tuple[str, Any]]:
    """Yield figures for each of these families of heads."""
    backbone = random_llama(scale.shapes[name], scale)
    rate = matrix_rate(scale.device, torch.bfloat16, 0.5)
    assert rate is not None, "there is no memory for a matrix product"
    yield "matrix_product_teraflops", rate / 1e12
    for kind in kinds:
        if is_over():
            yield "left_out", kind
            return
        with tempfile.TemporaryDirectory() as work:
            yield kind, _train(backbone, kind, Path(work), rate, *scale.training)


def documents(number: int, vocab_size: int, length: int) -> Examples:
    """Make documents of `length` random tokens, whose last TRAINED_SHARE is trained."""
    rng = np.random.default_rng(0)
    is_trained_T = np.arange(length) >= (1 - TRAINED_SHARE) * length
    rows = (
        (rng.integers(0, vocab_size, length), is_trained_T, str(i), "made up")
        for i in range(number)
    )
    return Examples(Table.of(rows))


class _Clock(L.Callback):
    """Measures the steps after the first few, and counts what they need."""

    def __init__(self, operations: Operations) -> None:
        self.needed_by, self.needed, self.seconds = operations, 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP_STEPS:
            synchronize(module.device)
            self.seconds = -time.perf_counter()
        if batch_idx >= WARM_UP_STEPS:
            self.needed += self.needed_by.of_batch(batch)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        synchronize(module.device)
        self.seconds += time.perf_counter()


def _train(
    backbone: Backbone, kind: str, work: Path, rate: float, length: int, rows: int
) -> dict[str, Any]:
    config = Config(device=backbone.device.type, head=HeadConfig(num_heads=NUM_HEADS, kind=kind))
    config.train.batch_tokens = rows * length
    steps = WARM_UP_STEPS + STEPS
    made = {"train": documents(steps * rows, backbone.vocab_size, length)}
    inputs = Inputs(backbone, None, made, "made up", length, {}, [], [])  # type: ignore
    heads = build_heads(backbone, num_heads=NUM_HEADS, kind=kind)
    module = build_module(config, inputs, heads, PLANNED_STEPS)
    clock = _Clock(operations_of(module.settings, backbone, heads))
    is_cuda = backbone.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    precision = pick_precision(config.dtype.precision, backbone.device)
    trainer = build_trainer(
        backbone.device, work, "train", max_steps=steps, precision=precision, callbacks=[clock]
    )
    compiles = module.settings.compile == "true"
    compiled = module.compiled(AUTOCAST.get(precision)) if compiles else nullcontext(False)
    with compiled as is_compiled:
        trainer.fit(module, inputs.batches(config))
    num_tokens = STEPS * rows * length
    return {
        "shape": {"length": length, "heads": NUM_HEADS, "rows": rows, "steps": STEPS},
        "settled": {**settled_of(module.settings), "is_compiled": is_compiled},
        "tokens_per_second": num_tokens / clock.seconds,
        "teraflops": clock.needed / clock.seconds / 1e12,
        "share_of_matrix_product": clock.needed / clock.seconds / rate,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }
