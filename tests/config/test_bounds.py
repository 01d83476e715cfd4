"""Every number of a config has bounds, and whatever is given for a key is taken or refused by name.

What is tried is drawn by a seed: extremes of the key's type, other types, and lists of them.
"""

import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from medusa_exp.cli import compose
from medusa_exp.config import continuation, from_dict, schema
from medusa_exp.config.compose import checked_section
from medusa_exp.config.limits import Between
from medusa_exp.config.reading import read_bytes
from medusa_exp.errors import UserError

NUMBERS = (0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e30, 0.5, -0.0, 1e308, 5e-324)
TEXTS = (
    "",
    "x",
    "1e9",
    "nan",
    "\0",
    "\ud800",
    "x" * 10**5,
    "${seed}",
    "${nothing}",
    "${oc.env:",
    "?",
)
OTHERS: tuple[Any, ...] = (
    True,
    None,
    math.nan,
    math.inf,
    -math.inf,
    [],
    {},
    [[]],
    [["a"]],
    {"a": 1},
)


DRAWS = 1
"""For each key; a thousand were drawn once."""


def keys_of(section: type) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and limit of a section's own keys."""
    hints = get_type_hints(section)
    for key in fields(section):
        name, inner = key.name, hints[key.name]
        if not is_dataclass(inner):
            yield name, inner, key.metadata.get("limit")


SECTIONS = [
    section
    for section in vars(schema).values()
    if isinstance(section, type) and section.__module__ == schema.__name__
]


def numbers_in(hint: Any) -> set[type]:
    return {hint} & {int, float} | {n for part in get_args(hint) for n in numbers_in(part)}


def test_every_number_has_two_bounds():
    for name, hint, limit in (key for section in SECTIONS for key in keys_of(section)):
        if numbers_in(hint):
            assert isinstance(limit, Between), name
            assert -math.inf < limit.low < limit.high < math.inf


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head.num_heads", 10**6),
        ("tree.num_nodes", 10**6),
        ("tree.paths", [[0] * n for n in range(1, 10**3)]),
        ("tree.paths", [[0, 0]]),
        ("tree.paths", [[0] * n for n in range(1, 18)]),
        ("decode.max_new_tokens", 10**7),
        ("train.loss_chunk_rows", 2**63),
        ("tokenizer.vocab_size", 1e30),
        ("train.lora.layers", [["a"]]),
        ("model.pretrain.hidden_size", 16384 - 16384 % 8),
        ("evaluate.batch_sizes", []),
        ("train.epochs", 1e5),
        ("train.epochs", 10**400),
    ],
)
def test_what_would_never_end_is_refused(key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        from_dict(nested(key, value))


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "[" * 500 + "]" * 500, "{a: 1}", "1e400"])
def test_no_value_of_a_command_line_is_a_traceback(value):
    with pytest.raises(UserError):
        compose([f"train.warmup_fraction={value}"])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_any_value_is_taken_or_refused_by_name(section):
    draw = random.Random(section.__name__)
    required = {"path": "x"} if section is schema.SourceConfig else {}
    for key, _, limit in keys_of(section):
        for _ in range(DRAWS):
            value, start = draw_value(draw, limit), time.perf_counter()
            said = refusal(section, required | nested(key, value))
            assert said is None or (key in said and len(said) < 500), f"{key}: {said}"
            assert time.perf_counter() - start < 5


def refusal(section: type, values: dict[str, Any]) -> str | None:
    try:
        checked_section(section, values)
    except UserError as error:
        return str(error)
    return None


def draw_value(draw: random.Random, limit: Any) -> Any:
    numbers = [*NUMBERS]
    if isinstance(limit, Between):
        numbers += [limit.low, limit.high, limit.low - 1, limit.high + 1]
    one = draw.choice([*numbers, *TEXTS, *OTHERS])
    return draw.choice([one, one, one, [one], [one] * 300, {"a": one}])


def test_what_is_too_long_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(UserError, match=r"an argument has 65,536 at most"):
        continuation.arguments(["tree.paths=" + "[0]," * 10**5])
    with pytest.raises(UserError, match=r"tree\.paths\.\d+.*more than 5,000 values"):
        from_dict({"tree": {"paths": [[0] * 100] * 100}})
    folder = tmp_path / "experiment"
    folder.mkdir()
    bomb = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    for text in (
        "a0: &a0 [x]\n" + bomb,
        "a: &a [*a]",
        "a: " + "[" * 100_000,
        "a: [" + "1," * 10_000 + "]",
        "#" * (1 << 21),
        "a: \0",
    ):
        (folder / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml (stands for|is larger|cannot be read)"):
            compose([f"hydra.searchpath=[file://{tmp_path}]", "+experiment=bad"])


def test_what_is_no_file_is_never_opened(tmp_path):
    path = tmp_path / "config.yaml"
    os.mkfifo(path)
    for place, what in (
        (path, "a pipe"),
        (tmp_path, "a directory"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(UserError, match=f"is {what}, and a file should be there"):
            read_bytes(place)
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        read_bytes(tmp_path / "none")
