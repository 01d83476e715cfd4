"""Packages that only some runs need: which extra of this package brings them, and what to say."""

from importlib.util import find_spec

_MODULES = {
    "parquet": ("pyarrow",),
    "report": ("altair", "vl_convert"),
    "wandb": ("wandb", "PIL", "altair", "vl_convert"),
}
"""Extra, as in `pip install 'medusa-exp[report]'` -> what it is imported for."""


def lacking(extra: str, what: str) -> str | None:
    """Return what to say where an extra is not installed, None where it is.

    Args:
        extra: one of those above.
        what: needs it: the beginning of the sentence.
    """
    missing = [module for module in _MODULES[extra] if find_spec(module) is None]
    if not missing:
        return None
    return f"{what} needs {' and '.join(missing)}: pip install 'medusa-exp[{extra}]'"
