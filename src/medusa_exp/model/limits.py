"""What the directory of a model may hold, looked at before any library opens a file of it.

A library opens what it finds: a pipe is waited for without end, and a config of a billion layers is
built until there is no memory. What is checked here is only what would not end in a message.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from medusa_exp.config.reading import check_regular, read_bytes
from medusa_exp.errors import UserError

_OPENED = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")
_MOST_JSON = {"config.json": 1 << 20, "tokenizer.json": 1 << 28, "vocab.json": 1 << 28}
_MOST_OF_OTHERS = 1 << 26
_NEVER_OPENED = ("trainer_state.json",)
"""What a training leaves beside a model, and grows with it."""
_MOST_LAYERS, _MOST_EXPERTS, _MOST_ENTRIES, _MOST_NUMBER = 2_000, 1 << 20, 100_000, 1 << 40
"""Of layers, blocks or heads; of experts, which may be single rows of a matrix (Doge has 16,384);
of numbers in a file, and the largest of them."""
_LAYERS = re.compile(r"(num|n)_(\w*_)?(layers?|blocks?|heads?)\w*$")
_EXPERTS = re.compile(r"(num|n)_(\w*_)?experts?\w*$")
_WEIGHTS_OF_A_BYTE = 16
"""More than any quantized format has: what a config asks for beyond this is in no file there."""


def check_directory(key: str, path: Path) -> None:
    """Look at the files of a model's or a tokenizer's directory; what `key` of the config names.

    Raises:
        UserError: one is no regular file, is too large, or asks for more than its weights hold;
            names the file.
    """
    _check(key, path, path.stat().st_mtime_ns)


@cache
def _check(key: str, path: Path, changed: int) -> None:
    for file in sorted(path.iterdir()):
        if file.name.endswith(_OPENED):
            check_regular(file)
            most = _MOST_JSON.get(file.name, _MOST_OF_OTHERS)
            is_opened = file.suffix == ".json" and file.name not in _NEVER_OPENED
            if is_opened and file.stat().st_size > most:
                raise UserError(f"{key}={path}: {file.name} is larger than {most >> 20} MiB.")
    weights = sorted(path.glob("*.safetensors"))
    for file in weights:
        _check_header(key, file)
    for kind in ("safetensors", "bin"):  # those of Flax and TensorFlow nobody opens
        for file in path.glob(f"*.{kind}.index.json"):
            _check_index(key, file)
    if (path / "config.json").is_file():
        # Of weights in another format it is not known how many there are.
        is_whole = not any(path.glob("*.bin"))
        size = sum(file.stat().st_size for file in weights) * is_whole
        _check_config(f"{key}={path}: config.json", _read(path / "config.json"), size)


def _read(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path, _MOST_JSON.get(path.name, _MOST_OF_OTHERS)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}. Restore it.") from error


def _check_header(key: str, path: Path) -> None:
    try:
        with safe_open(path, framework="np"):  # looks at the header, and at the file's length
            pass
    except SafetensorError as error:
        said = repr(str(error)[:160])  # holds names out of the file
        fault, remedy = "is no safetensors file, or was cut off", "Copy it again"
        if "unknown variant" in said:  # of a tensor's type
            fault, remedy = "has tensors that this safetensors does not know", "Update safetensors"
        raise UserError(f"{key}={path.parent}: {path.name} {fault} ({said}). {remedy}.") from error


def _check_index(key: str, path: Path) -> None:
    index = _read(path)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise UserError(f"{key}={path.parent}: {path.name} has no weight_map: restore it.")
    for name in set(map(str, named.values())):
        # A file of another format can hold code to run, and one elsewhere is not the model's.
        if "/" in name or "\\" in name or not name.endswith((".safetensors", ".bin")):
            raise UserError(
                f"{key}={path.parent}: {path.name} names {name[:80]!r}, and only files beside it "
                "in safetensors are read: restore it."
            )


def _check_config(what: str, config: Any, weight_bytes: int) -> None:
    """Check the numbers of a config.json against what there could be; `weight_bytes` 0: unknown."""
    if not isinstance(config, dict):
        raise UserError(f"{what} is no object of keys: restore it.")
    for number, (name, value) in enumerate(_numbers(config)):
        if number > _MOST_ENTRIES:
            raise UserError(f"{what} has more than {_MOST_ENTRIES:,} numbers: restore it.")
        most = _MOST_NUMBER
        if _LAYERS.match(name):
            most = _MOST_LAYERS
        elif _EXPERTS.match(name):
            most = _MOST_EXPERTS
        if isinstance(value, int) and abs(value) > most:
            raise UserError(
                f"{what}: {name} is beyond {most:,}, which no model has: restore the file."
            )
    inner = config.get("text_config")
    text = {**config, **(inner if isinstance(inner, dict) else {})}
    width = _size(text, "hidden_size", "n_embd", "d_model")
    asked = max(
        width * _size(text, "vocab_size"),
        width * width * _size(text, "num_hidden_layers", "n_layer", "num_layers"),
        width * _size(text, "num_experts", "num_local_experts", "n_routed_experts"),
    )
    if weight_bytes and asked > _WEIGHTS_OF_A_BYTE * weight_bytes:
        raise UserError(
            f"{what} asks for {asked:,} weights and more, and the files of weights have "
            f"{weight_bytes:,} bytes: restore the file that was changed."
        )


def _size(config: dict[str, Any], *names: str) -> int:
    found = (config[name] for name in names if name in config)
    return next((value for value in found if isinstance(value, int) and value > 0), 1)


def _numbers(node: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield each number of nested JSON under the key that it stands at, or in a list at."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _numbers(value, str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _numbers(value, name)
    elif isinstance(node, int | float) and math.isfinite(node):
        yield name, node
