"""Tree attention masks of a decoding step, in the form that the backbone's architecture wants.

Two traps: eager attention takes a boolean mask silently wrong (it wants a float one), and models
with several kinds of layers want a dict of masks. Float masks suit all: sdpa on a CPU makes one of
a boolean mask anyway, in every layer. On a GPU sdpa takes a boolean one, which a kernel writes.

Another attention function (a kernel for trees, FlexAttention) is one more form that `StepMask`
returns: say in `__init__` for which `_attn_implementation` it is, beside `takes_boolean`, and make
it in `over`, from which `decode/step.py` takes whatever the model is given.

B rows, N tree nodes, P columns of the cache before the tree, K = P + N columns in all. A row with
fewer than P tokens leaves columns unused between its own and the tree's.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.decode.cuda.mask_and_commit import build_mask
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.errors import UserError

FULL = "full_attention"
"""transformers' name for layers that see everything, and for their mask in a dict."""
MODELS = "the model's"
"""The one mask of a model, in a dict that has another beside it."""


class StepMask:
    """Builds masks over a cache of at most `capacity` columns.

    A node sees its row's cached tokens, its ancestors and itself; with a sliding window of w, only
    the w newest positions of these, itself included.

    Raises:
        UserError: the model has layers that are no attention over all or the newest positions.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, *, keeps_full: bool = False) -> None:
        """Prepare for a model.

        Args:
            model: the backbone's.
            capacity: columns of its cache, those of a tree included.
            keeps_full: return the mask without a window too, where the model has but the other.
        """
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        if unknown := kinds - {FULL, "sliding_attention"}:
            raise UserError(
                f"{type(model).__name__} has layers of {', '.join(sorted(unknown))}: a tree of "
                "guesses needs attention with a mask of its own in every layer."
            )
        self.kinds = kinds if len(kinds) > 1 else set()
        self.window = window if (not kinds or "sliding_attention" in kinds) else None
        self.dtype = model.dtype
        self.keeps_full = keeps_full and self.window is not None and not self.kinds
        is_one = not self.kinds and not self.keeps_full
        self.takes_boolean = is_one and model.config._attn_implementation == "sdpa"
        self.column_P = torch.arange(capacity, device=model.device)

    def at(self, lengths: list[int], ancestors_BNN: Tensor, depths_BN: Tensor) -> Any:
        """Return the mask [B, 1, N, P + N], or a dict of them by kind of layer.

        With `keeps_full` that may be a dict of the mask without a window, and of the MODELS.
        None stands for single tokens that see everything, which need no mask.

        Args:
            lengths: cached tokens of each row; P is the largest.
            ancestors_BNN: [b, n, m], is m an ancestor of n, or n itself?
            depths_BN: of each node, 0 for the root.
        """
        num_nodes, columns = depths_BN.shape[1], max(lengths)
        is_even = min(lengths) == columns
        is_clipped = self.window is not None and columns + num_nodes > self.window
        if num_nodes == 1 and is_even and not is_clipped and not self.kinds:
            return None
        lengths_B = torch.tensor(lengths, device=self.column_P.device)
        return self.over(lengths_B, columns, ancestors_BNN, depths_BN)

    def over(
        self, lengths_B: Tensor, columns: int, ancestors_BNN: Tensor, depths_BN: Tensor
    ) -> Any:
        """Return the mask over so many columns and the tree's, as `at`, but never None.

        Nothing is asked of the host: `lengths_B` lies on the device.
        """
        num_nodes = depths_BN.shape[1]
        column_P, lengths_B11 = self.column_P[:columns], lengths_B[:, None, None]
        past_BNP = (column_P < lengths_B11).expand(-1, num_nodes, -1)
        full_BNK = torch.cat([past_BNP, ancestors_BNN.expand(len(lengths_B), -1, -1)], dim=2)
        clipped_BNK = full_BNK
        if self.window is not None and columns + num_nodes > self.window:
            clipped_BNK = full_BNK & self._in_window(lengths_B11, depths_BN, column_P)
        if self.keeps_full:
            return {FULL: self._finish(full_BNK), MODELS: self._finish(clipped_BNK)}
        if not self.kinds:
            return self._finish(clipped_BNK)
        masks = {FULL: full_BNK, "sliding_attention": clipped_BNK}
        return {kind: self._finish(masks[kind]) for kind in sorted(self.kinds)}

    def by_kernel(
        self, kernels: Kernels, lengths_B: Tensor, columns: int, parents_BN: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a boolean mask over so many columns and the tree's, and positions_BN up to `last`.

        For models that take one, where `takes_boolean` is set; the same otherwise as `over`.
        """
        batch, num_nodes = len(lengths_B), parents_BN.shape[1]
        mask_B1NK = parents_BN.new_empty(batch, 1, num_nodes, columns + num_nodes, dtype=torch.bool)
        positions_BN = parents_BN.new_empty(batch, num_nodes)
        build_mask(
            kernels,
            parents_BN.expand(batch, -1),
            lengths_B,
            last,
            mask_B1NK=mask_B1NK,
            positions_BN=positions_BN,
            window=self.window,
        )
        return mask_B1NK, positions_BN

    def _in_window(self, lengths_B11: Tensor, depths_BN: Tensor, column_P: Tensor) -> Tensor:
        """Return [B, N, P + N], True where the key is fewer than `window` positions back."""
        node_B1N = lengths_B11 + depths_BN[:, None, :]
        past_B1P = column_P.expand(len(node_B1N), 1, -1)
        key_B1K = torch.cat([past_B1P, node_B1N], dim=2)
        return node_B1N.transpose(1, 2) - key_B1K < self.window

    def _finish(self, mask_BNK: Tensor) -> Tensor:
        mask_B1NK = mask_BNK[:, None]
        return torch.zeros_like(mask_B1NK, dtype=self.dtype).masked_fill_(
            ~mask_B1NK, torch.finfo(self.dtype).min
        )
