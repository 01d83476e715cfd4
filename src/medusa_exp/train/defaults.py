"""What the automatic settings of a training become: by device, backbone, heads and decoding.

A training that goes on takes what its checkpoint was made with, on another machine too, and where
decoding is set otherwise by then.

D hidden, W tokens of the head vocabulary, T tokens of a row.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from medusa_exp.config import DecodeConfig, TrainConfig, TreeConfig
from medusa_exp.model.attention import few_shapes
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loss import ROW_STEP
from medusa_exp.model.targets import room_in
from medusa_exp.tree.calibration import may_sample_drafts

log = logging.getLogger(__name__)

SETTLED = ("loss", "head_weights", "learning_rate", "loss_chunk_rows", "loss_form", "compile")
"""Keys of `train` that may be automatic."""
_CPU_ROWS = 256
_MOST_ROWS = 8192
"""Of a chunk: more bring nothing. (Fewer than ROW_STEP keep a GPU adding gradients up.)"""
_CLASS = 8 * 2**30
"""Two devices of one kind differ a little in what memory they say they have."""
LOGIT_BYTES = {"ce": 12, "topk_kl": 16, "kl": 22, "tv": 14, "nla": 14, "lk": 18}
"""By loss: bytes that exist at one time for each logit of a chunk: the logits, their logarithms of
the softmax and gradients in float32, or with less precise copies. tests/model/test_loss.py counts.
"""
_SAMPLED_FROM = 0.7
"""The temperature from which on nla is worth more than ce to drafts that are sampled: measured at
0.7 and 1 (LOG.md, 2026-11-29 and 2026-11-30). It loses where the next token is the likeliest."""
_RATE = 0.4
"""Measured on models of 0.26 and 268 million parameters: see `learning_rate`."""
_USUAL_RATE = 1e-3
"""Where the weights cannot be read."""
_LEAST_RATE, _MOST_RATE = 1e-4, 2e-2
_TOKENS_OF_RATE = 2048
"""Tokens of a step at which `_RATE` was measured."""
_ROWS_AT_ONCE = 1 << 15
_COMPILED_OPERATIONS = 3e16
"""Floating-point operations of a training above which compiling, which takes some ten seconds,
pays: two minutes of an H200, ten of a small GPU."""


def with_objective(
    settings: TrainConfig,
    decode: DecodeConfig,
    tree: TreeConfig,
    taken: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return the settings with a word in place of loss=auto and of head_weights=auto.

    Args:
        settings: the section `train` of the config.
        decode: its section of that name, by which the heads will be decoded.
        tree: the same.
        taken: as for `settle`.
    """
    loss, head_weights, taken = settings.loss, settings.head_weights, taken or {}
    if loss == "auto":
        is_drawn = settings.kind == "medusa1" and may_sample_drafts(decode, tree)
        is_drawn = is_drawn and decode.temperature >= _SAMPLED_FROM
        loss = taken.get("loss", "nla" if is_drawn else "ce")
    if head_weights == "auto":
        head_weights = taken.get("head_weights", "acceptance" if loss == "nla" else "decay")
    return replace(settings, loss=loss, head_weights=head_weights)


