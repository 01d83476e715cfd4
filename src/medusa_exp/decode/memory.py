"""How many slots of continuous batching the free memory has room for.

Nearly all that a slot takes is its row of the KV cache; what a column of it takes is measured, on a
run of one token, because architectures differ. D hidden, N nodes of a draft tree, V vocabulary.
"""

import logging

import torch
from rich.filesize import decimal

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.loop import PREFILL_TOKENS
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.machine import available_memory

log = logging.getLogger(__name__)

_USABLE = 0.9
"""Share of the free memory that may be planned for: allocators leave gaps."""
_COPIED = 16
"""One of so many columns of all slots may be copied at a time, to go on with next turns."""
_STATES, _INNER_STATES = 8, 4
"""Tensors as wide as D, and as an MLP, that a layer has at a time, about."""


def slots_with_room(
    backbone: Backbone, drafter: Drafter, rule: AcceptanceRule, wanted: int, num_columns: int
) -> int:
    """Return how many slots there is memory for, but at most so many as are wanted.

    Args:
        backbone: the drafter's.
        drafter: makes the trees of a step.
        rule: that verifies them.
        wanted: slots.
        num_columns: tokens of each.

    Raises:
        UserError: there is no room for one.
    """
    free = free_bytes(backbone.device)
    if free is None:
        return wanted
    column = bytes_of_column(backbone)
    of_slot = column * (num_columns + num_columns // _COPIED + drafter.num_nodes + 2)
    of_slot += _bytes_of_step(backbone, drafter, rule, num_columns)
    of_prompts = column * max(PREFILL_TOKENS, num_columns) + _bytes_of_prompts(backbone)
    number = int((_USABLE * free - of_prompts) // of_slot)
    if number < 1:
        raise UserError(
            f"there is no room to decode {num_columns} tokens: {decimal(of_slot + of_prompts)} are "
            f"needed, and {decimal(free)} of memory are free. Lower the most new tokens of a "
            "response or dataset.max_length."
        )
    if number < wanted:
        log.warning(
            "memory has room for %d of %d prompts at a time: %s each for up to %d tokens, %s free",
            number,
            wanted,
            decimal(of_slot),
            num_columns,
            decimal(free),
        )
    return min(number, wanted)


def columns_beside(num_slots: int, num_columns: int) -> int:
    """Return how many columns prompts, or copies of rows, may take at a time beside the slots.

    One prompt may take `num_columns` in any case.
    """
    return max(PREFILL_TOKENS, num_slots * num_columns // _COPIED)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU or of the host; None where it cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + _cached_bytes(device))
    return available_memory()


def _cached_bytes(device: torch.device) -> int:
    """Return what torch caches and can give out again: not what captured graphs work in."""
    if torch.cuda.get_allocator_backend() != "native":  # others do not tell
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    number = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == number and segment["segment_pool_id"] == (0, 0)
    )


def bytes_of_column(backbone: Backbone) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    layers = one_column(backbone).layers
    return sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))


@torch.inference_mode()
def one_column(backbone: Backbone) -> GrowingCache:
    """Return the keys and values of one token: what a column of a row is, in every layer."""
    cache = GrowingCache(backbone.num_layers, 1, 1)
    backbone.forward(torch.zeros(1, 1, dtype=torch.long, device=backbone.device), cache)
    return cache


def _bytes_of_step(
    backbone: Backbone, drafter: Drafter, rule: AcceptanceRule, num_columns: int
) -> int:
    """Return what a row's logits and its mask take, copies included."""
    size, nodes = backbone.model.dtype.itemsize, drafter.num_nodes
    of_logit = 2 * size + (0 if rule.name == "greedy" else 16)  # probabilities are float32
    of_logit += 8 if rule.draft == "sampled" else 0  # and what drafts are drawn from
    return nodes * (backbone.vocab_size * of_logit + 2 * size * (num_columns + nodes))


def _bytes_of_prompts(backbone: Backbone) -> int:
    """Return what the activations of a group of prompts take."""
    width, config = backbone.hidden_size, backbone.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * width
    of_token = _STATES * width + _INNER_STATES * int(inner)
    return PREFILL_TOKENS * of_token * backbone.model.dtype.itemsize
