"""Write heads in the formats of engines: which family fits which, and under which names.

A writer returns the config and the tensors of a format; nothing is computed but where a format has
no place for what a family saves (`_materialized`). D hidden, V vocabulary, W head vocabulary, S
rank, K heads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medusa_exp.config.privacy import shareable_text
from medusa_exp.errors import UserError
from medusa_exp.export.reading import config_text
from medusa_exp.model.heads import FAMILIES, MedusaHeadsConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Heads to export, and what of their target a format may ask for."""

    config: MedusaHeadsConfig
    tensors: dict[str, Tensor]
    """As in heads/model.safetensors, in the dtype to store."""
    lm_head: nn.Module
    """The target's."""
    logit_scale: float
    """What the target multiplies the logits of its lm_head by."""
    target: str
    """Directory or hub name of the target."""
    target_config: Any
    """The target's config, of the text model."""

    @property
    def is_tied(self) -> bool:
        """Is the target's lm_head the heads'?"""
        return self.config.kind == "medusa_tied"

    def floats(self) -> list[Tensor]:
        """Return the tensors that are numbers, not ids."""
        return [tensor for tensor in self.tensors.values() if tensor.is_floating_point()]

    def blocks(self) -> Iterator[tuple[int, int, str, Tensor]]:
        """Yield head, block, weight or bias, and tensor."""
        for k in range(self.config.num_heads):
            for number in range(self.config.num_layers):
                for part in ("weight", "bias"):
                    tensor = self.tensors.get(f"blocks.{k}.{number}.linear.{part}")
                    if tensor is not None:
                        yield k, number, part, tensor

    def matrix(self, k: int) -> Tensor:
        """Return the matrix [V, D] of the head at index k, in the dtype of the heads."""
        if self.is_tied:
            return self.shared_matrix().to(self.floats()[0].dtype)
        if self.config.kind == "medusa_lowrank":
            return _materialized(self, k)
        return self.tensors[f"lm_heads.{k}.weight"]

    def shared_matrix(self) -> Tensor:
        """Return the target's matrix [V, D], in its own dtype: by that it is known again."""
        weight_VD = self.lm_head.weight.detach().cpu()
        return weight_VD if self.logit_scale == 1 else weight_VD * self.logit_scale


def _materialized(source: Source, k: int) -> Tensor:
    """Return the whole matrix of a low-rank head; tokens that it does not know have rows of zeros.

    Their logit is then 0, not minus infinity: they are drafted where all others are below 0.
    """
    up_WS = source.tensors[f"lm_heads.up.{k}.weight"]
    down_SD = source.tensors.get(f"lm_heads.down.{k}.weight")
    known_WD = up_WS if down_SD is None else (up_WS.float() @ down_SD.float()).to(up_WS.dtype)
    token_map = source.tensors.get("lm_heads.token_map")
    if token_map is None:
        return known_WD.contiguous()
    full_VD = known_WD.new_zeros(source.config.vocab_size, known_WD.shape[1])
    full_VD[token_map] = known_WD
    return full_VD


Written = tuple[dict[str, Any], dict[str, Tensor]]
"""Config and tensors."""


def _vllm(source: Source) -> Written:
    """Return the heads as they are, with the config by which vLLM takes them for MTP layers.

    vLLM chooses how to draft by `model_type` and what to load by `architectures`. Heads of hydra
    hand on two tensors, which its runner expects where the second name stands.
    """
    heads, target = source.config, source.target_config
    own = (
        *("kind", "num_layers", "bias", "rank", "num_tokens", "own_projections", "lm_head_bias"),
        "prefix_attention",
    )
    family = FAMILIES[heads.kind]
    second = ["DeepSeekMTPModel"] if family.is_sequential and not family.is_recurrent else []
    config = {
        "model_type": "step3p5_mtp",
        "architectures": ["MedusaExpMTP", *second],
        "num_nextn_predict_layers": heads.num_heads,
        "n_predict": heads.num_heads,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads.num_attention_heads,
        "num_key_value_heads": heads.num_attention_heads,
        # The engine takes the shorter of this and the target's for the longest request.
        "max_position_embeddings": getattr(target, "max_position_embeddings", None) or 2**20,
        **{f"medusa_{key}": getattr(heads, key) for key in own},
    }
    return config, dict(source.tensors)


def _vllm_medusa(source: Source) -> Written:
    """Return vLLM's own format; without `medusa_fc_bias` it would pass over biases silently."""
    heads = source.config
    # No further key may have `num` and `heads` or `layers` in it: vLLM takes the last for these.
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "num_heads": heads.num_heads,
        "num_hidden_layers": heads.num_layers,
        "medusa_fc_bias": heads.bias,
    }
    tensors = {f"blocks.{k}.layers.{n}.{part}": tensor for k, n, part, tensor in source.blocks()}
    if source.is_tied:
        config["original_lm_head"] = True
        tensors["lm_head.weight"] = source.shared_matrix()
    else:
        tensors |= {f"lm_heads.{k}.weight": source.matrix(k) for k in range(heads.num_heads)}
    return config, tensors


