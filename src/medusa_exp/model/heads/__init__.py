"""The heads: what a family is (`model`), how it starts (`build`), what may stand before it
(`prefix`), and how it decodes (`stacked`).

Importing this registers them with transformers' AutoConfig and AutoModel.
"""

from transformers import AutoConfig, AutoModel

from medusa_exp.model.heads.blocks import ResBlock
from medusa_exp.model.heads.build import build_heads
from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.model import PROJECTIONS, MedusaHeads
from medusa_exp.model.heads.prefix import PrefixAttention, heads_input
from medusa_exp.model.heads.stacked import StackedHeads, stack_heads

__all__ = [
    "PROJECTIONS",
    "MedusaHeads",
    "MedusaHeadsConfig",
    "PrefixAttention",
    "ResBlock",
    "StackedHeads",
    "build_heads",
    "heads_input",
    "stack_heads",
]

AutoConfig.register("medusa", MedusaHeadsConfig)
AutoModel.register(MedusaHeadsConfig, MedusaHeads)
