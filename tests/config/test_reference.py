"""docs/reference/config.md says what the schema says."""

import importlib.util
from dataclasses import fields, is_dataclass
from pathlib import Path

from medusa_exp.config import Config

ROOT = Path(__file__).parents[2]


def _script():
    spec = importlib.util.spec_from_file_location(
        "config_reference", ROOT / "scripts" / "config_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    script = _script()
    assert script.TARGET.read_text(encoding="utf-8") == script.reference(), (
        "run python scripts/config_reference.py"
    )


def test_it_has_every_key_with_a_meaning():
    page = _script().reference()
    rows = {line.split(" | ")[0]: line.split(" | ")[-1] for line in page.splitlines()}
    for key in _keys(Config()):
        assert len(rows[f"| `{key}`"].strip(" |")) > 10, key
    assert len(list(_keys(Config()))) > 150


def _keys(section, prefix=""):
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"
