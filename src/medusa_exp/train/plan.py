"""What a training will take, shown before its first step.

One micro-batch is run forward and backward twice, without effect on anything: the first time
prepares kernels, the second one is timed.
"""

import time

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from medusa_exp.data.datamodule import Batch
from medusa_exp.runs.machine import peak_memory_bytes
from medusa_exp.train.checkpointing import random_state, restore_random_state
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.optimizer import STATE_BYTES


class ShowPlan(L.Callback):
    """Prints a table before the first step of each call; with several processes, nothing."""

    def __init__(self, optimizer: str, has_average: bool) -> None:
        self.optimizer = optimizer
        self.has_average = has_average
        self._is_shown = False

    def on_train_batch_start(
        self, trainer: L.Trainer, module: MedusaModule, batch: Batch, batch_idx: int
    ) -> None:
        """Time the first micro-batch, and print."""
        if self._is_shown or trainer.world_size > 1:
            return
        self._is_shown = True
        seconds = _time_batch(trainer, module, batch)
        steps = trainer.max_steps - trainer.global_step
        accumulate = trainer.accumulate_grad_batches
        table = Table("the training", "", title=None)
        for name, value in (
            ("parameters trained", f"{_num_parameters(module) / 1e6:.2f} M"),
            ("memory of them, gradients and optimiser", _bytes(self._memory(module))),
            ("peak memory so far", _bytes(peak_memory_bytes(module.device))),
            ("tokens of a step, with padding", f"{accumulate * batch.input_ids_BT.numel():,}"),
            ("labels of a step, of head 1", f"{batch.group_labels[1]:,}"),
            ("steps", f"{steps:,}"),
            ("time, about", _duration(steps * accumulate * seconds)),
        ):
            table.add_row(name, value)
        Console().print(table)

    def _memory(self, module: MedusaModule) -> int:
        each = 4 + 4 + STATE_BYTES[self.optimizer] + 4 * self.has_average
        return each * _num_parameters(module)


def _time_batch(trainer: L.Trainer, module: MedusaModule, batch: Batch) -> float:
    state = random_state()
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with trainer.precision_plugin.train_step_context():
            loss = module.largest_loss(batch, batch.group_labels)[0]
        loss.backward()
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        module.zero_grad(set_to_none=True)
    restore_random_state(state)
    return seconds


def _num_parameters(module: MedusaModule) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
