"""Attention of decoding steps over grouped queries, without copies of the KV cache; its kernels.

In grouped-query attention (Ainslie et al., arXiv 2305.13245) G query heads read one key-value head.
Under a mask transformers' sdpa repeats keys and values G times, in every layer of every step. Here
the G heads become rows of one head: queries [B, H, N, E] are read as [B, J, G * N, E], the mask's
rows are repeated instead, and each key is read once. `GroupedAttention` gives a model this function
within a `with` block, under a name of its own in transformers' AttentionInterface; outside of the
block, and to whoever saves the model, its attention is what it was.

B rows, H query heads, J key-value heads, G = H / J query heads a group, N queries of a row, K
columns of keys and values, E and F sizes of a key's and a value's head.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "medusa_grouped"
"""What transformers calls `grouped_attention`."""
_MOST_QUERIES = 256
"""More queries of a row than a tree has: a piece of a prompt, whose mask is the larger copy."""
_ALIGNED = 16
"""Columns that CUDA kernels want a mask's rows to be a multiple of, or pad them in every layer."""

_comes_in_few_shapes: ContextVar[bool] = ContextVar("comes_in_few_shapes", default=False)

_Folded = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Masks by identity and G: as the model was given them (kept, for its identity), and folded."""
_folded: ContextVar[_Folded | None] = ContextVar("folded", default=None)
"""Of the forward call that is running: all its layers share them."""


class GroupedAttention:
    """What gives a model `grouped_attention` for a while, if it can have it.

    It can where its attention is transformers' sdpa, taken from AttentionInterface by a name in its
    config; others, and models without groups, stay as they are. That config says otherwise within
    the block, so that no other thread may run the model meanwhile and expect sdpa's bits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        configs: dict[int, Any] = {}
        parts = (model, model.get_decoder())
        # By this attribute of a layer transformers' sdpa repeats keys and values.
        has_groups = any(getattr(m, "num_key_value_groups", 1) > 1 for m in model.modules())
        if has_groups and all(_goes_by_interface(type(part).__module__) for part in parts):
            for module in model.modules():
                config = getattr(module, "config", None)
                if hasattr(config, "_attn_implementation_internal"):  # private: transformers 5.23
                    configs[id(config)] = config
        self._configs = list(configs.values())
        if self._configs:
            AttentionInterface.register(NAME, grouped_attention)
            AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the model use it within the block, which is one forward call."""
        changed = [c for c in self._configs if c._attn_implementation == "sdpa"]
        for config in changed:
            config._attn_implementation_internal = NAME  # private: transformers 5.23
        token = _folded.set({})
        try:
            yield
        finally:
            _folded.reset(token)
            for config in changed:
                config._attn_implementation_internal = "sdpa"  # private: transformers 5.23


@contextmanager
def few_shapes() -> Iterator[None]:
    """Say that calls of a model within the block come in few shapes, again and again."""
    token = _comes_in_few_shapes.set(True)
    try:
        yield
    finally:
        _comes_in_few_shapes.reset(token)


@contextmanager
def kernels_for(device: torch.device) -> Iterator[None]:
    """Let sdpa take no kernel within the block that would be planned anew for each shape.

    Since 2.11 torch takes cuDNN's on Hopper and datacenter Blackwell, for all shapes in 16 bits. It
    makes a plan for each that it has not met: 55 to 70 ms (flashinfer's pull request 5245, on a
    Blackwell), far more than a prompt of a few hundred tokens takes. Within `few_shapes` it may.
    """
    cuda = torch.backends.cuda
    if device.type != "cuda" or _comes_in_few_shapes.get() or not cuda.cudnn_sdp_enabled():
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(True)


@cache
def _goes_by_interface(module: str) -> bool:
    """Does the code of a module look attention up by name, and do nothing else by that name?

    Some models (Falcon, DeepSeek V3.2) ask for `== "sdpa"` and make another mask for other names.
    """
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return False
    asks = re.search(r"_attn_implementation\s*(==|!=|in|not in)\s.*sdpa", source)
    return "ALL_ATTENTION_FUNCTIONS" in source and asks is None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what each query finds [B, N, H, F], and no weights; see AttentionInterface.

    What is no decoding step over grouped queries goes to transformers' sdpa, bit for bit: training,
    prompts, dropout, masks or biases of single heads, models without groups.

    Args:
        module: the layer.
        query: [B, H, N, E].
        key: [B, J, K, E].
        value: [B, J, K, F].
        attention_mask: [B or 1, 1, N, K], True where to look, or what is added to the scores, or
            `folded_mask` of these; None, of one query, is to look at everything.
        dropout: of the weights.
        scaling: of the scores; None is 1 / sqrt(E).
        kwargs: what else sdpa takes.
    """
    num_heads, num_queries = query.shape[1:3]
    groups = num_heads // key.shape[1]
    if groups == 1 or dropout or not _is_step(query, groups, attention_mask, kwargs):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: tuple[Tensor, None] = sdpa(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    mask = attention_mask
    if mask is not None and mask.shape[2] == num_queries:
        mask = folded_mask(mask, groups, query.dtype)
    rows_BJRE = query.unflatten(1, (-1, groups)).flatten(2, 3)
    found_BJRF = scaled_dot_product_attention(
        rows_BJRE, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scaling
    )
    found_BHNF = found_BJRF.unflatten(2, (groups, num_queries)).flatten(1, 2)
    return found_BHNF.transpose(1, 2).contiguous(), None


def _is_step(query: Tensor, groups: int, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Are these the queries of a step, under a mask that all heads share?"""
    num_queries = query.shape[2]
    # No generator: torch 2.11 would compile a layer for each value of all else in `kwargs`.
    for name in ("position_bias", "softcap", "s_aux", "cache"):
        if name in kwargs and kwargs[name] is not None:
            return False
    if mask is None:  # torch's CPU kernel groups as well, and is slow at it in the half types alone
        return num_queries == 1 and (query.is_cuda or query.dtype != torch.float32)
    is_shared = mask.ndim == 4 and mask.shape[1] == 1 and num_queries <= _MOST_QUERIES
    return is_shared and mask.shape[2] in (num_queries, groups * num_queries)


def fold_for_layer(layer: nn.Module, mask: Any, dtype: torch.dtype) -> Any:
    """Return a step's mask [B or 1, 1, N, K] as this layer's attention is fastest given it.

    That is `folded_mask`, where attention is sdpa or ours and the layer says how many heads share a
    key. A compiled layer is given this: in its graph the mask would be made anew in every layer.
    """
    attention = next((m for m in layer.modules() if hasattr(m, "num_key_value_groups")), None)
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    is_step = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1
    if attention is None or name not in (NAME, "sdpa") or not is_step:
        return mask
    groups = attention.num_key_value_groups if name == NAME else 1
    return folded_mask(mask, groups, dtype) if mask.shape[2] <= _MOST_QUERIES else mask


def folded_mask(mask_B1NK: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return `_fold_mask` of a mask, made in the first of the layers that share it."""
    known = None if torch.compiler.is_compiling() else _folded.get()
    if known is None:
        return _fold_mask(mask_B1NK, groups, dtype)
    key = (id(mask_B1NK), groups)
    if key not in known:
        known[key] = (mask_B1NK, _fold_mask(mask_B1NK, groups, dtype))
    return known[key][1]


def _fold_mask(mask_B1NK: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return [B, 1, G * N, K] of what is added to scores: the mask's rows once a query head.

    Additive and aligned because torch makes it so of any other, in every layer. A single row stands
    for all: [B, 1, 1, K].
    """
    batch, _, num_queries, columns = mask_B1NK.shape
    groups = groups if num_queries > 1 else 1
    is_boolean, is_cuda = mask_B1NK.dtype == torch.bool, mask_B1NK.is_cuda
    is_aligned = not is_cuda or mask_B1NK.stride(2) % _ALIGNED == 0
    if groups == 1 and is_aligned and not is_boolean:
        return mask_B1NK
    width = columns + (-columns % _ALIGNED if is_cuda else 0)
    # Made in its last shape: views that merge or drop sizes of 1 would forget the wider rows.
    folded_B1RK = mask_B1NK.new_zeros(
        *(batch, 1, groups * num_queries, width), dtype=dtype if is_boolean else mask_B1NK.dtype
    )[..., :columns]
    folded_B1GNK = folded_B1RK.unflatten(2, (groups, num_queries))
    if is_boolean:
        folded_B1GNK.masked_fill_(~mask_B1NK[:, :, None], torch.finfo(dtype).min)
    else:
        folded_B1GNK.copy_(mask_B1NK[:, :, None])
    return folded_B1RK
