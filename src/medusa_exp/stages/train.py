"""Stage train: data set and backbone in, `heads/` out.

Config in; all that heads are trained on out: backbone, documents, hidden states, answers.

Config and inputs in; the heads, and what Lightning trains, out.
"""

import logging
import math
import sys
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.datamodule import Batches
from medusa_exp.data.examples import Examples
from medusa_exp.data.feature_cache import Features
from medusa_exp.data.prompts import Prompt, prompts_of
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.errors import UserError
from medusa_exp.model.adapters import add_adapters, save_adapted
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import check_fit, find_heads, load_heads, save_heads
from medusa_exp.model.heads import MedusaHeads, build_heads
from medusa_exp.model.loading import load_ends
from medusa_exp.model.loss import Objective
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.model.tokenizer import save_tokenizer
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.record import Notes
from medusa_exp.stages.session import Session
from medusa_exp.tracking.history import StepLogger
from medusa_exp.train.acceptance import (
    HeldOutResponse,
    held_out_responses,
    respond_to_prompts,
)
from medusa_exp.train.callbacks import BestHeads, EMAHeads, TrainingPreview
from medusa_exp.train.checkpointing import CHECKPOINT, Checkpoints, checkpoint_to_resume, made_with
from medusa_exp.train.failures import BadLoss, explain_memory, memory_of_training
from medusa_exp.train.launch import main, ray_parts, train_in_processes, train_on_ray
from medusa_exp.train.module import JointModule, MedusaModule
from medusa_exp.train.precompute import known_fingerprints, note_fingerprints, open_features
from medusa_exp.train.regenerated import open_regenerated
from medusa_exp.train.trainer import build_trainer, pick_precision, shard_layers

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a training starts from."""

    backbone: Backbone
    """Without its layers where no step needs them."""
    tokenizer: PreTrainedTokenizerBase
    documents: dict[str, Examples]
    """Of `train`, and of `val` if there is a validation."""
    data_key: str
    """Names all documents: those of the data, or the backbone's own answers to them."""
    row_tokens: int
    """The length limit of documents."""
    features: dict[str, Features]
    """Their hidden states, with train.features=cache."""
    prompts: list[Prompt]
    """Held-out ones, for `acceptance`."""
    answers: list[HeldOutResponse]
    """The backbone's to them."""

    def token_counts(self) -> Tensor:
        """Count the trained tokens [V] of the training documents."""
        counts_V = np.zeros(self.backbone.vocab_size, np.int64)
        for example in self.documents["train"]:
            ids = example.input_ids[example.is_trained]
            counts_V += np.bincount(ids, minlength=len(counts_V))
        return torch.from_numpy(counts_V)

    def batches(self, config: Config) -> Batches:
        """Return the batches of training and validation."""
        settings = config.train
        return Batches(
            self.documents["train"],
            self.documents.get("val"),
            batching=settings.batching,
            batch_tokens=settings.batch_tokens,
            row_tokens=self.row_tokens,
            seed=config.seed,
            val_batches=settings.val_batches,
            accumulate=settings.accumulate,
            num_heads=config.head.num_heads,
            features=self.features,
        )


class _Backbones:
    """The backbone with as little of it as there is need for."""

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self._files = session.spec.files_fingerprint()

    @cached_property
    def ends(self) -> Backbone:
        """Without its layers, if it is known from before and hidden states are cached."""
        known = known_fingerprints(self.config, self._files)
        if self.config.train.features == "cache" and known is not None:
            return load_ends(self.session.spec, *known)
        return self.body()

    @cached_property
    def _whole(self) -> Backbone:
        backbone = self.session.backbone(is_adapted=False)
        check_tree_attention(backbone)  # now, and not when its heads are there
        note_fingerprints(self.config, self._files, backbone)
        return backbone

    def body(self) -> Backbone:
        """With them."""
        return self._whole


