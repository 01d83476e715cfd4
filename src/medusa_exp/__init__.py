"""Train Medusa heads for any causal language model, and measure honestly what they gain.

Importing this package is cheap: its public names are looked up when they are first used, so
`python -m medusa_exp --help` answers without torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_exp.decode import generate
    from medusa_exp.model import MedusaHeads, build_heads, load_heads
    from medusa_exp.tree import Tree

__version__ = "0.1.0"

_PUBLIC = {
    "MedusaHeads": "medusa_exp.model",
    "Tree": "medusa_exp.tree",
    "build_heads": "medusa_exp.model",
    "generate": "medusa_exp.decode",
    "load_heads": "medusa_exp.model",
}

__all__ = ["MedusaHeads", "Tree", "__version__", "build_heads", "generate", "load_heads"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
