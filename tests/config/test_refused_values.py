"""What the schema says of values that it refuses: word for word, for every key.

`python tests/config/test_refused_values.py` writes tests/golden/refused_values.json anew.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from medusa_exp import config as config_package
from medusa_exp.config import Config, HeadConfig, TrainConfig
from medusa_exp.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "refused_values.json"
VALUES: dict[type, list[Any]] = {
    str: ["nonsense", ""],
    int: [-1, 0, 1, 7, 10**7],
    float: [math.nan, math.inf, -1.0, 0.0, 1.5, 1e9],
    bool: [True],
}
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("DatasetConfig", {"min_turns": 3, "max_turns": 2}),
    ("DatasetConfig", {"min_chars": 3, "max_chars": 2}),
    ("PretrainConfig", {"num_key_value_heads": 3}),
    ("PretrainConfig", {"hidden_size": 20}),
    ("HeadConfig", {"kind": "medusa_lowrank", "rank": 8}),
    ("HeadConfig", {"kind": "hydra", "rank": 32}),
    ("HeadConfig", {"kind": "hydra", "num_layers": 0}),
    ("HeadConfig", {"kind": "recurrent", "num_layers": 0}),
    ("HeadConfig", {"kind": "medusa_tied", "num_layers": 0}),
    ("TrainConfig", {"kind": "medusa2", "features": "cache"}),
    ("TrainConfig", {"kind": "medusa2", "compile": "true"}),
    ("TrainConfig", {"strategy": "fsdp", "kind": "medusa2"}),
    ("TrainConfig", {"strategy": "fsdp", "compile": "true"}),
    ("TrainConfig", {"strategy": "auto", "devices": 2}),
    ("TokenizerConfig", {"special_tokens": {"end": "x"}}),
    ("TokenizerConfig", {"special_tokens": {"eos_token": ""}}),
    ("DecodeConfig", {"rule": "sampling", "temperature": 0.0}),
    ("DecodeConfig", {"rule": "typical", "temperature": math.nan}),
    ("EvaluateConfig", {"batch_sizes": [1, 4, 1]}),
    ("Config", {"heads_from": "run", "stages": ["train"]}),
]


def refusals() -> dict[str, str]:
    """Return what each section says of each value that it refuses, of the others nothing."""
    found = {}
    for name in (*config_package.__all__, "Config"):
        section = getattr(config_package, name)
        if not hasattr(section, "__dataclass_fields__"):
            continue
        required = {"path": "x"} if name == "SourceConfig" else {}
        for key, values in _values(section):
            for value in values:
                _note(found, section, {**required, key: value}, f"{name}.{key}={value!r}")
    for name, values in TOGETHER:
        _note(found, getattr(config_package, name), values, f"{name} {values}")
    return found


def _values(section: type) -> list[tuple[str, list[Any]]]:
    hints = get_type_hints(section)
    return [(field.name, _of_type(hints[field.name])) for field in fields(section)]


def _of_type(hint: Any) -> list[Any]:
    origin, found = get_origin(hint), VALUES.get(hint, [])
    if origin is list:
        return [[], *([value] for value in VALUES.get(get_args(hint)[0], []))]
    if origin in (Union, UnionType):  # of int | None, those of int
        found = [value for inner in get_args(hint) for value in VALUES.get(inner, [])]
    return found


def _note(found: dict[str, str], section: type, values: dict[str, Any], what: str) -> None:
    try:
        section(**values)
    except UserError as error:
        found[what] = str(error)
    except Exception as error:
        pytest.fail(f"{what}: {error!r}")


def test_own_drafts_are_for_heads_that_see_drafts():
    train = TrainConfig(own_drafts_from=0.5)
    assert Config(train=train, head=HeadConfig(kind="recurrent")).train is train
    with pytest.raises(UserError, match=r"head.kind \(with train.own_drafts_from\)=medusa"):
        Config(train=train)


def test_every_refusal_is_worded_as_it_was():
    assert refusals() == json.loads(GOLDEN.read_text())


def test_a_device_map_leaves_little_else():
    sections = {"model": config_package.ModelConfig(device_map="auto")}
    for more in (
        {"train": config_package.TrainConfig(strategy="ddp")},
        {"train": config_package.TrainConfig(kind="medusa2")},
        {"head": config_package.HeadConfig(kind="medusa_tied")},
        {"tokenizer": config_package.TokenizerConfig(resize_embedding=True)},
    ):
        with pytest.raises(UserError, match=r" \(with model\.device_map\)=\w+ is not known"):
            Config(**sections, **more)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(refusals(), indent=1) + "\n")
