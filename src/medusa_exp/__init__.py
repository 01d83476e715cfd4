"""Train Medusa heads for any causal language model, and measure honestly what they gain.

Importing this package is cheap: its public names are looked up when they are first used, so
`python -m medusa_exp --help` answers without torch.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "MedusaHeads": "medusa_exp.model",
    "Tree": "medusa_exp.tree",
    "build_heads": "medusa_exp.model",
    "generate": "medusa_exp.decode",
    "load_heads": "medusa_exp.model",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
