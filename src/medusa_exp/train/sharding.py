"""A frozen backbone of which each process keeps a part: `train.strategy=fsdp`.

Heads are small, and every process has them whole; the backbone is what takes memory. torch's
fully_shard keeps 1/n of each layer's weights in each of n processes, and gathers a layer for as
long as it runs. Embedding, final norm and lm_head, which are used outside of layers, stay whole.
While it is loaded, and answers held-out prompts, every process has the whole model.
"""

import logging

from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.record import annotate

log = logging.getLogger(__name__)


def shard_layers(backbone: Backbone) -> None:
    """Leave each process its part of every layer of a backbone that all of them have loaded.

    To be called by all processes, at the same point.

    Raises:
        UserError: the model has no list of its layers.
    """
    if not distributed.is_initialized():  # Lightning would do it later, and finds it done
        distributed.init_process_group("nccl" if backbone.device.type == "cuda" else "gloo")
    backbone.remember_identities()
    before = local_bytes(backbone)
    mesh = init_device_mesh(backbone.device.type, (distributed.get_world_size(),))
    for layer in layers_of(backbone):
        fully_shard(layer, mesh=mesh)
    kept = local_bytes(backbone)
    log.info("each process keeps %.1f MB of the backbone's %.1f MB", kept / 1e6, before / 1e6)
    annotate(backbone_bytes={"whole": before, "kept": kept})


def layers_of(backbone: Backbone) -> nn.ModuleList:
    """Return the backbone's decoder layers.

    Raises:
        UserError: it has no list of them.
    """
    for module in backbone.body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == backbone.num_layers:
            return module
    raise UserError(
        f"train.strategy=fsdp: {backbone.name} has no list of its {backbone.num_layers} layers: "
        "set train.strategy=ddp."
    )


def local_bytes(backbone: Backbone) -> int:
    """Return the bytes of the weights that this process keeps."""
    total = 0
    for parameter in backbone.model.parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        total += own.numel() * own.element_size()
    return total
