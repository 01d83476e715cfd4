"""Which model this is: hashes of weights, the same in whatever dtype they are loaded."""

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from medusa_exp.model.backbone import Backbone

_SAMPLE = 4096
"""Values of a parameter that `weights_identity_of` reads, about."""


def identity_of(backbone: "Backbone") -> str:
    """Return a sha256 over dimensions, final norm and lm_head: what heads are trained for.

    Weights count as bfloat16.
    """
    config = backbone.model.config.get_text_config()
    shape = [
        config.model_type,
        backbone.hidden_size,
        backbone.vocab_size,
        config.num_hidden_layers,
    ]
    shape += [getattr(backbone.model.config, "medusa_adapter", None)] * backbone.is_adapted
    digest = hashlib.sha256(json.dumps(shape).encode())
    # What is neither a list of layers nor an embedding: the final norm, and projections.
    final = [module for module in backbone.body.children() if _is_final(module)]
    for module in [*final, backbone.lm_head]:
        for name, parameter in sorted(module.named_parameters()):
            digest.update(name.encode() + _bytes(parameter.detach()))
    return digest.hexdigest()


def weights_identity_of(backbone: "Backbone") -> str:
    """Return a sha256 over a sample of every parameter: what the model's answers depend on.

    A sample, since reading all of a large model takes minutes, and training or merging leaves no
    tensor's values as they were. In bfloat16, as `identity_of`.
    """
    digest = hashlib.sha256(backbone.identity().encode())
    for name, parameter in sorted(backbone.model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = _bytes(flat[:: max(1, len(flat) // _SAMPLE)])
        digest.update(f"{name} {list(parameter.shape)}".encode() + sample)
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _is_final(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.Embedding)
