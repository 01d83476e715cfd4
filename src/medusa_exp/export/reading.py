"""What a directory of Medusa heads says, in whatever format: read from the format's description.

Nothing of what writes these formats is used here, so that a read-back proves something. Names of
tensors tell the format; the config tells what an engine will expect of them.

B batch, T time, D hidden, V vocabulary, W head vocabulary, S rank, K heads, R rows, J draft tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from medusa_exp.errors import UserError
from medusa_exp.export.declared import Declared, Fault, declared_by, is_text, well_typed
from medusa_exp.runs.files import read_json

_MOST_HEADS = 64
"""More than any config means, of heads that are all the same tensors."""
PICKLES = (".pt", ".pth", ".bin", ".pkl")
CONVERT = "python -m medusa_exp.model.convert"


def _numbered(prefix: str) -> dict[str, str]:
    """Return the names of a format in which head k is a list of blocks and a last matrix."""
    return {
        "block": prefix + r"(?P<k>\d+)\.(?P<l>\d+)\.linear\.(?P<part>weight|bias)",
        "out": prefix + r"(?P<k>\d+)\.(?P<l>\d+)\.(?P<part>weight)",
        "shared": r"lm_head\.weight",
    }


_OURS = {
    "block": r"blocks\.(?P<k>\d+)\.(?P<l>\d+)\.linear\.(?P<part>weight|bias)",
    "skip": r"blocks\.(?P<k>\d+)\.(?P<l>\d+)\.skip\.weight",
    "inner": r"blocks\.(?P<k>\d+)\.(?P<l>\d+)\.inner\.(?P<part>weight|bias)",
    "outer": r"blocks\.(?P<k>\d+)\.(?P<l>\d+)\.out\.weight",
    "out": r"lm_heads\.(?:up\.)?(?P<k>\d+)\.(?P<part>weight|bias)",
    "down": r"lm_heads\.down\.(?P<k>\d+)\.weight",
    "token_map": r"lm_heads\.token_map",
    "root_inner": r"root_block\.inner\.(?P<part>weight|bias)",
    "root_outer": r"root_block\.out\.weight",
    "root_skip": r"root_block\.skip\.weight",
    "prefix": r"prefix\.(?P<part>norm|q|k|v|out)\.weight",
}
_LAYOUTS = {
    "medusa_exp": _OURS,
    "vllm": _OURS,
    "vllm_medusa": {
        "block": r"blocks\.(?P<k>\d+)\.layers\.(?P<l>\d+)\.(?P<part>weight|bias)",
        "out": r"lm_heads\.(?P<k>\d+)\.(?P<part>weight)",
        "shared": r"lm_head\.weight",
        "token_map": r"token_map",
    },
    "tgi": _numbered(""),
    "mlc": _numbered(r"medusa_head\."),
    "modelopt": _numbered(r"medusa_heads\."),
}
"""Format -> what a tensor is -> its name. Head and block are numbered from 0."""
FORMATS = {
    "medusa_exp": "heads of this project",
    "vllm": "this project's heads for its vLLM plugin",
    "vllm_medusa": "vLLM's own format (up to 0.32)",
    "tgi": "FasterDecoding's format, which TGI reads",
    "mlc": "MLC-LLM's format",
    "modelopt": "ModelOpt's format",
}


class NoHeadsError(UserError):
    """A directory holds nothing that can be read as heads; `fault` is the name of why."""

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass
class Block:
    """x + SiLU(Wx + b); with `skip`, x + Ve + SiLU(W[x, e] + b).

    With `outer` too, x + U(SiLU(g) * u) + V n(e), where g and u are the halves of W[n(x), n(e)] + b
    and n divides by the root of the mean square: one step of heads that share their blocks.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    skip: Tensor | None = None
    outer: Tensor | None = None


@dataclass
class Head:
    """One head: blocks, and a matrix [V or W, D], or its factors [W, S] and [S, D]."""

    blocks: dict[int, Block] = field(default_factory=dict)
    out: Tensor | None = None
    out_bias: Tensor | None = None
    down: Tensor | None = None


