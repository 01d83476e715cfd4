"""Lightning's Trainer as both training stages use it, its precision, and FSDP for the backbone."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from rich.filesize import decimal
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.files import publish
from medusa_exp.runs.machine import has_arithmetic
from medusa_exp.tracking.history import HistoryLogger, StepLogger
from medusa_exp.train.callbacks import StepProgress

log = logging.getLogger(__name__)

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What `pick_precision` may return -> the dtype of autocast; others have none."""
LOG_EVERY = 10
"""Optimizer steps between lines of the history."""
_EXPECTED_WARNINGS = (
    # Batches are made in memory: worker processes would only add start-up time and copies.
    ".*does not have many workers.*",
    # It is: `Batches.train_dataloader` starts where the trainer's steps have come to.
    ".*your dataloader is not resumable.*",
    # Pretraining validates nothing.
    "You passed in a `val_dataloader` but have no `validation_step`",
    # device=cpu was asked for.
    "GPU available but not used",
    # Lightning 2.6 with torch 2.13.
    ".*LeafSpec.*is deprecated",
)


def build_trainer(
    device: torch.device,
    out: Path,
    stage: str,
    log_step: StepLogger | None = None,
    *,
    max_steps: int,
    precision: str,
    gradient_clip: float = 1.0,
    accumulate: int = 1,
    val_every: int | None = None,
    deterministic: bool = False,
    strategy: str | Strategy = "auto",
    devices: int | str = 1,
    plugins: Sequence[ClusterEnvironment] = (),
    callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """Build a Trainer that counts in optimizer steps.

    Without `val_every` nothing is validated; nothing is saved but by a callback. Without `plugins`
    it is that of a lone process, whatever launcher the environment speaks of.
    """
    for expected in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    return L.Trainer(
        accelerator=device.type,
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,  # `Batches` shares them out
        precision=precision,
        max_steps=max_steps,
        max_epochs=1,  # Lightning's epoch is the sampler's whole walk
        gradient_clip_val=gradient_clip,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate if val_every else None,
        limit_val_batches=None if val_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(LOG_EVERY, max_steps),
        logger=HistoryLogger(out, stage, log_step),
        callbacks=[StepProgress(f"{stage}ing"), *callbacks],
        enable_progress_bar=False,  # Lightning's has no room for its numbers in 80 columns
        plugins=[AtomicCheckpointIO(), *(plugins or [LightningEnvironment()])],
        enable_model_summary=False,
        enable_checkpointing=False,
        deterministic=deterministic,
        default_root_dir=out,
    )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own file format, written so that a killed process leaves no half checkpoint."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write under a temporary name, make sure of it, and rename."""
        # Lightning's own would hold the whole file in memory, and then in the temporary folder.
        with publish(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def pick_precision(precision: str, device: torch.device) -> str:
    """Return Lightning's word for the arithmetic of training, given `dtype.precision`.

    `auto` is bf16-mixed where the hardware has bf16; else 16-mixed on a CUDA GPU, and 32-true.
    """
    if precision != "auto":
        return precision
    if has_arithmetic(device, torch.bfloat16):
        return "bf16-mixed"
    return "16-mixed" if device.type == "cuda" else "32-true"


def shard_layers(backbone: Backbone) -> dict[str, int]:
    """Leave each process its part of every layer of a frozen backbone that all have loaded (FSDP).

    Heads are small, and every process has them whole; the backbone is what takes memory. Each of n
    processes keeps 1/n of each layer's weights, and gathers a layer for as long as it runs.
    Embedding, final norm and lm_head, which are used outside of layers, stay whole. While it is
    loaded, and while it answers held-out prompts, every process has the whole model.

    To be called by all processes, at the same point.

    Returns:
        Bytes of the backbone: `whole`, and `kept` by this process.

    Raises:
        UserError: the model has no list of its layers.
    """
    if not distributed.is_initialized():  # Lightning would do it later, and finds it done
        distributed.init_process_group("nccl" if backbone.device.type == "cuda" else "gloo")
    backbone.names.keep()
    before = _local_bytes(backbone)
    mesh = init_device_mesh(backbone.device.type, (distributed.get_world_size(),))
    layers = backbone.layers()
    if layers is None:
        raise UserError(
            f"train.strategy=fsdp: {backbone.name} has no list of its {backbone.num_layers} "
            "layers: set train.strategy=ddp."
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    kept = _local_bytes(backbone)
    log.info("each process keeps %s of the backbone's %s", decimal(kept), decimal(before))
    return {"whole": before, "kept": kept}


def _local_bytes(backbone: Backbone) -> int:
    """Return the bytes of the weights that this process keeps."""
    parameters = backbone.model.parameters()
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local)
