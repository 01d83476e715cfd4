"""Train Medusa heads for speculative decoding, and measure honestly what they gain.

    decoder = Decoder(model, load_heads("RUN/heads", model), Tree.load(Path("RUN/tree.json")))
    decoder.generate(input_ids, max_new_tokens=64)
    Decoder.from_run("RUN").stream("Once upon a time")
    metrics = run(compose(["+experiment=smoke", "head.num_heads=3"]), "RUN")

Importing this package is cheap: its public names are looked up when they are first used, so
`python -m medusa_exp --help` answers without torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_exp.cli import compose, run
    from medusa_exp.decode import Decoder, generate
    from medusa_exp.model import MedusaHeads, build_heads, load_heads
    from medusa_exp.tree import Tree

__version__ = "0.1.0"

_PUBLIC = {
    "Decoder": "medusa_exp.decode",
    "MedusaHeads": "medusa_exp.model",
    "Tree": "medusa_exp.tree",
    "build_heads": "medusa_exp.model",
    "compose": "medusa_exp.cli",
    "generate": "medusa_exp.decode",
    "load_heads": "medusa_exp.model",
    "run": "medusa_exp.cli",
}

__all__ = [
    "Decoder",
    "MedusaHeads",
    "Tree",
    "__version__",
    "build_heads",
    "compose",
    "generate",
    "load_heads",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
