"""Stage train: data set and backbone in, `heads/` out."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from medusa_exp.config import Config
from medusa_exp.data.datamodule import Batches
from medusa_exp.errors import UserError
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.model.tokenizer import save_tokenizer
from medusa_exp.runs.record import annotate
from medusa_exp.train.best import BestHeads
from medusa_exp.train.callbacks import AverageHeads
from medusa_exp.train.checkpointing import CHECKPOINT, Checkpoints
from medusa_exp.train.failures import BadLoss, explain_memory, memory_of_training
from medusa_exp.train.inputs import open_inputs
from medusa_exp.train.joint import JointModule
from medusa_exp.train.launch import train_in_processes
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.on_ray import ray_parts, train_on_ray
from medusa_exp.train.plan import ShowPlan
from medusa_exp.train.resume import checkpoint_to_resume
from medusa_exp.train.setup import build_module, finish_joint, start_heads
from medusa_exp.train.sharding import shard_layers
from medusa_exp.train.trainer import build_trainer, pick_precision

log = logging.getLogger(__name__)

_LOCK = ".train.lock"


def run(config: Config, out: Path) -> dict[str, float]:
    """Train heads, from the newest checkpoint of this run directory where there is one.

    Raises:
        UserError: another process trains there: each would write over the other's checkpoints.
    """
    ways = {"ddp": train_in_processes, "fsdp": train_in_processes, "ray": train_on_ray}
    try:
        with FileLock(out / _LOCK, timeout=0):
            return ways.get(config.train.strategy, train)(config, out)
    except Timeout as error:
        raise UserError(
            f"another process is training in {out}: wait for it, or choose another run_dir."
        ) from error


def train(config: Config, out: Path) -> dict[str, float]:
    """Train in this process, alone or as one of several."""
    with explain_memory(memory_of_training(config.train)):
        return _train(config, out)


def _train(config: Config, out: Path) -> dict[str, float]:
    L.seed_everything(config.seed, verbose=False)
    inputs = open_inputs(config, out)
    heads = start_heads(config, inputs)
    # Not where this process has the body: another one may have come late enough to need none.
    if config.train.strategy == "fsdp" and config.train.features == "online":
        shard_layers(inputs.backbone)
    batches = inputs.batches(config)
    max_steps = _num_steps(config, batches)
    log.info("%s; %d steps", heads.describe(), max_steps)
    module = build_module(config, inputs, heads, max_steps)
    metrics = _fit(config, out, module, batches)
    if rank_zero_only.rank == 0:
        if isinstance(module, JointModule):
            metrics |= finish_joint(config, out, module, inputs)
        save_heads(heads, out / "heads")
        save_tokenizer(inputs.tokenizer, config, out / "heads")
        log.info("heads written to %s", out / "heads")
    return metrics


def _fit(config: Config, out: Path, module: MedusaModule, batches: Batches) -> dict[str, float]:
    settings = config.train
    checkpoint, step = checkpoint_to_resume(config, out, module.made_with)
    annotate(resumed_from_step=step)
    checkpoints = Checkpoints(out / "checkpoints" / CHECKPOINT, settings.checkpoint_every)
    best = BestHeads(out / "checkpoints", settings.patience)
    average = AverageHeads(settings.average, module) if settings.average else None
    # In this order: the average leaves the heads' place after the best have been kept.
    callbacks = [
        best,
        *([average] if average else []),
        checkpoints,
        ShowPlan(settings.optimizer, average is not None),
    ]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    trainer = _trainer(config, out, module, bool(batches.val), callbacks)
    try:
        trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
        steps = trainer.global_step
        if batches.val and module.last_val_step != steps:
            trainer.validate(module, batches, verbose=False)
        if average:
            average.swap(True)
    except BadLoss as error:
        raise _explained(error, batches, checkpoints.path) from error
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    metrics = {"train/steps": float(steps), **module.last_metrics}
    if settings.keep == "best" and best.value is not None:
        best.restore(module)
        metrics |= {**best.metrics, "train/best_step": best.step}
    return {name: float(value) for name, value in metrics.items()}


def _trainer(
    config: Config,
    out: Path,
    module: MedusaModule,
    validates: bool,
    callbacks: list[L.Callback],
) -> L.Trainer:
    settings = config.train
    return build_trainer(
        config,
        out,
        "train",
        max_steps=module.max_steps,
        precision=pick_precision(config, module.backbone.device),
        **_devices(config),
        gradient_clip=settings.gradient_clip,
        accumulate=settings.accumulate,
        val_every=min(settings.val_every, module.max_steps) if validates else None,
        deterministic=settings.deterministic,
        callbacks=callbacks,
    )


def _devices(config: Config) -> dict[str, Any]:
    """Return `build_trainer`'s arguments for what trains side by side."""
    settings = config.train
    if settings.strategy == "auto":
        return {}
    # While the heads learn alone, adapters get no gradient.
    has_idle = settings.kind == "medusa2"
    if settings.strategy == "ray":
        strategy, environment = ray_parts(find_unused_parameters=has_idle)
        return {"strategy": strategy, "devices": "auto", "plugins": [environment]}
    name = "ddp_find_unused_parameters_true" if has_idle else "ddp"
    return {"strategy": name, "devices": settings.devices}


def _num_steps(config: Config, batches: Batches) -> int:
    settings = config.train
    if settings.max_steps is not None:
        return settings.max_steps
    of_a_step = settings.accumulate * settings.devices
    steps = math.ceil(settings.epochs * batches.batches_per_epoch() / of_a_step)
    return max(steps, settings.min_steps)


def _explained(error: BadLoss, batches: Batches, checkpoint: Path) -> UserError:
    ids = batches.train.strings("conversation_id")
    named = ", ".join(ids[number] for number in error.documents[:8])
    more = f" and {len(error.documents) - 8} more" if len(error.documents) > 8 else ""
    is_saved = checkpoint.is_file()
    return UserError(
        f"{error}, on conversations {named}{more}: try dtype=fp32, or lower train.learning_rate "
        "and set train.resume=never. "
        + (
            f"{checkpoint} is from before: another dtype goes on from it, another rate cannot."
            if is_saved
            else "The heads were broken before that."
        )
    )
