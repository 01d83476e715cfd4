"""Write docs/reference/config.md: every key of a config, its default, what it may be, its meaning.

`python scripts/config_reference.py`; tests/config/test_reference.py says when it is out of date.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from medusa_exp.config import limits, schema

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "reference" / "config.md"
_OF_THE_ROOT = ("stages", "run_dir", "sweep_dir")
"""Keys whose default conf/config.yaml sets, and the schema leaves empty."""
_TOP = """\
# Configuration

Every key that can be set, generated from `src/medusa_exp/config/schema.py` by
`python scripts/config_reference.py`. Set keys on the command line (`train.max_steps=500`), or take
a choice of a whole group (`train=medusa2`), which is a YAML file in `conf/` that sets some of them.
"""


def reference() -> str:
    """Return the page."""
    return _TOP + "".join(_sections(schema.Config, ""))


def _sections(section: type, place: str) -> Iterator[str]:
    """Yield the table of a section, then those of the sections in it."""
    meanings, hints = _docstrings(section), get_type_hints(section)
    inner = {f.name: found for f in fields(section) if (found := _section_in(hints[f.name]))}
    yield f"\n## {place or 'Top level'}\n\n{_flat(inspect.getdoc(section) or '', keep=True)}\n"
    choices = sorted(path.stem for path in (ROOT / "conf" / place).glob("*.yaml"))
    if place and choices:
        yield f"\nChoices: {', '.join(f'`{place}={choice}`' for choice in choices)}.\n"
    yield "\n| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n"
    prefix = f"{place}." if place else ""
    for key in fields(section):
        if key.name in inner and not meanings.get(key.name):
            continue
        default = _default_of_the_root(key.name) if not place else None
        default = default or _default(key)
        cells = (_type(hints[key.name]), default, _allowed(key), meanings[key.name])
        yield f"| `{prefix}{key.name}` | " + " | ".join(cell or " " for cell in cells) + " |\n"
    for name, found in inner.items():
        is_named = hints[name] is not found  # a dict of sections, under names of the user's
        yield from _sections(found, f"{prefix}{name}" + ".*" * is_named)


def _section_in(hint: Any) -> type | None:
    parts = (hint, *get_args(hint))
    found = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
    return found[0] if found else None


def _docstrings(section: type) -> dict[str, str]:
    """Return the docstring below each field, which only the source has."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
            found[field.target.id] = _flat(str(below.value.value))
    return found


def _flat(text: str, keep: bool = False) -> str:
    """Return the text of a docstring on one line, or as paragraphs, without what Markdown reads."""
    text = text if keep else " ".join(text.split())
    parts = text.split("`")  # every other one is code
    parts[::2] = (re.sub(r"([|<>*])", r"\\\1", part) for part in parts[::2])
    return "`".join(parts)


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    for old, new in ((" | None", " or null"), ("medusa_exp.config.schema.", "")):
        text = text.replace(old, new)
    return f"`{text}`"


def _default(key: "Field[Any]") -> str:
    value = key.default_factory() if key.default_factory is not MISSING else key.default
    if value is MISSING:
        return "required"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if text else "empty"


def _default_of_the_root(name: str) -> str | None:
    """Return the default of a key that conf/config.yaml sets; None for others."""
    if name not in _OF_THE_ROOT:
        return None
    lines = (ROOT / "conf" / "config.yaml").read_text(encoding="utf-8").splitlines()
    [value] = [line.partition(": ")[2] for line in lines if line.startswith(f"{name}: ")]
    return f"`{value}`"


def _allowed(key: "Field[Any]") -> str:
    match key.metadata.get("limit"):
        case limits.OneOf(words):
            return ", ".join(f"`{word}`" for word in words)
        case limits.Between(low, high):
            return f"{_number(low)} to {_number(high)}"
    return ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(reference(), encoding="utf-8")