def _numbered(source: Source, prefix: str, with_matrix: bool) -> dict[str, Tensor]:
    """Return `{k}.{block}.linear.*` and `{k}.{last}.weight`, with biases: their readers ask."""
    heads, tensors = source.config, {}
    for k, number, part, tensor in source.blocks():
        tensors[f"{prefix}{k}.{number}.linear.{part}"] = tensor
        if not heads.bias:
            zeros = tensor.new_zeros(heads.hidden_size)
            tensors[f"{prefix}{k}.{number}.linear.bias"] = zeros
    for k in range(heads.num_heads if with_matrix else 0):
        tensors[f"{prefix}{k}.{heads.num_layers}.weight"] = source.matrix(k)
    return tensors


def _counted(source: Source) -> dict[str, Any]:
    heads = source.config
    return {
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "base_model_name_or_path": source.target,
    }


def _tgi(source: Source) -> Written:
    """Return FasterDecoding's format; TGI takes heads of one block without a matrix for tied ones.

    With `architectures` in its config, TGI would look for another kind of speculator.
    """
    is_short = source.is_tied and source.config.num_layers == 1
    return _counted(source), _numbered(source, "", not is_short)


def _mlc(source: Source) -> Written:
    config = {"model_type": "medusa", **_counted(source)}
    return config, _numbered(source, "medusa_head.", with_matrix=True)


@dataclass(frozen=True)
class Format:
    """How heads leave for an engine."""

    write: Callable[[Source], Written]
    weights: str
    """Name of the file of tensors."""
    reads_all: bool
    """Does its reader know every family?"""


FORMATS = {
    "vllm": Format(_vllm, "model.safetensors", reads_all=True),
    "vllm_medusa": Format(_vllm_medusa, "model.safetensors", reads_all=False),
    "tgi": Format(_tgi, "medusa_lm_head.safetensors", reads_all=False),
    "mlc": Format(_mlc, "model.safetensors", reads_all=False),
}
"""The formats that are tensors and a config, by `export.format`."""
WHOLE_MODEL = "hf_generate"
"""The `export.format` that takes heads as they are, of every family."""


def why_not(config: MedusaHeadsConfig, format_: str) -> str | None:
    """Return why these heads cannot be held by a format; None where they can."""
    if format_ == WHOLE_MODEL or FORMATS[format_].reads_all:
        return None
    if FAMILIES[config.kind].is_recurrent:
        return "it has a block for each head, and the heads of this kind share one"
    if FAMILIES[config.kind].is_sequential:
        return "its heads run side by side and see no drafted tokens, which these do"
    if FAMILIES[config.kind].sees_root:
        return "its heads read the hidden state alone, and these see the token that it gave, too"
    if config.prefix_attention:
        return "it has no place for the prefix attention"
    if config.lm_head_bias:
        return "its vocabulary projections have no bias, and the target's lm_head has one"
    return None


def check_holds(format_: str, config: MedusaHeadsConfig, what: str) -> None:
    """Raise a UserError where a format cannot hold heads; it says why, and what to do.

    Args:
        format_: as in `export.format`.
        config: of the heads.
        what: the heads, in words.
    """
    if (reason := why_not(config, format_)) is None:
        return
    without = {"prefix_attention": False, "lm_head_bias": config.lm_head_bias}
    kinds = [k for k in FAMILIES if why_not(MedusaHeadsConfig(kind=k, **without), format_) is None]
    possible = [name for name in (*FORMATS, WHOLE_MODEL) if why_not(config, name) is None]
    remedy = f"Take export.format={_either(possible)}"
    if kinds:  # none can do without the bias that the target's lm_head has
        changes = [] if config.kind in kinds else [f"head={_either(kinds)}"]
        changes += ["head.prefix_attention=false"] if config.prefix_attention else []
        remedy += f", or train with {' and '.join(changes)}"
    raise UserError(f"export.format={format_} cannot hold {what}: {reason}. {remedy}.")


def _either(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def table() -> list[tuple[str, str, str]]:
    """Return family, format, and `yes` or why not: what docs/guide/serving.md shows."""
    cases = {kind: MedusaHeadsConfig(kind=kind) for kind in FAMILIES}
    cases["any, with prefix attention"] = MedusaHeadsConfig(prefix_attention=True)
    cases["any, lm_head with a bias"] = MedusaHeadsConfig(lm_head_bias=True)
    return [
        (case, format_, why_not(config, format_) or "yes")
        for case, config in cases.items()
        for format_ in FORMATS
    ]


def write(source: Source, format_: str, place: Path) -> None:
    """Write config and tensors of a format into a directory.

    Raises:
        UserError: the format cannot hold these heads; says why.
    """
    check_holds(format_, source.config, f"heads of kind {source.config.kind}")
    config, tensors = FORMATS[format_].write(source)
    config["medusa_backbone"] = shareable_text(source.config.backbone)
    config["medusa_backbone_identity"] = source.config.backbone_identity
    config["medusa_backbone_weights"] = source.config.backbone_weights
    place.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(_unshared(whole), place / FORMATS[format_].weights, metadata={"format": "pt"})
    (place / "config.json").write_text(config_text(config), encoding="utf-8")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, those that stand for several names copied: the file has no aliases."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found
