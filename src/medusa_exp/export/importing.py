"""Make our heads of other people's: FasterDecoding's, vLLM's, TGI's, MLC's, ModelOpt's formats.

They seldom say for which weights they were trained: their backbone's identity stays unknown, and
what they are worth on this one is measured (`measure_first_choices`).
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from medusa_exp.errors import UserError
from medusa_exp.export.faults import structural
from medusa_exp.export.reading import FORMATS, Reading, read_heads
from medusa_exp.identity import bfloat16_bytes
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import adopt_heads, check_same, own_heads, save_heads
from medusa_exp.model.heads import LOW_RANK, MedusaHeads, MedusaHeadsConfig, heads_input
from medusa_exp.model.scoring import answer_ranks

log = logging.getLogger(__name__)


def adopt(heads_from: str, out: Path, vocab_size: Callable[[], int]) -> None:
    """Put heads of any known format into a run directory, as ours.

    Args:
        heads_from: a run directory, its heads/, or a directory of another format.
        out: the run directory.
        vocab_size: asked where nothing in the directory tells it.

    Raises:
        UserError: there are none, they lack something, or the run directory has others already.
    """
    if own_heads(heads_from) or not Path(heads_from).expanduser().is_dir():
        adopt_heads(heads_from, out)
        return
    heads, target = import_heads(heads_from, vocab_size), out / "heads"
    if not target.exists():
        save_heads(heads, target)
        return
    with TemporaryDirectory() as scratch:
        save_heads(heads, Path(scratch) / "heads")
        check_same(heads_from, Path(scratch) / "heads", target)


def import_heads(named: str | Path, vocab_size: Callable[[], int]) -> MedusaHeads:
    """Return heads of any known format as ours, in float32; log where they come from.

    Raises:
        UserError: the directory holds none, or they lack something, or have what would be lost.
    """
    reading = read_heads(named)
    faults = [fault for fault in structural(reading) if fault.is_error]
    if faults:
        texts = "; ".join(fault.text for fault in faults[:4])
        raise UserError(f"the heads in {reading.place} cannot be imported: {texts}.")
    config = _config_of(reading, vocab_size)
    heads = MedusaHeads(config).float()
    try:
        heads.load_state_dict(_our_names(reading, config))
    except RuntimeError as error:  # of tensors that are too many, too few, or of another shape
        raise UserError(
            f"the heads in {reading.place} cannot be imported: their tensors are not those of "
            f"heads of kind {config.kind}. {' '.join(str(error).split())[:300]}"
        ) from error
    _say_origin(reading, config)
    return heads.eval()


def _say_origin(reading: Reading, config: MedusaHeadsConfig) -> None:
    log.info(
        "heads imported from %s (%s): %d heads of kind %s, trained for %s",
        reading.place,
        FORMATS[reading.format],
        config.num_heads,
        config.kind,
        config.backbone or "a model that is not named",
    )
    if (said := reading.declared.num_heads) not in (None, config.num_heads):
        log.warning("their config says %s heads: those that there are tensors of are taken", said)
    if not config.backbone_identity:
        log.warning(
            "nothing says for which weights they were trained: what they are worth on this "
            "backbone is measured before they are used"
        )


def _config_of(reading: Reading, vocab_size: Callable[[], int]) -> MedusaHeadsConfig:
    declared, first = reading.declared, reading.heads[0]
    kind = declared.kind or _kind_of(reading)
    size = reading.hidden_size or (first.out.shape[1] if first.out is not None else None)
    if size is None:
        raise UserError(f"{reading.place}: nothing says how wide the hidden states are.")
    blocks = [block for head in reading.heads for block in head.blocks.values()]
    blocks += [] if reading.root_block is None else [reading.root_block]
    return MedusaHeadsConfig(
        kind=kind,
        num_heads=len(reading.heads),
        num_layers=reading.num_layers,
        bias=any(block.bias is not None for block in blocks),
        rank=None if first.down is None else first.down.shape[0],
        num_tokens=None if reading.token_map is None else len(reading.token_map),
        own_projections=reading.is_recurrent and not reading.is_one_projection,
        prefix_attention=bool(reading.prefix),
        num_attention_heads=declared.attention_heads,
        hidden_size=size,
        vocab_size=_vocabulary_of(reading) or vocab_size(),
        lm_head_bias=bool(reading.config.get("medusa_lm_head_bias", first.out_bias is not None)),
        backbone=declared.backbone,
        backbone_identity=declared.backbone_identity,
        backbone_weights=declared.backbone_weights,
        lm_head_sha256="" if reading.shared is None else lm_head_sha256(reading.shared),
    )


def _kind_of(reading: Reading) -> str:
    if reading.heads[0].out is None:
        return "medusa_tied"
    return "medusa" if reading.token_map is None else "medusa_lowrank"


def _vocabulary_of(reading: Reading) -> int | None:
    first = reading.heads[0]
    if first.out is not None and reading.token_map is None:
        return len(first.out)
    if reading.shared is not None:
        return len(reading.shared)
    return reading.declared.vocab_size


def _our_names(reading: Reading, config: MedusaHeadsConfig) -> dict[str, Tensor]:
    """Return the tensors under the names that `MedusaHeads` has for them."""
    tensors: dict[str, Tensor | None] = {
        f"prefix.{part}.weight": tensor for part, tensor in reading.prefix.items()
    }
    up = "lm_heads.up" if config.kind in LOW_RANK else "lm_heads"
    for k, head in enumerate(reading.heads[:1] if reading.is_one_projection else reading.heads):
        for number, block in {} if reading.is_recurrent and k else head.blocks.items():
            name = f"blocks.{k}.{number}.{'linear' if block.outer is None else 'inner'}"
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = block.weight, block.bias
            tensors[f"blocks.{k}.{number}.skip.weight"] = block.skip
            tensors[f"blocks.{k}.{number}.out.weight"] = block.outer
        tensors[f"{up}.{k}.weight"], tensors[f"{up}.{k}.bias"] = head.out, head.out_bias
        tensors[f"lm_heads.down.{k}.weight"] = head.down
    if (root := reading.root_block) is not None:
        tensors |= {"root_block.inner.weight": root.weight, "root_block.inner.bias": root.bias}
        tensors |= {"root_block.out.weight": root.outer, "root_block.skip.weight": root.skip}
    found = {name: tensor.float() for name, tensor in tensors.items() if tensor is not None}
    if reading.token_map is not None:
        found["lm_heads.token_map"] = reading.token_map.long()
    return found


def lm_head_sha256(weight_VD: Tensor) -> str:
    """Name a matrix, in whatever dtype it is: heads that are tied to it came with it."""
    return hashlib.sha256(bfloat16_bytes(weight_VD.detach())).hexdigest()


def check_origin(heads: MedusaHeads, backbone: Backbone, place: Path) -> None:
    """Raise a UserError where imported heads came with another lm_head than the backbone's."""
    wanted = heads.config.lm_head_sha256
    if wanted and lm_head_sha256(backbone.lm_head.weight) != wanted:
        raise UserError(
            f"the heads in {place} are tied to an lm_head that came with them, and that of "
            f"{backbone.name} is another: load the model that they were trained for."
        )


@torch.no_grad()
def measure_first_choices(
    heads: MedusaHeads, backbone: Backbone, responses: Sequence[tuple[list[int], list[int]]]
) -> list[float]:
    """Return, for each head, how often its first choice is the backbone's own token.

    Args:
        heads: attached to the backbone.
        backbone: whose greedy responses these are.
        responses: the ids of prompt and response.
    """
    hits, count = torch.zeros(heads.num_heads), torch.zeros(heads.num_heads)
    for prompt, response in responses:
        ids_1T = torch.tensor([[*prompt, *response]], device=backbone.device)
        read_1TD = heads_input(heads.prefix, backbone.hidden_states(ids_1T))
        hidden_PD = read_1TD[0, len(prompt) - 1 : -1]
        tokens_P = ids_1T[0, len(prompt) :]
        ranks_PK = torch.from_numpy(answer_ranks(heads, tokens_P, hidden_PD, 1))
        for k in range(heads.num_heads):
            known_P = ranks_PK[: max(0, len(tokens_P) - k - 1), k]
            hits[k] += (known_P == 0).sum()
            count[k] += len(known_P)
    return (hits / count.clamp(min=1)).tolist()
