"""Heads in the formats that vLLM reads, as stage export writes them."""

from pathlib import Path

from medusa_exp.export.publishing import export, open_source
from medusa_exp.model import Backbone


def export_heads(heads: Path, backbone: Backbone, out: Path, format_: str = "vllm") -> Path:
    """Write a directory of heads, which `save_heads` has written, in a format."""
    source, ours = open_source(heads, backbone, str(backbone.model.config.name_or_path))
    export(source, ours, backbone, format_, out)
    return out
