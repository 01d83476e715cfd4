"""Stage train: data set and backbone in, `heads/` out."""

import logging
import math
import shutil
from pathlib import Path

import lightning as L

from medusa_exp.config import Config
from medusa_exp.data.batches import LengthGroupedSampler
from medusa_exp.data.sources import Sequence, load_split, tokenise
from medusa_exp.model.backbone import Backbone, load_backbone, load_tokenizer
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.model.heads import MedusaHeads, build_heads
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.trainer import CHECKPOINT, Batches, build_trainer, pick_precision

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> dict[str, float]:
    """Train heads, from the newest checkpoint of this run directory where there is one."""
    L.seed_everything(config.seed, verbose=False)
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    limit = min(config.dataset.max_length, backbone.max_length)
    train = tokenise(load_split(config, "train"), tokenizer, limit)
    val = tokenise(load_split(config, "val"), tokenizer, limit)
    heads = build_heads(
        backbone,
        num_heads=config.head.num_heads,
        num_layers=config.head.num_layers,
        kind=config.head.kind,
    )
    max_steps = _num_steps(config, train)
    _log_plan(heads, train, max_steps)
    checkpoint = _checkpoint(config, out)
    metrics = _fit(config, out, backbone, heads, train, val, max_steps, checkpoint)
    save_heads(heads, out / "heads")
    log.info("heads written to %s", out / "heads")
    return metrics


def _fit(
    config: Config,
    out: Path,
    backbone: Backbone,
    heads: MedusaHeads,
    train: list[Sequence],
    val: list[Sequence],
    max_steps: int,
    checkpoint: Path | None,
) -> dict[str, float]:
    settings = config.train
    module = MedusaModule(
        backbone,
        heads,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_fraction=settings.warmup_fraction,
        max_steps=max_steps,
        decay=settings.decay,
        loss_chunk_rows=settings.loss_chunk_rows,
    )
    batches = Batches(
        train,
        val,
        batch_tokens=settings.batch_tokens,
        seed=config.seed,
        num_batches=max_steps * settings.accumulate,
        val_batches=settings.val_batches,
        accumulate=settings.accumulate,
    )
    trainer = build_trainer(
        config,
        out,
        "train",
        max_steps=max_steps,
        precision=pick_precision(config, backbone.device),
        gradient_clip=settings.gradient_clip,
        accumulate=settings.accumulate,
        val_every=min(settings.val_every, max_steps),
        checkpoint_every=settings.checkpoint_every,
    )
    trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
    if max_steps % settings.val_every:  # else the last step has just been validated
        trainer.validate(module, batches, verbose=False)
    metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return {"train/steps": float(max_steps), **module.last_train_metrics, **metrics}


def _num_steps(config: Config, train: list[Sequence]) -> int:
    settings = config.train
    if settings.max_steps is not None:
        return settings.max_steps
    lengths = [len(sequence.input_ids) for sequence in train]
    sampler = LengthGroupedSampler(lengths, settings.batch_tokens, config.seed, 1)
    steps = math.ceil(settings.epochs * sampler.batches_per_epoch() / settings.accumulate)
    return max(steps, settings.min_steps)


def _checkpoint(config: Config, out: Path) -> Path | None:
    """Return the checkpoint to go on from; with train.resume=never, older ones are removed."""
    path = out / "checkpoints" / CHECKPOINT
    if config.train.resume == "never":
        shutil.rmtree(path.parent, ignore_errors=True)
        return None
    if not path.is_file():
        return None
    log.info("going on from %s", path)
    return path


def _log_plan(heads: MedusaHeads, train: list[Sequence], max_steps: int) -> None:
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    tokens = sum(len(sequence.input_ids) for sequence in train)
    trained = sum(int(sequence.is_trained.sum()) for sequence in train)
    log.info(
        "%d heads, %.1f M parameters; %d sequences, %d tokens, %.0f %% of them the assistant's; "
        "%d steps",
        heads.num_heads,
        parameters / 1e6,
        len(train),
        tokens,
        100 * trained / tokens,
        max_steps,
    )