@dataclass
class Reading:
    """Heads as they stand in files."""

    place: Path
    format: str
    config: dict[str, Any]
    declared: Declared
    faults: list[Fault]
    heads: list[Head] = field(default_factory=list)
    shared: Tensor | None = None
    token_map: Tensor | None = None
    prefix: dict[str, Tensor] = field(default_factory=dict)
    root_block: Block | None = None
    """What makes of hidden state and next token the state that all heads read."""

    @property
    def num_layers(self) -> int:
        """Blocks of the head that has most."""
        return max((len(head.blocks) for head in self.heads), default=0)

    @property
    def is_recurrent(self) -> bool:
        """Do all heads share their blocks, and is each a step more?"""
        return self.declared.kind == "recurrent"

    @property
    def is_one_projection(self) -> bool:
        """Do recurrent heads share their projection, too?"""
        if len(self.heads) == 1:  # of which both are true
            return self.is_recurrent and not self.declared.own_projections
        return self.is_recurrent and all(head.out is self.heads[0].out for head in self.heads)

    @property
    def hidden_size(self) -> int | None:
        """D, of the tensors where they tell it."""
        for head in self.heads:
            for block in head.blocks.values():
                if block.outer is not None:
                    return int(block.outer.shape[0])
                if block.weight is not None:
                    return int(block.weight.shape[0])
        return self.declared.hidden_size

    def prefixed(self, hidden_BTD: Tensor) -> Tensor:
        """Return what heads read in place of states of whole rows, by the prefix attention."""
        if not self.prefix:
            return hidden_BTD
        weight = {name: tensor.float() for name, tensor in self.prefix.items()}
        size, heads = hidden_BTD.shape[-1], self.declared.attention_heads
        normed_BTD = rms_norm(hidden_BTD, (size,), weight["norm"], 1e-6)
        q, k, v = (
            linear(normed_BTD, weight[name]).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        half = size // heads // 2
        frequency_E = 10_000.0 ** -(torch.arange(half) / half)
        angle_TE = (torch.arange(hidden_BTD.shape[1])[:, None].float() * frequency_E).repeat(1, 2)

        def turned(x: Tensor) -> Tensor:
            first, second = x[..., :half], x[..., half:]
            return x * angle_TE.cos() + torch.cat([-second, first], -1) * angle_TE.sin()

        mask_TT = torch.ones(hidden_BTD.shape[1], hidden_BTD.shape[1], dtype=torch.bool).tril()
        found = scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=mask_TT)
        return hidden_BTD + linear(found.transpose(1, 2).flatten(2), weight["out"])

    def logits(
        self,
        k: int,
        hidden_RD: Tensor,
        embedded_RJD: Tensor | None = None,
        lm_head: nn.Module | None = None,
        logit_scale: float = 1.0,
    ) -> Tensor:
        """Return logits_RV of the head at index k, minus infinity for tokens it does not know.

        Args:
            k: which head.
            hidden_RD: in float32, after `prefixed`.
            embedded_RJD: of the k+1 tokens that follow, for heads that see them, or the first.
            lm_head: the target's, for heads that have no matrix of their own, on disk or off.
            logit_scale: what the target multiplies the logits of its lm_head by.
        """
        head, x_RD = self.heads[k], hidden_RD
        if self.root_block is not None:
            x_RD = _through(self.root_block, x_RD, embedded_RJD)
        if self.is_recurrent:
            assert embedded_RJD is not None, "these heads see the tokens drafted before them"
            for j in range(k + 1):
                for _, block in sorted(head.blocks.items()):
                    x_RD = _through(block, x_RD, embedded_RJD[:, j : j + 1])
        else:
            for _, block in sorted(head.blocks.items()):
                x_RD = _through(block, x_RD, embedded_RJD)
        if head.out is None:
            return self._of_known(self._by_shared(x_RD, lm_head, logit_scale))
        if head.down is not None:
            x_RD = linear(x_RD, head.down.float())
        bias = None if head.out_bias is None else head.out_bias.float()
        logits_RW = linear(x_RD, head.out.float(), bias)
        if self.token_map is None:
            return logits_RW
        assert self.declared.vocab_size is not None
        full_RV = logits_RW.new_full((len(logits_RW), self.declared.vocab_size), -torch.inf)
        full_RV[:, self.token_map] = logits_RW
        return full_RV

    def _of_known(self, logits_RV: Tensor) -> Tensor:
        if self.token_map is None:
            return logits_RV
        is_known_V = torch.zeros(logits_RV.shape[1], dtype=torch.bool)
        is_known_V[self.token_map] = True
        return logits_RV.masked_fill(~is_known_V, -torch.inf)

    def _by_shared(self, x_RD: Tensor, lm_head: nn.Module | None, logit_scale: float) -> Tensor:
        if self.shared is not None:
            return linear(x_RD.to(self.shared.dtype), self.shared)
        assert lm_head is not None, "these heads share the target's lm_head"
        bias = getattr(lm_head, "bias", None)
        logits_RV = linear(x_RD.to(lm_head.weight.dtype), lm_head.weight.detach(), bias)
        return logits_RV if logit_scale == 1 else logits_RV * logit_scale

    def head_sha256(self, k: int, *, is_transposed: bool = False) -> str:
        """Name the head at index k by its tensors, or by what they are with blocks transposed.

        A bias of zeros is as good as none, and counts as none.
        """
        head, digest = self.heads[k], hashlib.sha256()
        blocks: list[tuple[object, Block]] = [*sorted(head.blocks.items())]
        if self.root_block is not None:
            blocks.append(("root", self.root_block))
        for number, block in blocks:
            for part in ("weight", "bias", "skip", "outer"):
                tensor = getattr(block, part)
                if tensor is None or (part == "bias" and not tensor.any()):
                    continue
                is_turned = is_transposed and part == "weight" and number != "root"
                turned = tensor.T if is_turned else tensor
                _add(digest, f"{number}.{part}", turned)
        for part in ("out", "out_bias", "down"):
            if (tensor := getattr(head, part)) is not None:
                _add(digest, part, tensor)
        return digest.hexdigest()