def open_inputs(session: Session) -> Inputs:
    """Load, or make and keep, all that heads are trained on."""
    config, out = session.config, session.out
    backbones = _Backbones(session)
    backbone = backbones.ends
    tokenizer = session.tokenizer()
    row_tokens = min(config.dataset.max_length, backbone.max_length)
    tokenised = session.tokenized(tokenizer, row_tokens)
    tokenised.log()
    if rank_zero_only.rank == 0:
        known = read_json(out / "data.json", {})  # with what stage inspect has found, if it has
        same = known if known.get("key") == tokenised.summary["key"] else {}
        write_json(out / "data.json", {**same, **tokenised.summary})
    documents: dict[str, Examples] = {}
    if config.train.text == "own":
        data_key, *both = open_regenerated(config, tokenised, backbone, tokenizer)
        documents = {name: one for name, one in zip(("train", "val"), both, strict=True) if one}
    else:
        data_key, documents["train"] = tokenised.summary["key"], tokenised.split("train")
        if config.dataset.val_fraction:
            documents["val"] = tokenised.split("val")
    features: dict[str, Features] = {}
    if config.train.features == "cache":
        features = open_features(
            config, session.spec, documents, data_key, backbone, backbones.body
        )
        session.notes.add(features={split: found.path.name for split, found in features.items()})
    elif config.train.batching == "packed":
        backbone.check_packing()
    if config.train.loss != "ce":
        backbone.check_next_logits()
    prompts = _held_out_prompts(session, tokenizer, backbone)
    answers = held_out_responses(config, tokenizer, prompts, backbone, backbones.body)
    return Inputs(backbone, tokenizer, documents, data_key, row_tokens, features, prompts, answers)


def _held_out_prompts(
    session: Session, tokenizer: PreTrainedTokenizerBase, backbone: Backbone
) -> list[Prompt]:
    """Return `train.val_prompts` prompts; none, and a warning, where there is none to answer."""
    config = session.config
    if not config.train.val_prompts or not config.dataset.val_fraction:
        return []
    try:
        return prompts_of(
            session.split("val"),
            tokenizer,
            max_tokens=session.prompt_tokens(backbone.max_length),
            num_prompts=config.train.val_prompts,
        )
    except UserError as error:
        log.warning("no val/accept_length: %s", error)
        return []


_NUM_DOCUMENTS = 64
"""Held-out documents that say how far an adapted backbone has come from what it was."""


def start_heads(config: Config, inputs: Inputs) -> MedusaHeads:
    """Return fresh heads, or those that train.heads_from names.

    Raises:
        UserError: there are none there, or they are of another shape or backbone.
    """
    place = _named_heads(config)
    if place is None:
        counts_V = inputs.token_counts() if config.head.num_tokens else None
        return build_heads(inputs.backbone, **asdict(config.head), token_counts=counts_V)
    heads = load_heads(place)  # without the backbone, to whose dtype it would round them
    check_fit(heads, inputs.backbone, place)
    heads = heads.attach(inputs.backbone).float().to(inputs.backbone.device).train()
    limits = {"rank": heads.config.hidden_size, "num_tokens": heads.config.vocab_size}
    for key, value in asdict(config.head).items():
        if value is not None and key in limits:
            value = min(value, limits[key])  # as `build_heads` has it
        if getattr(heads.config, key) != value:
            raise UserError(
                f"train.heads_from={place} has {key}={getattr(heads.config, key)}, and this run "
                f"head.{key}={value}: set it to the same."
            )
    return heads


def build_module(
    config: Config, inputs: Inputs, heads: MedusaHeads, max_steps: int
) -> MedusaModule:
    """Return what Lightning trains."""
    settings = config.train
    options: dict[str, Any] = {
        "val_tree_nodes": settings.val_tree_nodes,
        "max_rank": config.tree.max_rank,
        "optimizer": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "warmup_fraction": settings.warmup_fraction,
        "max_steps": max_steps,
        "made_with": made_with(config, inputs.data_key, inputs.backbone),
    }
    if settings.compile and settings.features == "online":
        inputs.backbone.compile()
    if settings.kind == "medusa1":
        options["answers"] = lambda: inputs.answers
        return MedusaModule(inputs.backbone, heads, _objective(config), **options)
    # What it answers changes with it.
    options["answers"] = partial(
        respond_to_prompts, config, inputs.tokenizer, inputs.prompts, inputs.backbone
    )
    return JointModule(
        inputs.backbone,
        heads,
        _objective(config),
        adapted=add_adapters(inputs.backbone, settings.lora),
        adapter_learning_rate=settings.lora.learning_rate,
        heads_only_steps=round(settings.lora.heads_only_fraction * max_steps),
        self_distillation=settings.lora.self_distillation,
        **options,
    )


