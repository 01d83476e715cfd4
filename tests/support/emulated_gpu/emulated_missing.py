"""Operations that CUDA has and the CPU has not: fused attention, and parts of norms and dropout."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from emulated_device import CUDA, on_host, ran, run_or_record, to_device
from torch import Tensor


@dataclass
class Attended:
    """What one call of attention is given.

    B rows, H heads of queries, J of keys and values, N queries, K keys, E and F sizes of heads.
    """

    query: Tensor
    """[B, H, N, E]"""
    key: Tensor
    """[B, J, K, E]"""
    value: Tensor
    """[B, J, K, F]"""
    bias: Tensor | None
    dropout: float
    is_causal: bool
    scale: float | None

    def __post_init__(self) -> None:
        if self.dropout:
            raise NotImplementedError("dropout within attention is not emulated")
        if self.bias is not None and self.bias.dtype != self.query.dtype:
            raise RuntimeError("invalid dtype for bias - should match query's dtype")
        self.groups = self.query.shape[1] // self.key.shape[1]
        if self.scale is None:
            self.scale = 1 / math.sqrt(self.query.shape[-1])

    def attend(self, *, keeps_layout: bool) -> tuple[Tensor, Tensor]:
        """Return [B, H, N, F], laid out as the queries or else by tokens, and logsumexp."""
        order = (0, 2, 1, 3)
        if keeps_layout:
            order = tuple(sorted(range(4), key=self.query.stride().__getitem__, reverse=True))
        shape = (*self.query.shape[:3], self.value.shape[3])
        found = torch.empty_permuted(shape, order, dtype=self.query.dtype, device=CUDA)
        sums = torch.empty(shape[:3], dtype=torch.float32, device=CUDA)
        told, told_sums, held = on_host(found), on_host(sums), self._on_host()

        def run() -> None:
            scores, _, value = held.scores()
            told_sums.copy_(scores.logsumexp(-1))
            told.copy_(scores.softmax(-1) @ value)

        run_or_record(run)
        return found, sums

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return those of queries, keys and values."""
        held, g = self._on_host(), on_host(grad).float()
        scores, key, value = held.scores()
        weights = scores.softmax(-1)
        of_weights = g @ value.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        of_key = of_scores.mT @ held.query.float() * held.scale
        of_key, of_value = (
            repeated.unflatten(1, (-1, self.groups)).sum(2) for repeated in (of_key, weights.mT @ g)
        )
        found = of_scores @ key * held.scale, of_key, of_value
        like = self.query, self.key, self.value
        q, k, v = (to_device(one.to(given.dtype)) for one, given in zip(found, like, strict=True))
        return q, k, v

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return [B, H, N, K], and keys and values for all H heads, in float32."""
        key, value = (t.float().repeat_interleave(self.groups, 1) for t in (self.key, self.value))
        scores = self.query.float() @ key.mT * self.scale
        if self.bias is not None:
            scores = scores + self.bias.float()
        if self.is_causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return scores, key, value

    def _on_host(self) -> "Attended":
        tensors = map(on_host, (self.query, self.key, self.value, self.bias))
        return Attended(*tensors, self.dropout, self.is_causal, self.scale)


class Attention:
    """One of torch's fused kernels of attention, or its backward."""

    def __init__(self, kind: str, suffix: str) -> None:
        name = f"_scaled_dot_product_{kind}_attention{suffix}"
        schema = getattr(torch.ops.aten, name).default._schema
        self.kind, self.names = kind, [argument.name for argument in schema.arguments]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attended:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        return Attended(
            *(given[name] for name in ("query", "key", "value")),
            given.get("attn_bias"),
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            given.get("scale"),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what torch's does: found, logsumexp, and more that its backward is given."""
        ran[f"{self.kind} attention"] += 1
        given = self._given(args, kwargs)
        found = given.attend(keeps_layout=self.kind == "cudnn")
        seeds = (torch.empty((), dtype=torch.long) for _ in range(2))
        if self.kind == "efficient":
            return *found, *seeds
        lengths = given.query.shape[2], given.key.shape[2]
        if self.kind == "cudnn":
            found = found[0], found[1].unsqueeze(-1)
        return *found, None, None, *lengths, *seeds, given.query.new_empty(0)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the gradients of queries, keys and values; of a bias there is none."""
        found = self._given(args, kwargs).gradients(args[0])
        return (*found, None) if self.kind == "efficient" else found


def dropout(given: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Return what is left of a tensor, and what was kept, by draws of the device's generator."""
    kept = torch.rand_like(given, dtype=torch.float32) >= (p if train is not False else 0.0)
    return given * kept / (1 - p if train is not False else 1.0), kept


def rms_norm_backward(
    grad: Tensor,
    given: Tensor,
    shape: list[int],
    scale: Tensor,
    weight: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a root mean square norm's input and weight (scale is 1 / rms)."""
    g, x, s, w = map(on_host, (grad, given, scale, weight))
    dims = tuple(range(x.ndim - len(shape), x.ndim))
    normal, g = x.float() * s, g.float()
    scaled = g if w is None else g * w.float()
    of_x = s * (scaled - normal * (scaled * normal).mean(dims, keepdim=True))
    of_w = (g * normal).sum(tuple(range(x.ndim - len(shape))))
    return (
        to_device(of_x.to(x.dtype)) if wanted[0] else None,
        to_device(of_w.to(x.dtype)) if wanted[1] else None,
    )


MISSING = {
    "native_dropout": dropout,
    "_fused_rms_norm_backward": rms_norm_backward,
    **{
        f"_scaled_dot_product_{kind}_attention{suffix}": getattr(Attention(kind, suffix), way)
        for kind in ("efficient", "flash", "cudnn")
        for suffix, way in (("", "forward"), ("_backward", "backward"))
    },
}
"""By the names of torch's operations."""
