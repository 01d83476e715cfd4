"""Medusa heads and their families.

To add a family: its block or its projection in `layers.py` (the contracts stand at the top), a row
of FAMILIES in `heads.py`, its word in `head.kind` of `config/schema.py`, a YAML file in conf/head,
and a row in `tests/model/test_families.py`, which tries on it all that others ask of heads.

Importing this registers them with transformers' AutoConfig and AutoModel.
"""

from transformers import AutoConfig, AutoModel

from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.heads import (
    FAMILIES,
    FREQUENT_TOKENS,
    LOW_RANK,
    MedusaHeads,
    StackedHeads,
    advice_on_cost,
    build_heads,
    family_for,
    from_head_places,
    head_vocabulary,
    own_projections_for,
    reads_whole_vocabulary,
    stack_heads,
)
from medusa_exp.model.heads.layers import ResBlock
from medusa_exp.model.heads.prefix_attention import PrefixAttention, heads_input

__all__ = [
    "FAMILIES",
    "FREQUENT_TOKENS",
    "LOW_RANK",
    "MedusaHeads",
    "MedusaHeadsConfig",
    "PrefixAttention",
    "ResBlock",
    "StackedHeads",
    "advice_on_cost",
    "build_heads",
    "family_for",
    "from_head_places",
    "head_vocabulary",
    "heads_input",
    "own_projections_for",
    "reads_whole_vocabulary",
    "stack_heads",
]

AutoConfig.register("medusa", MedusaHeadsConfig)
AutoModel.register(MedusaHeadsConfig, MedusaHeads)
