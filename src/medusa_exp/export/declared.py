"""What the config of a directory of heads says, in the words of each format.

A value of a type that no reader of it takes is a fault, and counts as not said.
"""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """Something in which a directory of heads is not what an engine takes it for."""

    name: str
    text: str
    is_error: bool = True


@dataclass(frozen=True)
class Declared:
    """What a config says; None where it says nothing."""

    num_heads: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    has_bias: bool | None = None
    is_tied: bool | None = None
    num_tokens: int | None = None
    own_projections: bool = False
    attention_heads: int = 1
    kind: str | None = None
    backbone: str = ""
    backbone_identity: str = ""
    backbone_weights: str = ""
    heads_sha256: tuple[str, ...] = ()


def well_typed(config: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Return the config without what is of the wrong type, and a fault for each of these keys."""
    kept, faults = {}, []
    for key, value in config.items():
        wanted = next((what for what, name in _TYPES.items() if re.fullmatch(name, key)), None)
        if value is None:
            continue
        if wanted and not _IS[wanted](value):
            faults.append(Fault("wrong config", f"{key} is {value!r:.40}, and no {wanted}"))
        else:
            kept[key] = value
    return kept, faults


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


_TYPES = {
    "whole number": r"(medusa_)?(num_\w+|rank)|hidden_size|vocab_size|n_predict|"
    r"truncated_vocab_size",
    "text": r"(medusa_)?(backbone(_identity|_weights)?|kind)|base_model_name_or_path|model_type",
    "list of texts": r"medusa_heads_sha256|architectures",
}
"""What a value must be -> the keys that are read here."""
_IS = {"whole number": _is_number, "text": is_text, "list of texts": _is_list_of_text}


def declared_by(format_: str, config: dict[str, Any]) -> Declared:
    """Return what a config says, in the words of its format."""
    get, prefix = config.get, "" if format_ == "medusa_exp" else "medusa_"
    common: dict[str, Any] = {
        "hidden_size": get("hidden_size"),
        "vocab_size": get("vocab_size"),
        "backbone": get(f"{prefix}backbone") or get("base_model_name_or_path") or "",
        "backbone_identity": get(f"{prefix}backbone_identity") or "",
        "backbone_weights": get(f"{prefix}backbone_weights") or "",
        "heads_sha256": tuple(get("medusa_heads_sha256") or ()),
    }
    if format_ in ("medusa_exp", "vllm"):
        kind = get(f"{prefix}kind", "medusa")
        return Declared(
            **common,
            num_heads=get("num_nextn_predict_layers") if prefix else get("num_heads", 4),
            num_layers=get(f"{prefix}num_layers", 1),
            has_bias=get(f"{prefix}bias", True),
            is_tied=kind == "medusa_tied",
            num_tokens=get(f"{prefix}num_tokens"),
            own_projections=bool(get(f"{prefix}own_projections", False)),
            kind=kind,
            attention_heads=get("num_attention_heads", 1),
        )
    if format_ == "vllm_medusa":
        return Declared(
            **common,
            num_heads=_last_number(config, "heads", 5),
            num_layers=_last_number(config, "layers", 1),
            has_bias=bool(get("medusa_fc_bias", False)),
            is_tied=bool(get("original_lm_head", False)),
            num_tokens=get("truncated_vocab_size"),
        )
    return Declared(
        **common,
        num_heads=get("medusa_num_heads", get("num_medusa_heads")),
        num_layers=get("medusa_num_layers", get("num_medusa_layers")),
    )


def _last_number(config: dict[str, Any], what: str, default: int) -> int:
    # As vLLM reads it: any key with `num` and this word in it, and the last one holds.
    found = [value for key, value in config.items() if "num" in key and what in key]
    return found[-1] if found and _is_number(found[-1]) else default
