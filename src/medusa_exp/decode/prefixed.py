"""The backbone as heads with prefix attention see it.

B rows, N tokens of one forward, K columns of the cache, D hidden, V vocabulary.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from medusa_exp.decode.masks import FULL, MODELS
from medusa_exp.decode.step import Observer
from medusa_exp.model.attention import kernels_for
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import PrefixAttention


class PrefixedBackbone(Backbone):
    """A backbone for heads with prefix attention: its hidden states are those that they read.

    The layer of attention that the heads bring along becomes the last one. Its keys and values lie
    in the same cache, as one layer more, so that what commits accepted nodes commits these too.
    """

    def __init__(self, backbone: Backbone, prefix: PrefixAttention, observer: Observer) -> None:
        super().__init__(backbone.model, uses_grouped_attention=backbone.uses_grouped_attention)
        self.prefix, self._observer = prefix, observer

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return super().num_layers + 1

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
            logits_BNV, _ = super().forward(
                input_ids_BN, cache, mask=mask, position_ids_BN=position_ids_BN, keep=keep
            )
        finally:
            handle.remove()
        with self._observer.part("heads"), kernels_for(self.device):
            hidden_BND = self.prefix(
                self.as_read(whole[0].to(self.device)),
                position_ids_BN,
                _as_boolean(full),
                cache,
                super().num_layers,
            )
        return logits_BNV, hidden_BND if keep is None else hidden_BND[:, keep]


def _as_boolean(mask_B1NK: Tensor | None) -> Tensor | None:
    """Return where to look, of a mask that may hold 0 there and very little elsewhere."""
    return mask_B1NK == 0 if mask_B1NK is not None and mask_B1NK.is_floating_point() else mask_B1NK
