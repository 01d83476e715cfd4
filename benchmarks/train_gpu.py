"""How fast heads of a 7B-shaped Llama train on one GPU, beside what its matrix units give.

    python benchmarks/train_gpu.py [--out FILE]

The model is random, and so are the tokens; the training is that of stage train, online in bf16, of
5 heads at 2,048 tokens a step. Weights, gradients and optimiser are 26 GB. The rate counts what has
to be computed and no more: what a form of the loss computes twice counts once, attention not at
all. No figure of it stands anywhere yet: no GPU was at hand.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import torch
from gpu_step import random_llama
from measuring import Row, machine, show, write

from medusa_exp.config import Config
from medusa_exp.config import HeadConfig as Head
from medusa_exp.data.examples import SCHEMA, Examples
from medusa_exp.data.loader import Batch
from medusa_exp.model import Backbone, build_heads
from medusa_exp.train.inputs import Inputs
from medusa_exp.train.setup import build_module
from medusa_exp.train.trainer import build_trainer

TOKENS, HEADS = 2048, 5
_WARMUP, _STEPS = 5, 25
_SIZE, _PRODUCTS = 8192, 20
"""Of the matrices whose products say what rate there is to be had."""


class Clock(L.Callback):
    """Seconds, tokens and labels of the steps after the first ones."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.tokens = 0
        self.labels = np.zeros(1 + HEADS, np.int64)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Start the clock, or count."""
        if batch_idx + 1 < _WARMUP:
            return
        if batch_idx + 1 == _WARMUP:
            self._start = _now(self.device)
            return
        self.tokens += int((batch.documents_BT > 0).sum())
        self.labels += np.array(batch.group_labels)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop the clock."""
        self.seconds = _now(self.device) - self._start


def train(backbone: Backbone, work: Path, *, form: str, precision: str, tokens: int) -> Clock:
    """Train heads for some steps, a document of so many tokens each."""
    config = Config(device=backbone.device.type, head=Head(num_heads=HEADS))
    config.train.batch_tokens, config.train.loss_form = tokens, form
    rng = np.random.default_rng(0)
    columns = {
        "input_ids": [rng.integers(0, backbone.vocab_size, tokens) for _ in range(_STEPS)],
        "is_trained": [(np.arange(tokens) > 0.4 * tokens).astype(np.uint8)] * _STEPS,
        "conversation_id": [str(i) for i in range(_STEPS)],
        "source": ["made up"] * _STEPS,
    }
    made = {"train": Examples(pa.table(columns, schema=SCHEMA))}
    inputs = Inputs(backbone, None, made, "made up", tokens, {}, [], [])  # type: ignore
    module = build_module(config, inputs, build_heads(backbone, num_heads=HEADS), _STEPS)
    clock = Clock(backbone.device)
    trainer = build_trainer(
        config, work, "train", max_steps=_STEPS, precision=precision, callbacks=[clock]
    )
    trainer.fit(module, inputs.batches(config))
    return clock


def operations(backbone: Backbone, clock: Clock) -> float:
    """Count the operations that the steps of the clock cannot do without."""
    ends = (backbone.lm_head, backbone.model.get_input_embeddings())
    outside = {id(p) for module in ends for p in module.parameters()}
    body = sum(p.numel() for p in backbone.model.parameters() if id(p) not in outside)
    width, projection = backbone.hidden_size, backbone.hidden_size * backbone.vocab_size
    # A projection: forward, gradients of weights and of rows. A block: none of its rows.
    of_heads = float(clock.labels[1:].sum()) * (6 * projection + 4 * width**2)
    return 2 * body * clock.tokens + 2 * projection * float(clock.labels[0]) + of_heads


def matrix_rate(device: torch.device, size: int = _SIZE) -> float:
    """Measure how many operations a second products of large bf16 matrices reach."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = _now(device)
        for _ in range(_PRODUCTS):
            a @ b
        best = min(best, _now(device) - start)
    return 2 * size**3 * _PRODUCTS / best


def rows(backbone: Backbone, work: Path, *, tokens: int = TOKENS, size: int = _SIZE) -> list[Row]:
    """Measure both forms of the loss; the better one counts."""
    peak = matrix_rate(backbone.device, size)
    found = []
    for form in ("recompute", "at_once"):
        if backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = train(backbone, work, form=form, precision="bf16-mixed", tokens=tokens)
        rate = operations(backbone, clock) / clock.seconds
        details = {"tokens/s": clock.tokens / clock.seconds, "TFLOP/s": rate / 1e12}
        if backbone.device.type == "cuda":
            details["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
        share = 100 * rate / peak
        row = Row(
            f"share of the bf16 matrix rate, loss_form={form}",
            "%",
            share,
            ">= 45 %",
            share >= 45,
            details={**details, "matrix rate, TFLOP/s": peak / 1e12},
        )
        found.append(row)
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "train_gpu.py needs a GPU\n")
    about = {**machine(), "gpu": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as work:
        found = rows(random_llama(torch.device("cuda")), Path(work))
    show(found, about)
    print(about["gpu"])
    if arguments.out:
        write(arguments.out, found, about)


if __name__ == "__main__":
    main()
