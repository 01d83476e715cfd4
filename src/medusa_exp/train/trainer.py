"""How both training stages set up Lightning: device, precision, bars, history, checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from medusa_exp.config import Config
from medusa_exp.data.batches import Batch, LengthGroupedSampler, build_loader
from medusa_exp.data.sources import Example
from medusa_exp.files import publish
from medusa_exp.model.loading import pick_device
from medusa_exp.tracking.history import HistoryLogger

CHECKPOINT = "last.ckpt"
LOG_EVERY = 10
"""Optimiser steps between lines of the history."""
_EXPECTED_WARNINGS = (
    # Batches are made in memory: worker processes would only add start-up time and copies.
    ".*does not have many workers.*",
    # A resumed run writes where it wrote before.
    "Checkpoint directory .* exists and is not empty",
    # It is: `Batches.train_dataloader` starts where the trainer's steps have come to.
    ".*your dataloader is not resumable.*",
    # Lightning 2.6 with torch 2.13.
    ".*LeafSpec.*is deprecated",
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own file format, written so that a killed process leaves no half checkpoint."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write under a temporary name and rename."""
        with publish(Path(path)) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)


class Batches(L.LightningDataModule):
    """Training batches in the seed's order, and a fixed set of validation batches, if any."""

    def __init__(
        self,
        train: list[Example],
        val: list[Example],
        *,
        batch_tokens: int,
        seed: int,
        num_batches: int,
        val_batches: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.num_batches = num_batches
        self.val_batches = val_batches
        self.accumulate = accumulate

    def train_dataloader(self) -> DataLoader[Batch]:
        """Go on after the batches that the steps so far have used."""
        assert self.trainer is not None
        start = self.trainer.global_step * self.accumulate
        return build_loader(self.train, self._sampler(self.train, self.num_batches, start))

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """The same batches at every validation: one pass at most."""
        if not self.val:
            return []
        sampler = self._sampler(self.val, self.val_batches, 0)
        sampler.num_batches = min(self.val_batches, sampler.batches_per_epoch())
        return build_loader(self.val, sampler)

    def _sampler(
        self, sequences: list[Example], num_batches: int, start: int
    ) -> LengthGroupedSampler:
        lengths = [len(sequence.input_ids) for sequence in sequences]
        return LengthGroupedSampler(lengths, self.batch_tokens, self.seed, num_batches, start)


def build_trainer(
    config: Config,
    out: Path,
    stage: str,
    *,
    max_steps: int,
    precision: str,
    gradient_clip: float = 1.0,
    accumulate: int = 1,
    val_every: int | None = None,
    checkpoint_every: int | None = None,
) -> L.Trainer:
    """Build a Trainer for one device that counts in optimiser steps.

    Without `val_every` nothing is validated, without `checkpoint_every` nothing is saved.
    """
    for expected in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    callbacks: list[L.Callback] = [RichProgressBar(refresh_rate=5)]
    if checkpoint_every:
        callbacks.append(
            ModelCheckpoint(
                dirpath=out / "checkpoints",
                filename=CHECKPOINT.removesuffix(".ckpt"),
                every_n_train_steps=checkpoint_every,
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            )
        )
    return L.Trainer(
        accelerator=pick_device(config.device).type,
        devices=1,
        precision=precision,
        max_steps=max_steps,
        max_epochs=1,  # Lightning's epoch is the sampler's whole walk
        gradient_clip_val=gradient_clip,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate if val_every else None,
        limit_val_batches=None if val_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(LOG_EVERY, max_steps),
        logger=HistoryLogger(out, stage),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_checkpointing=bool(checkpoint_every),
        default_root_dir=out,
    )


def pick_precision(config: Config, device: torch.device) -> str:
    """Return Lightning's word for the arithmetic of training.

    `auto` is bf16-mixed where the hardware has bf16; else 16-mixed on a GPU, 32-true on a CPU.
    """
    if config.dtype.precision != "auto":
        return config.dtype.precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true"
