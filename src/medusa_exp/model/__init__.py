"""The frozen backbone, the Medusa heads on it, and their files.

Importing this registers the heads with transformers' AutoConfig and AutoModel.
"""

from medusa_exp.model.backbone import Backbone, load_backbone, load_tokenizer
from medusa_exp.model.checkpoint import load_heads, save_heads
from medusa_exp.model.heads import MedusaHeads, MedusaHeadsConfig, build_heads

__all__ = [
    "Backbone",
    "MedusaHeads",
    "MedusaHeadsConfig",
    "build_heads",
    "load_backbone",
    "load_heads",
    "load_tokenizer",
    "save_heads",
]
