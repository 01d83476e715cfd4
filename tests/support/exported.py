"""Heads of every family that have left their start, and their exports."""

from pathlib import Path

import torch
from torch import Tensor

from medusa_exp.export.publishing import export, open_source
from medusa_exp.export.reading import Reading
from medusa_exp.model import Backbone, build_heads, save_heads
from medusa_exp.model.heads import MedusaHeads

COUNTS = torch.arange(64).flip(0)
FAMILIES = {
    "medusa": {"kind": "medusa"},
    "no bias": {"kind": "medusa", "bias": False, "num_layers": 2},
    "no blocks": {"kind": "medusa", "num_layers": 0},
    "tied": {"kind": "medusa_tied"},
    "tied, deep": {"kind": "medusa_tied", "num_layers": 2},
    "tied, frequent": {"kind": "medusa_tied", "num_tokens": 40, "token_counts": COUNTS},
    "rank": {"kind": "medusa_lowrank", "rank": 16},
    "frequent": {"kind": "medusa_lowrank", "num_tokens": 40, "token_counts": COUNTS},
    "both": {"kind": "medusa_lowrank", "rank": 16, "num_tokens": 40, "token_counts": COUNTS},
    "hydra": {"kind": "hydra", "num_layers": 2},
    "rooted": {"kind": "rooted"},
    "rooted, no blocks": {"kind": "rooted", "num_layers": 0},
    "rooted, both": {"kind": "rooted", "rank": 16, "num_tokens": 40, "token_counts": COUNTS},
    "recurrent": {"kind": "recurrent", "num_tokens": 40, "token_counts": COUNTS},
    "recurrent, shared": {"kind": "recurrent", "own_projections": False},
    "medusa, prefix": {"kind": "medusa", "prefix_attention": True},
    "hydra, prefix": {"kind": "hydra", "prefix_attention": True},
}


def save_moved(backbone: Backbone, family: str, place: Path, num_heads: int = 3) -> MedusaHeads:
    """Save heads whose every parameter is away from where it started; return them."""
    torch.manual_seed(0)
    heads = build_heads(backbone, num_heads=num_heads, **FAMILIES[family])
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_heads(heads, place)
    return heads


def exported(
    backbone: Backbone, family: str, format_: str, place: Path, dtype: str = "auto"
) -> Reading:
    """Save heads of a family under `place`, export them beside, and return the reading."""
    save_moved(backbone, family, place / "heads")
    source, ours = open_source(place / "heads", backbone, "org/target", dtype)
    return export(source, ours, backbone, format_, place / format_)


def export_heads(heads: Path, backbone: Backbone, out: Path, format_: str = "vllm") -> Path:
    """Write a directory of heads, which `save_heads` has written, in a format."""
    source, ours = open_source(heads, backbone, str(backbone.model.config.name_or_path))
    export(source, ours, backbone, format_, out)
    return out


def logits_of(heads: MedusaHeads, backbone: Backbone) -> Tensor:
    """Return logits_KRV of all heads on some states, prefix attention left out."""
    torch.manual_seed(1)
    states_RD, drafted_RK = torch.randn(6, 32), torch.randint(0, 64, (6, heads.num_heads))
    heads = heads.attach(backbone)
    rows = [heads.head_logits(k, states_RD, drafted_RK) for k in range(heads.num_heads)]
    return heads.over_vocabulary(torch.stack(rows)).detach()