def _through(block: Block, x_RD: Tensor, embedded_RJD: Tensor | None) -> Tensor:
    assert block.weight is not None
    bias = None if block.bias is None else block.bias.float()
    if block.skip is None:
        return x_RD + silu(linear(x_RD, block.weight.float(), bias))
    assert embedded_RJD is not None, "these heads see the tokens drafted before them"
    if block.outer is not None:
        x, e = (rms_norm(y, y.shape[-1:], eps=1e-6) for y in (x_RD, embedded_RJD[:, 0].float()))
        gate, up = linear(torch.cat([x, e], -1), block.weight.float(), bias).chunk(2, -1)
        return x_RD + linear(silu(gate) * up, block.outer.float()) + linear(e, block.skip.float())
    width = block.skip.shape[1] // x_RD.shape[1]
    e_RI = embedded_RJD[:, :width].flatten(1).float()
    inner_RD = linear(torch.cat([x_RD, e_RI], -1), block.weight.float(), bias)
    return x_RD + linear(e_RI, block.skip.float()) + silu(inner_RD)


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)


def find_place(named: str | Path) -> Path:
    """Return where the heads of a directory are: in it, or in its heads/.

    Raises:
        UserError: there is no such directory.
    """
    path = Path(named).expanduser()
    if not path.is_dir():
        raise UserError(f"{named} is no directory of heads.")
    for place in (path / "heads", path):
        if (place / "config.json").is_file():
            return place
    return path


