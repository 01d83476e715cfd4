"""What makes decoding fast on a CPU: layers packed for it, and heads in 8-bit integers.

Both change modules that were loaded to decode with them, and neither changes what is decoded. On
other devices nothing is done.
"""

import logging
from pathlib import Path

from torch import nn

from medusa_exp.decode.decoder import Decoder
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, StackedHeads, stack_heads
from medusa_exp.model.int8 import to_int8
from medusa_exp.model.packed import pack

log = logging.getLogger(__name__)


def ready_to_draft(
    heads: MedusaHeads, backbone: Backbone, *, in_int8: bool
) -> StackedHeads | MedusaHeads:
    """Return heads as they draft fastest: stacked, and on a CPU quantized to int8.

    Changes `heads`: load them anew to train or to save.

    Args:
        heads: just loaded, to decode with.
        backbone: theirs.
        in_int8: quantize their projections, where that is faster (`decode.int8_heads`).
    """
    if in_int8 and to_int8(heads.lm_heads.output_layers()):
        log.info("heads draft with projections in 8-bit integers (decode.int8_heads)")
    return stack_heads(heads, backbone)


def pack_decoder(decoder: Decoder, cache_dir: str | Path) -> None:
    """Pack the linear layers of a decoder's backbone and heads, if they lie on a CPU.

    Compiled layers are left as they are: what compiles them has its own ways with weights.

    Args:
        decoder: whose modules are packed in place.
        cache_dir: keeps what was measured.
    """
    backbone, heads = decoder.backbone, decoder.heads
    is_quantized = getattr(backbone.model, "is_quantized", False)
    if backbone.device.type == "cpu" and not decoder.compiles and not is_quantized:
        backbone.names.keep()
        modules, kept = [backbone.model], [backbone.lm_head]
        if heads is not None:
            modules.append(heads.requires_grad_(False))  # what may be trained is not packed
            if isinstance(heads, MedusaHeads):  # the first layer tells their dtype
                kept += [m for m in heads.modules() if isinstance(m, nn.Linear)][:1]
        pack(modules, cache_dir, kept)
