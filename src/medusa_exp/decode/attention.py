"""Attention masks of a decoding step, in the form that the backbone's architecture wants.

N tree nodes, P cached positions. Two traps: eager attention takes a boolean mask silently wrong (it
wants a float one), and models with several kinds of layers want a dict of masks.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.errors import UserError


class StepMask:
    """Builds the masks of one tree (or of single tokens) at growing cache lengths.

    A node sees every cached position, its ancestors and itself; with a sliding window of w, only
    the w newest positions of these, itself included.
    """

    def __init__(
        self, model: PreTrainedModel, tree_mask_NN: np.ndarray, depths_N: np.ndarray, capacity: int
    ) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"{type(model).__name__} has layers of {', '.join(sorted(unknown))}: a tree of "
                "guesses needs attention with a mask of its own in every layer."
            )
        self.kinds = kinds if len(kinds) > 1 else set()
        self.window = window if (not kinds or "sliding_attention" in kinds) else None
        self.is_eager = config._attn_implementation == "eager"
        self.dtype = model.dtype
        self.depths_N = torch.from_numpy(depths_N).to(model.device)
        tree_NN = torch.from_numpy(tree_mask_NN).to(model.device)
        past_NP = tree_NN.new_ones(len(depths_N), capacity)
        # The last P + N columns are the mask at cache length P: a view, not a copy, at each step.
        self.full = torch.cat([past_NP, tree_NN], dim=1)[None, None]
        self.capacity = capacity

    def at(self, length: int) -> Any:
        """Return the mask [1, 1, N, length + N] for `length` cached positions, or a dict of them.

        None stands for a single token that sees everything, which needs no mask.
        """
        num_nodes = len(self.depths_N)
        is_clipped = self.window is not None and length + num_nodes > self.window
        if num_nodes == 1 and not is_clipped and not self.kinds:
            return None
        full = self.full[..., self.capacity - length :]
        clipped = full & self._in_window(length) if is_clipped else full
        if self.kinds:
            masks = {"full_attention": full, "sliding_attention": clipped}
            return {kind: self._finish(masks[kind]) for kind in sorted(self.kinds)}
        return self._finish(clipped)

    def _in_window(self, length: int) -> Tensor:
        """Return [N, length + N], True where the key is fewer than `window` positions back."""
        device = self.depths_N.device
        keys = torch.cat([torch.arange(length, device=device), length + self.depths_N])
        return (length + self.depths_N)[:, None] - keys < self.window

    def _finish(self, mask: Tensor) -> Tensor:
        if not self.is_eager:
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(
            ~mask, torch.finfo(self.dtype).min
        )
