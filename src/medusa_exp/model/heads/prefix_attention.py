"""Prefix attention: a layer of attention over all hidden states so far, in front of the heads.

A hidden state was made to give the next token; what later ones depend on may stand in earlier
states. After the prefix attention of Ankner et al., "Hydra" (2024), section 4.2, but without a
network behind the attention: the heads have blocks of their own.

B rows, T positions, D hidden, H attention heads, E head size, C columns of keys and values.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

_THETA = 10_000.0
"""Base of the rotary positions: Su et al., "RoFormer" (2021), section 3.2.2."""


class PrefixAttention(nn.Module):
    """x + out(attention(norm(x))), causal; `out` starts as zero, and the layer as the identity."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        assert hidden_size % num_heads == 0 and hidden_size // num_heads % 2 == 0
        self.num_heads = num_heads
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.q, self.k, self.v, self.out = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        hidden_BTD: Tensor,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Return [B, T, D] of the states in their rows.

        Args:
            hidden_BTD: the backbone's last hidden states.
            positions_BT: of the states; None counts on from the cache.
            mask: [B or 1, 1, T, C], where to look; None is plain causal.
            cache: keys and values of what came before; those of the states are added.
            layer: which layer of the cache is this one's.
        """
        x_BTD = hidden_BTD.to(self.norm.weight.dtype)
        normed_BTD = self.norm(x_BTD)
        q_BHTE, k_BHTE, v_BHTE = (self._split(f(normed_BTD)) for f in (self.q, self.k, self.v))
        if positions_BT is None:
            start = 0 if cache is None else cache.get_seq_length(layer)
            positions_BT = torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device)[None]
        cos_B1TE, sin_B1TE = _angles(positions_BT, q_BHTE)
        q_BHTE, k_BHCE = (_rotate(x, cos_B1TE, sin_B1TE) for x in (q_BHTE, k_BHTE))
        v_BHCE = v_BHTE
        if cache is not None:
            k_BHCE, v_BHCE = cache.update(k_BHCE, v_BHCE, layer)
        if mask is None:
            mask = _causal(q_BHTE.shape[2], k_BHCE.shape[2], x_BTD.device)
        found_BHTE = scaled_dot_product_attention(q_BHTE, k_BHCE, v_BHCE, attn_mask=mask)
        return x_BTD + self.out(found_BHTE.transpose(1, 2).flatten(2))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def heads_input(
    prefix: PrefixAttention | None, hidden_BTD: Tensor, example_BT: Tensor | None = None
) -> Tensor:
    """Return what heads read in place of the hidden states of whole rows: [B, T, D].

    The states go from each row's beginning; without a prefix heads read them themselves. In packed
    rows `example_BT` is the number of the example that each position belongs to.
    """
    if prefix is None:
        return hidden_BTD
    if example_BT is None:
        return prefix(hidden_BTD)
    is_same_B1TT = (example_BT[:, :, None] == example_BT[:, None, :])[:, None]
    size = hidden_BTD.shape[1]
    return prefix(hidden_BTD, mask=is_same_B1TT & _causal(size, size, hidden_BTD.device))


def attention_heads(model_config: Any, hidden_size: int) -> int:
    """Return the backbone's number of attention heads, or a near one that divides `hidden_size`."""
    wanted = getattr(model_config, "num_attention_heads", None) or max(1, hidden_size // 64)
    return next(n for n in range(wanted, 0, -1) if hidden_size % (2 * n) == 0)


def _causal(size: int, columns: int, device: torch.device) -> Tensor:
    """Return the mask [T, C] of the last `size` of so many columns."""
    return torch.ones(size, columns, dtype=torch.bool, device=device).tril(columns - size)


def _angles(positions_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    # Made anew at each call: a buffer that is not saved would be empty in heads that are loaded.
    half = like.shape[-1] // 2
    frequency_E = _THETA ** -(torch.arange(half, device=positions_BT.device) / half)
    angle_BTE = positions_BT[..., None].float() * frequency_E
    angle_B1TE = torch.cat([angle_BTE, angle_BTE], -1)[:, None]
    return angle_B1TE.cos().to(like.dtype), angle_B1TE.sin().to(like.dtype)


def _rotate(x_BHTE: Tensor, cos_B1TE: Tensor, sin_B1TE: Tensor) -> Tensor:
    first, second = x_BHTE.chunk(2, -1)
    return x_BHTE * cos_B1TE + torch.cat([-second, first], -1) * sin_B1TE