def read_heads(named: str | Path) -> Reading:
    """Read a directory of heads in any format; what is wrong with it stands in `faults`.

    Raises:
        NoHeadsError: nothing in it can be read as heads; says why.
    """
    place = find_place(named)
    config = read_json(place / "config.json", {})
    if not isinstance(config, dict):
        raise UserError(f"{place / 'config.json'} is no JSON object.")
    names, faults = _names_of(place)
    format_ = _format_of(config, names)
    if format_ is None:
        some = ", ".join(sorted(names)[:3])
        text = f"{place} holds no Medusa heads that are known here: it has {some}, ..."
        raise NoHeadsError(text, "no heads")
    config, of_config = well_typed(config)
    declared = declared_by(format_, config)
    reading = Reading(place, format_, config, declared, [*faults, *of_config])
    _fill(reading, names)
    return reading


def _names_of(place: Path) -> tuple[dict[str, Path], list[Fault]]:
    """Return the file of each tensor, and what is wrong with the files.

    Raises:
        NoHeadsError: there are none that can be read.
    """
    faults = []
    pickles = sorted(path.name for path in place.iterdir() if path.suffix in PICKLES)
    files = sorted(place.glob("*.safetensors"))
    if strange := [path for path in files if not path.is_file()]:  # to open a pipe would hang
        text = f"{strange[0]} is no file, or a link to nothing: copy it again."
        raise NoHeadsError(text, "shards missing")
    if pickles and not files:
        raise NoHeadsError(
            f"{place / pickles[0]} is a pickle, which can run code when it is loaded. Convert it, "
            f"which loads tensors alone: {CONVERT} {place / pickles[0]}",
            "pickle",
        )
    if pickles:
        text = f"{', '.join(pickles)}: pickles, which can run code where they are loaded: delete"
        faults.append(Fault("pickle", text))
    expected = _shards(place, files)
    if missing := sorted(expected - {path.name for path in files}):
        faults.append(Fault("shards missing", f"there is no {', '.join(missing)}"))
    if not files:
        raise NoHeadsError(f"{place} holds no .safetensors file: no heads are in it.", "no heads")
    names: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as opened:
                found = dict.fromkeys(opened.keys(), path)
        except (SafetensorError, OSError) as error:
            text = f"{path} cannot be read ({error}): copy it again."
            raise NoHeadsError(text, "shards missing") from error
        if twice := sorted(names.keys() & found):
            text = f"{twice[0]} stands in {names[twice[0]].name} and in {path.name}: delete one"
            faults.append(Fault("tensors twice", text))
        names |= found
    return names, faults


def _shards(place: Path, files: list[Path]) -> set[str]:
    """Return the names of the files that an index, or the numbers in other names, ask for."""
    expected: set[str] = set()
    for index in place.glob("*.safetensors.index.json"):
        content = read_json(index, {})
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(map(is_text, weight_map.values())):
            raise NoHeadsError(f"{index} has no weight_map: copy it again.", "shards missing")
        expected.update(weight_map.values())
    for path in files:
        if found := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", path.name):
            stem, _, count = found.groups()
            numbers = range(1, int(count) + 1)
            expected |= {f"{stem}-{number:05d}-of-{count}.safetensors" for number in numbers}
    return expected


def _format_of(config: dict[str, Any], names: dict[str, Path]) -> str | None:
    if config.get("model_type") == "step3p5_mtp":
        return "vllm"
    if "kind" in config and config.get("model_type") == "medusa":
        return "medusa_exp"
    counts = {
        name: sum(1 for tensor in names if _role(layout, tensor) not in (None, "shared"))
        for name, layout in _LAYOUTS.items()
        if name != "vllm"
    }
    # Names of heads without blocks are alike in two formats: then it is vLLM's, as ours has `kind`.
    best = max(counts, key=lambda name: (counts[name], name == "vllm_medusa"))
    return best if counts[best] else None


def _role(layout: dict[str, str], tensor: str) -> str | None:
    return next((role for role, name in layout.items() if re.fullmatch(name, tensor)), None)


