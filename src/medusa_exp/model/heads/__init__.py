"""The heads: what a family is (`model`), how it starts (`build`), what may stand before it
(`prefix`), and how it decodes (`stacked`).

A new family is a file with its block (as in `blocks`) or its projection (as in `projections`), a
row of FAMILIES in `model`, its name in HEAD_KINDS of `config/schema.py`, and a file in conf/head;
`tests/model/test_families.py` asks for a row too, and tries on it all that others ask of heads.

Importing this registers them with transformers' AutoConfig and AutoModel.
"""

from transformers import AutoConfig, AutoModel

from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.heads import (
    FAMILIES,
    MedusaHeads,
    StackedHeads,
    build_heads,
    stack_heads,
)
from medusa_exp.model.heads.layers import ResBlock
from medusa_exp.model.heads.prefix_attention import PrefixAttention, heads_input

__all__ = [
    "FAMILIES",
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