def settle(
    settings: TrainConfig,
    *,
    memory: int | None,
    vocabulary: int,
    trained: int,
    held: int = 0,
    rate: float,
    operations: float = 0.0,
    taken: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return the settings with a value in place of each automatic one.

    Args:
        settings: the section `train` of the config, after `with_objective`.
        memory: of the GPU in bytes, None on a CPU.
        vocabulary: W.
        trained: parameters of the heads.
        held: the same, but what heads share counted for each of them: a gradient each waits there.
        rate: the learning rate that `learning_rate` has for them.
        operations: floating-point operations of the whole training.
        taken: what the training that is resumed has taken, by the names in SETTLED.
    """
    chosen: dict[str, Any] = {
        "learning_rate": rate,
        "loss_chunk_rows": chunk_rows(memory, vocabulary, settings.loss),
        "loss_form": _form(settings, memory, trained, held or trained),
        "compile": str(_compiles(settings, memory, operations)).lower(),
        **(taken or {}),
    }
    automatic = {
        name: chosen[name] for name in SETTLED if getattr(settings, name) in (None, "auto")
    }
    return replace(settings, **automatic)


@torch.no_grad()
def learning_rate(backbone: Backbone, tokens: int) -> float:
    """Return a learning rate for heads of a backbone.

    Heads start from the lm_head, and read states of its size: so

        0.4 * (root of the mean square of its weights) / sqrt(D) * sqrt(tokens / 2048)

    Adam moves each weight by about the rate, whatever its gradient: weights of a large model are
    small, and a product of D of them moves by the more the larger D is. The root of a step's tokens
    is that of Malladi et al. (arXiv 2205.10287). Form and factor were chosen by what two models'
    heads made of several rates (LOG.md, 2026-11-29); two digits are kept.

    Args:
        backbone: whose lm_head is read.
        tokens: of an optimizer step, padding included.
    """
    weight_VD = backbone.lm_head.weight
    if not weight_VD.is_floating_point() or weight_VD.device.type == "meta":  # packed, or elsewhere
        return _USUAL_RATE
    squares = sum(
        torch.linalg.vector_norm(part, dtype=torch.float32).item() ** 2
        for part in weight_VD.split(_ROWS_AT_ONCE)
    )
    size = backbone.logit_scale * math.sqrt(squares / weight_VD.numel())
    rate = _RATE * size * math.sqrt(tokens / _TOKENS_OF_RATE / weight_VD.shape[1])
    return float(f"{min(_MOST_RATE, max(_LEAST_RATE, rate)):.1e}")


def chunk_rows(memory: int | None, vocabulary: int, loss: str) -> int:
    """Return the most rows whose logits exist at one time: a multiple of `ROW_STEP`."""
    if memory is None:
        return _CPU_ROWS
    room = room_in(max(1, round(memory / _CLASS)) * _CLASS)
    rows = room // (vocabulary * LOGIT_BYTES[loss])
    return min(_MOST_ROWS, max(1, rows // ROW_STEP) * ROW_STEP)


def _form(settings: TrainConfig, memory: int | None, trained: int, held: int) -> str:
    """Return at_once where there is room for what it keeps."""
    # Heads' gradients wait for the backward pass, beside those of the micro-batches before; of the
    # first one they become those of the parameters, of what heads share once they are added up.
    waiting = held if settings.accumulate > 1 else held - trained
    return "at_once" if 4 * waiting <= room_in(memory) else "recompute"


def _compiles(settings: TrainConfig, memory: int | None, operations: float) -> bool:
    is_possible = settings.kind == "medusa1" and settings.strategy != "fsdp"
    return memory is not None and is_possible and operations >= _COMPILED_OPERATIONS


def is_compiled_here(asked: TrainConfig, settled: TrainConfig, device: torch.device) -> bool:
    """Say whether the loss, and the backbone's layers, are to be compiled on this device.

    What auto became on a GPU, where a training began, stays in its checkpoint's key; a CPU that
    goes on with it compiles nothing for that.
    """
    is_meant = asked.compile == "true" or device.type == "cuda"
    return settled.compile == "true" and is_meant


def settled_of(settings: TrainConfig) -> dict[str, Any]:
    """Return the values of the keys in SETTLED."""
    return {name: getattr(settings, name) for name in SETTLED}


def describe(settings: TrainConfig, *, is_compiled: bool) -> str:
    """Say in a line what was taken, and whether it `is_compiled_here`."""
    form = {
        "at_once": "gradients with the loss",
        "recompute": "logits computed again for gradients",
    }
    parts = "the loss and the backbone's layers" if settings.features == "online" else "the loss"
    compiled = parts if is_compiled else "nothing"
    return (
        f"loss {settings.loss}, heads weighted by {settings.head_weights}; "
        f"learning rate {settings.learning_rate:g}; loss in chunks of at most "
        f"{settings.loss_chunk_rows:,} rows, {form[settings.loss_form]}; {compiled} compiled "
        "(train.loss, train.head_weights, train.learning_rate, train.loss_chunk_rows, "
        "train.loss_form, train.compile)"
    )


@contextmanager
def compiled_backbone(backbone: Backbone, autocast: torch.dtype | None) -> Iterator[bool]:
    """Have torch compile the backbone's layers for as long as this lasts.

    Where torch cannot, they run as they are, and a line says why.

    Args:
        backbone: frozen.
        autocast: the dtype of training's autocast, if it has any.

    Yields:
        Are they compiled?
    """
    with ExitStack() as stack:
        is_compiled = True
        try:
            stack.enter_context(backbone.compiled())
            _try(backbone, autocast)
        except Exception as error:  # of dynamo, of the compiler, of what it calls: there are many
            stack.close()
            said = [*str(error).splitlines(), type(error).__name__][0]
            log.warning(
                "train.compile: torch compiles no layer here, they run as they are: %s", said
            )
            is_compiled = False
        yield is_compiled


@torch.no_grad()
def _try(backbone: Backbone, autocast: torch.dtype | None) -> None:
    ids_BT = torch.zeros(2, 64, dtype=torch.long, device=backbone.device)
    is_cast = autocast is not None
    # What is compiled keeps the kernel of attention of its first call, in `few_shapes` or not.
    with torch.autocast(backbone.device.type, autocast, enabled=is_cast), few_shapes():
        backbone.hidden_states(ids_BT)
