"""Stage train: data set and backbone in, `heads/` out."""

import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch

from medusa_exp.config import Config
from medusa_exp.data.loader import Batches
from medusa_exp.data.tokenised import load_tokenised
from medusa_exp.errors import UserError
from medusa_exp.files import content_key, write_json
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.model.heads import MedusaHeads, build_heads
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.tokenizer import load_tokenizer, save_tokenizer
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.regenerate import open_answers
from medusa_exp.train.trainer import CHECKPOINT, build_trainer, pick_precision

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> dict[str, float]:
    """Train heads, from the newest checkpoint of this run directory where there is one."""
    L.seed_everything(config.seed, verbose=False)
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    limit = min(config.dataset.max_length, backbone.max_length)
    documents = load_tokenised(config, tokenizer, limit)
    documents.log()
    write_json(out / "data.json", documents.summary)
    if config.train.batching == "packed":
        backbone.check_packing()
    heads = build_heads(
        backbone,
        num_heads=config.head.num_heads,
        num_layers=config.head.num_layers,
        kind=config.head.kind,
    )
    settings = config.train
    if settings.text == "own":
        data_key, train, val = open_answers(config, documents, backbone, tokenizer)
    else:
        data_key, train, val = documents.summary["key"], documents.split("train"), None
        val = documents.split("val") if config.dataset.val_fraction else None
    batches = Batches(
        train,
        val if val else None,
        batching=settings.batching,
        batch_tokens=settings.batch_tokens,
        row_tokens=limit,
        seed=config.seed,
        val_batches=settings.val_batches,
        accumulate=settings.accumulate,
    )
    max_steps = _num_steps(config, batches)
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    log.info("%d heads, %.1f M parameters; %d steps", heads.num_heads, parameters / 1e6, max_steps)
    key = made_with(config, data_key, backbone)
    metrics = _fit(config, out, backbone, heads, batches, max_steps, key)
    save_heads(heads, out / "heads")
    save_tokenizer(tokenizer, config, out / "heads")
    log.info("heads written to %s", out / "heads")
    return metrics


def _fit(
    config: Config,
    out: Path,
    backbone: Backbone,
    heads: MedusaHeads,
    batches: Batches,
    max_steps: int,
    key: str,
) -> dict[str, float]:
    settings = config.train
    checkpoint = checkpoint_to_resume(config, out, key)
    module = MedusaModule(
        backbone,
        heads,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_fraction=settings.warmup_fraction,
        max_steps=max_steps,
        decay=settings.decay,
        loss_chunk_rows=settings.loss_chunk_rows,
        labels=settings.labels,
        made_with=key,
    )
    trainer = build_trainer(
        config,
        out,
        "train",
        max_steps=max_steps,
        precision=pick_precision(config, backbone.device),
        gradient_clip=settings.gradient_clip,
        accumulate=settings.accumulate,
        val_every=min(settings.val_every, max_steps) if batches.val else None,
        checkpoint_every=settings.checkpoint_every,
    )
    trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
    if batches.val and max_steps % settings.val_every:  # else the last step has just been validated
        trainer.validate(module, batches, verbose=False)
    metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return {"train/steps": float(max_steps), **module.last_train_metrics, **metrics}


def _num_steps(config: Config, batches: Batches) -> int:
    settings = config.train
    if settings.max_steps is not None:
        return settings.max_steps
    steps = math.ceil(settings.epochs * batches.batches_per_epoch() / settings.accumulate)
    return max(steps, settings.min_steps)


def made_with(config: Config, data_key: str, backbone: Backbone) -> str:
    """Name all that decides what training gives, but for how often it is looked at and saved."""
    train = asdict(config.train)
    for key in ("resume", "val_every", "val_batches", "checkpoint_every"):
        del train[key]
    dataset = config.dataset
    weights = {name: source.weight for name, source in dataset.sources.items()}
    data = [data_key, dataset.val_fraction, dataset.test_fraction, weights]
    return content_key(asdict(config.head), train, data, config.seed, backbone.identity())


def checkpoint_to_resume(config: Config, out: Path, key: str) -> Path | None:
    """Return the checkpoint to go on from; with train.resume=never, older ones are removed.

    Raises:
        UserError: the checkpoint there was made with other settings.
    """
    path = out / "checkpoints" / CHECKPOINT
    if config.train.resume == "never":
        shutil.rmtree(path.parent, ignore_errors=True)
        return None
    if not path.is_file():
        return None
    if torch.load(path, map_location="cpu", weights_only=True).get("made_with") != key:
        raise UserError(
            f"{path} was made with another head, train, dataset, tokenizer, seed or model: set "
            "train.resume=never to train anew here, or choose another run_dir."
        )
    log.info("going on from %s", path)
    return path
