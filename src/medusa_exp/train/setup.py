"""Config and inputs in; the heads, and what Lightning trains, out."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.model.adapters import add_adapters, save_adapted
from medusa_exp.model.checkpoint import check_fit, find_heads, load_heads
from medusa_exp.model.heads import MedusaHeads, build_heads
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.train.acceptance import answer_prompts
from medusa_exp.train.inputs import Inputs
from medusa_exp.train.joint import JointModule
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.objective import Objective
from medusa_exp.train.resume import made_with

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
        answer_prompts, config, inputs.tokenizer, inputs.prompts, inputs.backbone
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