def finish_joint(
    config: Config, out: Path, module: JointModule, inputs: Inputs
) -> dict[str, float]:
    """Measure what the backbone has become, write it, and name it in the heads."""
    module.eval()
    metrics = {}
    if "val" in inputs.documents:
        examples = inputs.documents["val"][:_NUM_DOCUMENTS]
        with module.adapted.disable_adapter():
            before = measure_agreement(inputs.backbone, examples, "held-out loss before")
        after = measure_agreement(inputs.backbone, examples, "held-out loss after")
        metrics = {
            "train/backbone_nats_before": before.nats_per_token,
            "train/backbone_nats_after": after.nats_per_token,
        }
    save_adapted(module.adapted, inputs.backbone, inputs.tokenizer, out, config.train.lora.output)
    module.heads.config.backbone = str(out / "backbone")
    module.heads.config.backbone_identity = inputs.backbone.identity()
    return metrics


def _objective(config: Config) -> Objective:
    settings = config.train
    return Objective(
        loss=settings.loss,
        labels=settings.labels,
        top_k=settings.top_k,
        decay=settings.decay,
        coefficient=settings.coefficient,
        coefficient_schedule=settings.coefficient_schedule,
        chunk_rows=settings.loss_chunk_rows,
        form=settings.loss_form,
    )


def _named_heads(config: Config) -> Path | None:
    """Return the directory of the heads that the training starts from, if it names some.

    Raises:
        UserError: there are none.
    """
    if config.train.heads_from is None:
        return None
    return find_heads("train.heads_from", config.train.heads_from)


_LOCK = ".train.lock"


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Train heads, from the newest checkpoint of this run directory where there is one.

    Raises:
        UserError: another process trains there: each would write over the other's checkpoints.
    """
    session = session or Session(config, out)
    try:
        with FileLock(out / _LOCK, timeout=0):
            if config.train.strategy in ("ddp", "fsdp"):
                return train_in_processes(config, out, session.notes, __spec__.name)
            if config.train.strategy == "ray":
                return train_on_ray(config, out, session.notes, train_as_worker)
            return train(config, out, session)
    except Timeout as error:
        raise UserError(
            f"another process is training in {out}: wait for it, or choose another run_dir."
        ) from error


def train_as_worker(config: Config, out: Path, notes: Notes) -> dict[str, float]:
    """Train in this process as one of several, of which the first alone is asked for its notes."""
    session = Session(config, out)
    session.notes = notes
    return train(config, out, session)


def train(config: Config, out: Path, session: Session) -> dict[str, float]:
    """Train in this process, alone or as one of several."""
    with explain_memory(memory_of_training(config.train)):
        return _train(config, out, session)


def _train(config: Config, out: Path, session: Session) -> dict[str, float]:
    L.seed_everything(config.seed, verbose=False)
    inputs = open_inputs(session)
    heads = start_heads(config, inputs)
    # Not where this process has the body: another one may have come late enough to need none.
    if config.train.strategy == "fsdp" and config.train.features == "online":
        session.notes.add(backbone_bytes=shard_layers(inputs.backbone))
    batches = inputs.batches(config)
    max_steps = _num_steps(config, batches)
    log.info("%s; %d steps", heads.describe(), max_steps)
    module = build_module(config, inputs, heads, max_steps)
    metrics = _fit(config, out, module, batches, session)
    if rank_zero_only.rank == 0:
        if isinstance(module, JointModule):
            metrics |= finish_joint(config, out, module, inputs)
        save_heads(heads, out / "heads")
        save_tokenizer(inputs.tokenizer, session.spec, out / "heads")
        log.info("heads written to %s", out / "heads")
    return metrics


def _fit(
    config: Config, out: Path, module: MedusaModule, batches: Batches, session: Session
) -> dict[str, float]:
    settings = config.train
    checkpoint, step = checkpoint_to_resume(config, out, module.made_with)
    session.notes.add(resumed_from_step=step)
    checkpoints = Checkpoints(out / "checkpoints" / CHECKPOINT, settings.checkpoint_every)
    best = BestHeads(out / "checkpoints", settings.patience)
    average = EMAHeads(settings.average, module) if settings.average else None
    # In this order: the average leaves the heads' place after the best have been kept.
    callbacks = [
        best,
        *([average] if average else []),
        checkpoints,
        TrainingPreview(settings.optimizer, average is not None),
    ]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    trainer = _trainer(config, out, module, bool(batches.val), callbacks, session.log_step)
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
    log_step: StepLogger | None,
) -> L.Trainer:
    settings = config.train
    return build_trainer(
        config,
        out,
        "train",
        log_step,
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


if __name__ == "__main__":
    main(train_as_worker, *sys.argv[1:])
