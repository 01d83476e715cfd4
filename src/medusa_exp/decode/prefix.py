"""A backbone for heads with prefix attention: the states that it gives are what they read.

The layer that the heads bring along becomes the backbone's last one. Its keys and values lie in the
same cache, as one layer more, so that whatever keeps a tree's accepted nodes keeps these too.

B rows, N tokens of one forward, D hidden, V vocabulary.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from medusa_exp.decode.masks import FULL, MODELS
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads.prefix_attention import PrefixAttention


class PrefixedBackbone(Backbone):
    """The same model, one layer longer for those who decode with it."""

    def __init__(self, backbone: Backbone, prefix: PrefixAttention) -> None:
        self.__dict__.update(backbone.__dict__)
        self.backbone, self.prefix = backbone, prefix
        self.static_steps = None

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.backbone.num_layers + 1

    def forward(
        self,
        input_ids_BN: Tensor,
        cache: Cache,
        *,
        mask: Any = None,
        position_ids_BN: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (logits_BNV, hidden_BND) as `Backbone.forward`, but of states that heads read."""
        full = mask[FULL] if isinstance(mask, dict) else mask
        mask = mask.get(MODELS, mask) if isinstance(mask, dict) else mask
        whole: list[Tensor] = []
        handle = self.body.register_forward_hook(
            lambda _, inputs, output: whole.append(output.last_hidden_state)
        )
        try:
            logits_BNV, _ = self.backbone.forward(
                input_ids_BN, cache, mask=mask, position_ids_BN=position_ids_BN, keep=keep
            )
        finally:
            handle.remove()
        hidden_BND = self.prefix(
            whole[0].to(self.device),
            position_ids_BN,
            _as_boolean(full),
            cache,
            self.backbone.num_layers,
        )
        return logits_BNV, hidden_BND if keep is None else hidden_BND[:, keep]


def with_prefix(backbone: Backbone, prefix: PrefixAttention | None) -> Backbone:
    """Return the backbone that gives what heads with such a prefix read.

    The last one is kept: captured steps belong to it.
    """
    if prefix is None:
        return backbone
    if backbone.prefixed is None or backbone.prefixed.prefix is not prefix:
        backbone.prefixed = PrefixedBackbone(backbone, prefix)
    return backbone.prefixed


def _as_boolean(mask_B1NK: Tensor | None) -> Tensor | None:
    """Return where to look, of a mask that may hold 0 there and very little elsewhere."""
    return mask_B1NK == 0 if mask_B1NK is not None and mask_B1NK.is_floating_point() else mask_B1NK
