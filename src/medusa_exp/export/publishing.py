"""Let an export out only if its files, read back independently, are our heads: bit for bit.

R rows, T positions, D hidden, V vocabulary, K heads.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from medusa_exp.config import ExportConfig
from medusa_exp.errors import UserError
from medusa_exp.export import hf_generate
from medusa_exp.export.formats import DTYPES, FORMATS, Source, write
from medusa_exp.export.reading import Reading, config_text, read_heads
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import WEIGHTS, load_heads
from medusa_exp.model.heads import MedusaHeads, MedusaHeadsConfig
from medusa_exp.runs.files import publish, read_json

_ROWS, _POSITIONS = 16, 5
_ROUNDING = 1e-5
"""Relative error of a product of two factors that a format makes one matrix, in float32."""


def place_of(settings: ExportConfig, out: Path) -> Path:
    """Return the directory that an export of the run directory `out` is written to.

    Raises:
        UserError: it is not an export's: what is there would be replaced.
    """
    named = settings.out
    place = Path(named).expanduser() if named else out / "export" / settings.format
    if place.is_symlink() or any(parent.is_file() for parent in place.parents):
        raise UserError(f"export.out={place} is a link, or lies in a file: name a new directory.")
    config = read_json(place / "config.json")
    is_export = isinstance(config, dict) and "medusa_heads_sha256" in config
    is_export |= hf_generate.is_whole_model(place)
    if place.resolve() == out.resolve() or (place.exists() and not is_export):
        if place.is_dir() and not any(place.iterdir()):
            return place
        raise UserError(
            f"export.out={place} is there already, and holds no export: name a new directory."
        )
    return place


def open_source(
    heads: Path, backbone: Backbone, target: str, dtype: str = "auto"
) -> tuple[Source, MedusaHeads]:
    """Return heads to export, and the same as modules: in the dtype to store, but held in float32.

    Args:
        heads: directory of heads/.
        backbone: theirs, or its ends, on the CPU.
        target: directory or hub name by which an engine loads it.
        dtype: of the stored tensors: auto (as they are) or a name of `DTYPES`.
    """
    loaded = load_heads(heads)
    tensors = load_file(heads / WEIGHTS)
    if dtype != "auto":
        tensors = {
            name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    loaded.load_state_dict(tensors)
    if loaded.config.kind == "medusa_tied" and loaded.config.num_tokens:
        loaded, tensors = _over_whole_vocabulary(loaded, tensors)
    target_config = backbone.model.config.get_text_config()
    source = Source(
        loaded.config, tensors, backbone.lm_head, backbone.logit_scale, target, target_config
    )
    return source, loaded.float().attach(backbone).eval()


def _over_whole_vocabulary(
    heads: MedusaHeads, tensors: dict[str, Tensor]
) -> tuple[MedusaHeads, dict[str, Tensor]]:
    """Return tied heads without their head vocabulary: an engine has the whole lm_head for them.

    What they draft is a token of theirs, or one that is likelier still.
    """
    config = MedusaHeadsConfig.from_dict({**heads.config.to_dict(), "num_tokens": None})
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("token_map")}
    whole = MedusaHeads(config)
    whole.load_state_dict(tensors)
    return whole, tensors


def export(
    source: Source,
    ours: MedusaHeads,
    backbone: Backbone,
    format_: str,
    out: Path,
    *,
    add: Callable[[Path], None] = lambda place: None,
) -> Reading:
    """Write heads in a format, read them back, compare, and publish.

    Args:
        source: as of `open_source`.
        ours: likewise.
        backbone: the target, or its ends.
        format_: a name of `formats.FORMATS`.
        out: the directory to make; an old one there is replaced.
        add: writes what stands beside the heads into the directory that is about to be published.

    Raises:
        UserError: the format cannot hold these heads, or the read-back is not the same heads.
    """
    with publish(out) as partial:
        write(source, format_, partial)
        reading = read_back(partial, ours, backbone, _tolerance(source, format_))
        add(partial)
    reading.place = out
    return reading


def read_back(place: Path, ours: MedusaHeads, backbone: Backbone, tolerance: float = 0) -> Reading:
    """Read what was written, compare it with our heads, and note there by what each is known.

    Raises:
        UserError: it is not the same heads.
    """
    reading = read_heads(place)
    compare(reading, ours, backbone, tolerance)
    note_fingerprints(reading)
    return reading


def _tolerance(source: Source, format_: str) -> float:
    """Return 0, or the relative error where a format makes one large matrix of what is saved.

    Or where the matrix of tied heads is stored in their dtype, which is not the target's.
    """
    shared = source.lm_head.weight.dtype
    is_scaled = source.is_tied and source.logit_scale != 1
    is_cast = source.is_tied and any(tensor.dtype != shared for tensor in source.floats())
    is_product = source.config.kind == "medusa_lowrank" or is_scaled
    if not (is_product or is_cast) or FORMATS[format_].reads_all:
        return 0.0
    dtypes = {tensor.dtype for tensor in source.floats()} | ({shared} if is_cast else set())
    return max(_ROUNDING, *(torch.finfo(dtype).eps for dtype in dtypes))


def note_fingerprints(reading: Reading) -> None:
    """Write into the config by which digest each head is known: a swap is then seen."""
    path = reading.place / "config.json"
    digests = [reading.head_sha256(k) for k in range(len(reading.heads))]
    config = {**json.loads(path.read_text("utf-8")), "medusa_heads_sha256": digests}
    path.write_text(config_text(config), encoding="utf-8")


@torch.no_grad()
def compare(reading: Reading, ours: MedusaHeads, backbone: Backbone, tolerance: float = 0) -> None:
    """Hold a reading's logits against ours, on random states.

    Tokens that ours never propose may have the logit 0 instead of minus infinity.

    Raises:
        UserError: something in it is missing or too much, or logits differ; says which and where.
    """
    if reading.faults:
        texts = "; ".join(fault.text for fault in reading.faults)
        raise UserError(f"the export does not read back: {texts}. Nothing was published.")
    if len(reading.heads) != ours.num_heads:
        raise UserError(
            f"the export reads back as {len(reading.heads)} heads of {ours.num_heads}: nothing was "
            "published."
        )
    states_RTD, drafted_RK = random_inputs(ours)
    embedding = backbone.model.get_input_embeddings()
    read_RD = reading.prefixed(states_RTD)[:, -1]
    own_RD = (states_RTD if ours.prefix is None else ours.prefix(states_RTD))[:, -1]
    for k in range(ours.num_heads):
        wanted_RV = ours.over_vocabulary(ours.head_logits(k, own_RD, drafted_RK))
        embedded_RJD = embedding(drafted_RK[:, : k + 1]) if ours.sees_tokens else None
        found_RV = reading.logits(k, read_RD, embedded_RJD, backbone.lm_head, backbone.logit_scale)
        if not _are_same(found_RV, wanted_RV, tolerance):
            raise UserError(
                f"the export does not read back: logits of head {k + 1} differ from ours by up to "
                f"{_difference(found_RV, wanted_RV):.3g}. Nothing was published."
            )


def random_inputs(heads: MedusaHeads) -> tuple[Tensor, Tensor]:
    """Return random states_RTD and tokens_RK: always the same ones."""
    config, generator = heads.config, torch.Generator().manual_seed(0)
    shape = (_ROWS, _POSITIONS, config.hidden_size)
    states_RTD = torch.randn(shape, generator=generator)
    drafted_RK = torch.randint(config.vocab_size, (_ROWS, config.num_heads), generator=generator)
    return states_RTD, drafted_RK


def _are_same(found_RV: Tensor, wanted_RV: Tensor, tolerance: float) -> bool:
    if found_RV.shape != wanted_RV.shape:
        return False
    is_known_RV = wanted_RV.isfinite()
    unknown = found_RV[~is_known_RV]
    if not ((unknown == 0) | unknown.isneginf()).all():
        return False
    found, wanted = found_RV[is_known_RV].float(), wanted_RV[is_known_RV].float()
    if not tolerance:
        return torch.equal(found, wanted)
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def _difference(found_RV: Tensor, wanted_RV: Tensor) -> float:
    if found_RV.shape != wanted_RV.shape:
        return float("inf")
    return float((found_RV - wanted_RV).nan_to_num(0.0).abs().max())
