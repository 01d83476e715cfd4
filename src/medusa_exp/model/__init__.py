"""The frozen backbone, the Medusa heads on it, and their files.

Importing this registers the heads with transformers' AutoConfig and AutoModel.
"""

from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads, save_heads
from medusa_exp.model.heads import MedusaHeads, MedusaHeadsConfig, build_heads
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "Backbone",
    "MedusaHeads",
    "MedusaHeadsConfig",
    "build_heads",
    "load_backbone",
    "load_heads",
    "load_tokenizer",
    "save_heads",
    "save_tokenizer",
]
