"""Stage train: train heads on a data set for a backbone, and write `heads/`.

A recipe, from top to bottom: open what heads are trained on (`training_inputs.py`), build heads and
module (`start_heads`, `build_module`), fit (`fit`), save. It runs in this process, or in several,
each of which runs all of it (`train/launch.py`).
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import Timeout
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from medusa_exp.config import Config, TrainConfig, from_dict, to_dict
from medusa_exp.data.datamodule import Batches
from medusa_exp.errors import UserError
from medusa_exp.model.adapters import add_adapters, save_adapted
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import check_fit, find_heads, load_heads, save_heads
from medusa_exp.model.heads import (
    MedusaHeads,
    build_heads,
    family_for,
    own_projections_for,
)
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.model.tokenizer import save_tokenizer
from medusa_exp.runs.locks import locked
from medusa_exp.runs.machine import gpu_memory, pick_device
from medusa_exp.runs.record import Notes
from medusa_exp.runs.seals import seal
from medusa_exp.stages.early_checks import check_family
from medusa_exp.stages.session import Session, limits_of
from medusa_exp.stages.training_inputs import BackboneOpener, Inputs, open_inputs, validation_rule
from medusa_exp.train.acceptance import (
    HeldOutResponse,
    respond_to_prompts,
)
from medusa_exp.train.callbacks import BestHeads, EMAHeads, TrainingPreview
from medusa_exp.train.checkpointing import (
    CHECKPOINT,
    Checkpoints,
    checkpoint_to_resume,
    made_of,
    settled_before,
    training_key,
)
from medusa_exp.train.defaults import (
    describe,
    is_compiled_here,
    learning_rate,
    settle,
    settled_of,
    with_objective,
)
from medusa_exp.train.failures import BadLoss, explain_memory, memory_of_training
from medusa_exp.train.launch import (
    Job,
    be_alone,
    main,
    ray_parts,
    refuse_other_launchers,
    train_in_processes,
    train_on_ray,
)
from medusa_exp.train.module import JointLoss, MedusaModule
from medusa_exp.train.throughput import Operations, Throughput
from medusa_exp.train.trainer import AUTOCAST, build_trainer, pick_precision

log = logging.getLogger(__name__)

_LOCK = ".train.lock"
_NUM_DOCUMENTS = 64
"""Held-out documents that say how far an adapted backbone has come from what it was."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Train heads, from the newest checkpoint of this run directory where there is one.

    Raises:
        UserError: another process trains there: each would write over the other's checkpoints.
    """
    session, settings = session or Session(config, out), config.train
    try:
        with locked(out / _LOCK, timeout=0):
            if settings.strategy == "auto":
                be_alone()
                return train(session)
            if settings.strategy != "ray":
                refuse_other_launchers(settings.devices)
            session.forget_backbone()  # each process loads its own
            job = Job(to_dict(config), out, settings, session.notes)
            if settings.strategy == "ray":
                use_gpu = pick_device(config.device).type == "cuda"
                return train_on_ray(train_as_worker, job, use_gpu=use_gpu)
            return train_in_processes(__spec__.name, job)
    except Timeout as error:
        raise UserError(
            f"another process is training in {out}: wait for it, or choose another run_dir."
        ) from error


def train_as_worker(config: dict[str, Any], out: Path, notes: Notes) -> dict[str, float]:
    """Train in this process as one of several, of which the first alone is asked for its notes."""
    session = Session(from_dict(config), out)
    session.notes = notes
    return train(session)


def train(session: Session) -> dict[str, float]:
    """Train in this process, alone or as one of several; return the metrics."""
    config, out = session.config, session.out
    taken = settled_before(out, config.train.resume)
    settings = with_objective(config.train, config.decode, config.tree, taken)
    config = session.config = replace(config, train=settings)
    with explain_memory(memory_of_training(config.train)):
        L.seed_everything(config.seed, verbose=False)
        opener, begun = BackboneOpener(session), begun_heads(config.train.heads_from)
        config = with_family(session, opener.ends, begun)
        check_family(config, opener.ends)
        inputs = open_inputs(session, opener)
        heads = start_heads(config, inputs, begun)
        batches = inputs.batches(config)
        max_steps = _num_steps(config, batches)
        log.info("%s; %d steps", heads.describe(), max_steps)
        module = build_module(config, inputs, heads, max_steps, taken)
        is_compiled = is_compiled_here(config.train, module.settings, inputs.backbone.device)
        log.info("%s", describe(module.settings, is_compiled=is_compiled))
        session.notes.add(settled=settled_of(module.settings))
        metrics = fit(session, module, batches)
        if rank_zero_only.rank == 0:
            if module.joint is not None:
                metrics |= finish_joint(session, module, module.joint, inputs)
            save_heads(heads, out / "heads")
            save_tokenizer(inputs.tokenizer, session.spec, out / "heads")
            seal(out / "heads")
            log.info("heads written to %s", out / "heads")
        return metrics


def begun_heads(heads_from: str | None) -> MedusaHeads | None:
    """Return the heads that train.heads_from names, or None where it names none.

    They are without the backbone, to whose dtype it would round them.

    Raises:
        UserError: there are none there.
    """
    return load_heads(find_heads("train.heads_from", heads_from)) if heads_from else None


def with_family(session: Session, backbone: Backbone, begun: MedusaHeads | None) -> Config:
    """Return the config with what head.kind=auto and head.own_projections=null stand for.

    Which family that is, is said: that of the heads that training starts from, where there are any.
    """
    config, size = session.config, backbone.vocab_size
    head = config.head
    kind, num_tokens, own = head.kind, head.num_tokens, head.own_projections
    rank = head.rank
    if kind == "auto" and begun is not None:
        kind = begun.config.kind
        num_tokens = begun.config.num_tokens if num_tokens is None else num_tokens
        rank = begun.config.rank if rank is None else rank
        log.info("head.kind=auto: %s, as in train.heads_from", kind)
        session.notes.add(head_kind=kind)
    elif kind == "auto":
        embedding = backbone.model.get_input_embeddings()
        is_as_wide = getattr(embedding, "embedding_dim", None) == backbone.hidden_size
        can_share = config.model.device_map is None and is_as_wide
        kind, num_tokens = family_for(kind, size, num_tokens, can_share=can_share)
        frequent = f" and head.num_tokens={num_tokens}" if num_tokens else ""
        log.info("head.kind=auto: %s%s, for a vocabulary of %s tokens", kind, frequent, f"{size:,}")
        session.notes.add(head_kind=kind)
    if own is not None or begun is None:  # else those heads decide
        own = own_projections_for(kind, size, num_tokens, own)
    named = replace(head, kind=kind, num_tokens=num_tokens, rank=rank, own_projections=own)
    return replace(config, head=named)


def start_heads(config: Config, inputs: Inputs, begun: MedusaHeads | None) -> MedusaHeads:
    """Return fresh heads, or those that train.heads_from names, which are changed.

    Raises:
        UserError: those are of another shape or backbone.
    """
    if begun is None:
        counts_V = inputs.token_counts() if config.head.num_tokens else None
        return build_heads(inputs.backbone, **asdict(config.head), token_counts=counts_V)
    named = str(config.train.heads_from)
    check_fit(begun, inputs.backbone, Path(named))
    heads = begun.attach(inputs.backbone).float().to(inputs.backbone.device).train()
    limits = {"rank": heads.config.hidden_size, "num_tokens": heads.config.vocab_size}
    for key, value in asdict(config.head).items():
        if value is not None and key in limits:
            value = min(value, limits[key])  # as `build_heads` has it
        if key == "own_projections" and value is None:
            continue  # no such choice, or left to these heads
        if getattr(heads.config, key) != value:
            raise UserError(
                f"train.heads_from={named} has {key}={getattr(heads.config, key)}, and this run "
                f"head.{key}={value}: set it to the same."
            )
    return heads


def build_module(
    config: Config,
    inputs: Inputs,
    heads: MedusaHeads,
    max_steps: int,
    taken: Mapping[str, Any] | None = None,
) -> MedusaModule:
    """Return what Lightning trains; `taken` is what automatic settings were before it resumes."""
    backbone = inputs.backbone
    step_tokens = config.train.accumulate * config.train.batch_tokens
    asked = with_objective(config.train, config.decode, config.tree, taken)
    settings = settle(
        asked,
        memory=gpu_memory(backbone.device),
        vocabulary=heads.config.head_vocab_size,
        trained=sum(p.numel() for p in heads.parameters()),
        rate=learning_rate(backbone, step_tokens * config.train.devices),
        held=sum(p.numel() for k in range(heads.num_heads) for p in heads.head_parameters(k)),
        operations=operations_of(asked, backbone, heads).of_tokens(
            max_steps * step_tokens, min(inputs.row_tokens, config.train.batch_tokens)
        ),
        taken=taken,
    )
    counted = (config.head, settings, config.dataset)
    others: dict[str, Any] = {
        "seed": config.seed,
        "data_key": inputs.data_key,
        "backbone": backbone,
    }
    key, key_parts = training_key(*counted, **others), made_of(*counted, **others)
    former_key = key
    if backbone.names.has_former:
        with backbone.names.former():
            former_key = training_key(*counted, **others)
    joint = None
    responses: Callable[[], list[HeldOutResponse]] = lambda: inputs.responses  # noqa: E731
    if settings.kind == "medusa2":
        heads_only_steps = round(settings.lora.heads_only_fraction * max_steps)
        joint = JointLoss(add_adapters(backbone, settings.lora), settings.lora, heads_only_steps)
        # What it answers changes with it.
        limits = limits_of(config, backbone, inputs.tokenizer)
        rule = validation_rule(config)
        responses = partial(respond_to_prompts, inputs.prompts, limits, backbone, rule)
    return MedusaModule(
        backbone,
        heads,
        settings,
        max_steps=max_steps,
        responses=responses,
        max_rank=config.tree.max_rank,
        rule=validation_rule(config),
        key=key,
        former_key=former_key,
        made_of=key_parts,
        joint=joint,
    )


def fit(session: Session, module: MedusaModule, batches: Batches) -> dict[str, float]:
    """Train, validate and keep the heads that are wanted; return the metrics.

    Raises:
        UserError: a loss is NaN or infinite.
    """
    out, settings = session.out, session.config.train
    checkpoint, step = checkpoint_to_resume(
        out, {module.key, module.former_key}, settings.resume, module.made_of
    )
    session.notes.add(resumed_from_step=step)
    checkpoints = Checkpoints(out / "checkpoints" / CHECKPOINT, settings.checkpoint_every)
    is_best_kept = settings.keep == "best"
    best = BestHeads(out / "checkpoints", settings.patience, is_restored=is_best_kept)
    average = EMAHeads(settings.average, module) if settings.average else None
    # In this order: the average leaves the heads' place after the best have been kept.
    callbacks = [best, *([average] if average else []), checkpoints]
    precision = pick_precision(session.config.dtype.precision, module.backbone.device)
    dtype = AUTOCAST.get(precision)
    throughput = Throughput(
        operations_of(settings, module.backbone, module.heads), dtype or torch.float32
    )
    preview = TrainingPreview(settings.optimizer, average is not None, throughput, module.settings)
    callbacks += [throughput, preview]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    trainer = _trainer(session, module, bool(batches.val), callbacks)
    compiles = is_compiled_here(settings, module.settings, module.backbone.device)
    try:
        with module.compiled(dtype) if compiles else nullcontext():
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
    metrics = {"train/steps": float(steps), **module.last_metrics, **throughput.metrics()}
    if is_best_kept and best.value is not None:
        best.restore(module)
        metrics |= {**best.metrics, "train/best_step": best.step}
    return {name: float(value) for name, value in metrics.items()}


def operations_of(settings: TrainConfig, backbone: Backbone, heads: MedusaHeads) -> Operations:
    """Return what training these heads needs of the device."""
    is_online = settings.features == "online"
    asks = settings.loss != "ce" or (settings.labels == "teacher" and is_online)
    return Operations.of(backbone, heads, runs_layers=is_online, asks_lm_head=asks)


def finish_joint(
    session: Session, module: MedusaModule, joint: JointLoss, inputs: Inputs
) -> dict[str, float]:
    """Measure what the adapted backbone has become, write it, and name it in the heads."""
    module.eval()
    out, backbone, adapted = session.out, inputs.backbone, joint.adapted
    metrics = {}
    if "val" in inputs.documents:
        examples = inputs.documents["val"][:_NUM_DOCUMENTS]
        with adapted.disable_adapter():
            before = measure_agreement(backbone, examples, "held-out loss before")
        after = measure_agreement(backbone, examples, "held-out loss after")
        metrics = {
            "train/backbone_nats_before": before.nats_per_token,
            "train/backbone_nats_after": after.nats_per_token,
        }
    save_adapted(adapted, backbone, inputs.tokenizer, out, joint.settings.output)
    module.heads.config.backbone = str(out / "backbone")
    module.heads.config.backbone_identity = backbone.identity()
    return metrics


def _trainer(
    session: Session, module: MedusaModule, validates: bool, callbacks: list[L.Callback]
) -> L.Trainer:
    config, settings = session.config, session.config.train
    return build_trainer(
        pick_device(config.device),
        session.out,
        "train",
        session.log_step,
        max_steps=module.max_steps,
        precision=pick_precision(config.dtype.precision, module.backbone.device),
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
    # Named, for Lightning would take the tasks of a SLURM allocation for these processes.
    environment = TorchElasticEnvironment()
    return {"strategy": name, "devices": settings.devices, "plugins": [environment]}


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
    hint = "The heads were broken before that."
    if checkpoint.is_file():
        hint = f"{checkpoint} is from before: another dtype goes on from it, another rate cannot."
    return UserError(
        f"{error}, on conversations {named}{more}: try dtype=fp32, or lower train.learning_rate "
        f"and set train.resume=never. {hint}"
    )


if __name__ == "__main__":
    main(train_as_worker, *sys.argv[1:])
