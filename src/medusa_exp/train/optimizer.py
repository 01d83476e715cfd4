"""Optimizers of the heads (AdamW, 8-bit AdamW, Muon), and the schedule of their learning rate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medusa_exp.errors import UserError


def warmup_cosine(optimizer: Optimizer, warmup_fraction: float, max_steps: int) -> LambdaLR:
    """Rise linearly over a share of the steps, then fall to zero along a cosine.

    A group of the optimizer that `waits` so many steps has a rate of zero until then.
    """
    warmup_steps = max(1, round(warmup_fraction * max_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    waits = [group.get("waits", 0) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [lambda step, wait=w: factor(step) * (step >= wait) for w in waits])


def scheduled(optimizer: Optimizer, warmup_fraction: float, max_steps: int) -> dict[str, Any]:
    """Return the optimizer with its schedule, stepped once an optimizer step, for Lightning."""
    schedule = warmup_cosine(optimizer, warmup_fraction, max_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "muon": 8}
"""Upper bound of an optimizer's state in bytes for each float32 parameter."""
_INNER = ("blocks.", "root_block.", "prefix.")
"""Parts of the heads that lead from hidden states to hidden states."""


def build_optimizer(
    name: str,
    heads: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    adapters: dict[str, Any] | None = None,
    is_fused: bool = False,
) -> Optimizer:
    """Build adamw, adamw_8bit or muon; biases do not decay.

    Muon is for the matrices between hidden states; projections onto tokens have AdamW beside it.
    `adapters` is a group of parameters besides the heads', with its own `lr`. `is_fused`: AdamW as
    one kernel, without a copy of all parameters on the way.

    Raises:
        UserError: it needs what is not installed.
    """
    hidden: dict[str, Tensor] = {}
    named = dict(heads.named_parameters())
    if name == "muon":
        hidden = {n: p for n, p in named.items() if p.ndim == 2 and n.startswith(_INNER)}
    others = _groups([p for n, p in named.items() if n not in hidden], weight_decay)
    others += [adapters] if adapters else []
    fused = {"fused": True} if is_fused else {}
    if name != "muon":
        of_torch = fused if name == "adamw" else {}
        return _adam_class(name)(others, lr=learning_rate, **of_torch)
    if not hidden:
        raise UserError(
            "train.optimizer=muon: heads with head.num_layers=0 have no matrix for it. Set "
            "train.optimizer=adamw, or head.num_layers=1."
        )
    muon = torch.optim.Muon(
        hidden.values(),
        lr=learning_rate,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that one learning rate suits both
    )
    return MuonAndAdamW(muon, AdamW(others, lr=learning_rate, **fused)) if others else muon


class MuonAndAdamW(Optimizer):
    """Two optimizers as one, which is what Lightning steps, schedules and saves."""

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
        self.parts = {"muon": muon, "adamw": adamw}
        self.defaults: dict[str, Any] = {}
        self.state: Any = {}
        self._share_groups()
        self._optimizer_step_pre_hooks: Any = {}  # private: torch 2.13
        self._optimizer_step_post_hooks: Any = {}  # private: torch 2.13

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, then both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()

    def _share_groups(self) -> None:
        # The very dicts of the parts: a schedule that sets a learning rate here sets it there.
        self.param_groups = [g for part in self.parts.values() for g in part.param_groups]


def _groups(parameters: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adam_class(name: str) -> Callable[..., Optimizer]:
    if name == "adamw":
        return AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "train.optimizer=adamw_8bit needs bitsandbytes: pip install bitsandbytes, or set "
            "train.optimizer=adamw."
        ) from error
    return AdamW8bit