def _fill(reading: Reading, names: dict[str, Path]) -> None:
    """Put tensors where they belong; what belongs nowhere is a fault."""
    layout = _LAYOUTS[reading.format]
    by_head: dict[int, Head] = {}
    late: list[tuple[str, dict[str, str], Tensor]] = []
    stray = []
    for name, role, found, tensor in _tensors(layout, names):
        # There are no more heads than tensors: a larger number is no head's.
        if role is None or int(found.get("k", 0)) >= len(names):
            stray.append(name)
            continue
        dims = 1 if role == "token_map" or found.get("part") in ("bias", "norm") else 2
        if tensor.dim() != dims or not tensor.numel():
            text = f"{name} has the shape {tuple(tensor.shape)}, and should have {dims} dimensions"
            reading.faults.append(Fault("wrong shape", text))
            continue
        head = by_head.setdefault(int(found["k"]), Head()) if "k" in found else Head()
        if role == "out":
            late.append((name, found, tensor))
        else:
            _put(reading, head, role, found, tensor)
    num_layers = max((max(head.blocks, default=-1) for head in by_head.values()), default=-1) + 1
    for name, found, tensor in late:
        if int(found.get("l", num_layers)) != num_layers:
            stray.append(name)  # the matrix stands behind the last block
        else:
            part = "out_bias" if found["part"] == "bias" else "out"
            setattr(by_head[int(found["k"])], part, tensor)
    reading.heads = [by_head.get(k, Head()) for k in range(max(by_head, default=-1) + 1)]
    if reading.is_recurrent and reading.heads:
        stray += _share_blocks(reading)
    if stray:
        some = ", ".join(sorted(stray)[:4])
        is_model = len(stray) > len(names) / 2  # a whole model with heads in it, as of Medusa-2
        text = f"{len(stray)} tensors are no part of this format, and are passed over: {some}"
        reading.faults.append(Fault("stray tensors", text, is_error=not is_model))


def _put(reading: Reading, head: Head, role: str, found: dict[str, str], tensor: Tensor) -> None:
    """Put a tensor where its role says; `found` are the parts of its name."""
    if role in ("block", "inner"):
        setattr(head.blocks.setdefault(int(found["l"]), Block()), found["part"], tensor)
    elif role in ("skip", "outer"):
        setattr(head.blocks.setdefault(int(found["l"]), Block()), role, tensor)
    elif role == "down":
        head.down = tensor
    elif role.startswith("root_"):
        reading.root_block = reading.root_block or Block()
        part = role.removeprefix("root_")
        setattr(reading.root_block, found["part"] if part == "inner" else part, tensor)
    elif role == "prefix":
        reading.prefix[found["part"]] = tensor
    else:
        setattr(reading, role, tensor)


def _share_blocks(reading: Reading) -> list[str]:
    """Make of recurrent heads what all of them are; return the tensors that none has a place for.

    Projections that are lost are not made up from others.
    """
    first, *others = reading.heads
    number = min(reading.declared.num_heads or 1, _MOST_HEADS)
    if not others and not reading.declared.own_projections:
        reading.heads = [first] * number
        return []
    stray = [f"blocks.{k}.{layer}" for k, head in enumerate(others, 1) for layer in head.blocks]
    reading.heads += [Head() for _ in range(number - len(reading.heads))]
    for head in reading.heads[1:]:
        head.blocks = first.blocks
    return stray


def _tensors(
    layout: dict[str, str], names: dict[str, Path]
) -> Iterator[tuple[str, str | None, dict[str, str], Tensor]]:
    """Yield name, role, parts of the name, and tensor; what has no role is not read."""
    for path in sorted(set(names.values())):
        with safe_open(path, "pt") as opened:
            for name in (name for name, file in names.items() if file == path):
                role = _role(layout, name)
                if role is None:
                    yield name, None, {}, torch.empty(0)
                    continue
                match = re.fullmatch(layout[role], name)
                assert match is not None
                yield name, role, match.groupdict(), opened.get_tensor(name)


def config_text(config: dict[str, Any]) -> str:
    """Return a config as its file has it."""
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
