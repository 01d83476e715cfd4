"""Llamas of random weights in the shapes of 7B and 8B models, and heads with known hit rates.

What such a model says is known: after token v comes v + 1. Its layers add next to nothing to the
embedding, and its lm_head is that embedding, one token further. Every product is computed as
always; only the numbers are tame. So heads can be made that are right as often as one wishes
(`heads_with_hit_rates`), and whatever decodes with them is the product's own.

V vocabulary, D hidden, K heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa_exp.model import Backbone, build_heads

_RANKS = 4
"""Places among a head's draft tokens at which the right one may stand."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


@dataclass(frozen=True)
class Scale:
    """How large everything is: as it counts, or tiny, to see that it runs."""

    device: torch.device
    dtype: torch.dtype
    shapes: dict[str, Shape]
    batches: tuple[int, ...] = (1, 16, 64, 4)
    nodes: tuple[int, ...] = (1, 16, 64, 5)
    past: int = 512
    steps: int = 24
    backend: str = "inductor"
    """Of torch.compile."""
    slots: int = 128
    documents: int = 384
    new_tokens: int = 256
    training: tuple[int, int] = (2048, 4)
    """Tokens of a document, and documents of a step."""
    is_rehearsal: bool = False


def full() -> Scale:
    """Return what counts."""
    shapes = {
        "7B": Shape(4096, 11008, 32, 32, 32, 32000),
        "8B": Shape(4096, 14336, 32, 32, 8, 128256),
    }
    return Scale(torch.device("cuda"), torch.bfloat16, shapes)


def rehearsal() -> Scale:
    """Return the same, tiny: on a CPU, or on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {"7B": Shape(64, 96, 2, 4, 4, 256), "8B": Shape(64, 96, 2, 4, 2, 512)}
    return Scale(
        device,
        torch.float32,
        shapes,
        batches=(1, 2),
        nodes=(1, 5),
        past=16,
        steps=6,
        # inductor wants a C++ compiler on a CPU
        backend="inductor" if device.type == "cuda" else "aot_eager",
        slots=4,
        documents=8,
        new_tokens=16,
        training=(64, 2),
        is_rehearsal=True,
    )


@torch.no_grad()
def random_llama(shape: Shape, scale: Scale) -> Backbone:
    """Return a model of this shape that says v + 1 after v."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(scale.dtype)
    try:
        with scale.device:
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(1e-3)
    embedding = model.get_input_embeddings().weight
    embedding.normal_()
    model.lm_head.weight.copy_(embedding.roll(1, 0))
    return Backbone(model.eval().requires_grad_(False))


def heads_with_hit_rates(backbone: Backbone, rates: Sequence[float]) -> nn.Module:
    """Return Medusa heads whose first choices are right this often, head by head.

    Of what is left, half has the right token in second place, half of the rest in third, and so on
    as far as place four. Where it stands depends on the token that is known for sure alone.
    """
    heads = build_heads(backbone, num_heads=len(rates)).to(backbone.device, backbone.model.dtype)
    generator = torch.Generator().manual_seed(0)
    for k, rate in enumerate(rates):
        projection = heads.lm_heads.parameters_of(k)[0]
        draws_V = torch.rand(backbone.vocab_size, generator=generator)
        with torch.no_grad():
            projection.copy_(_projection(backbone, k + 2, places(draws_V, rate)))
    return heads.eval().requires_grad_(False)


def places(draws_V: torch.Tensor, rate: float) -> torch.Tensor:
    """Return the place of the right token among a head's draft tokens; `_RANKS` if not there."""
    place_V, reach = torch.full(draws_V.shape, _RANKS), rate
    for rank in range(_RANKS):
        place_V[(draws_V < reach) & (place_V == _RANKS)] = rank
        reach += (1 - reach) / 2
    return place_V


def _projection(backbone: Backbone, ahead: int, place_V: torch.Tensor) -> torch.Tensor:
    """Return weight_VD by which token v + `ahead` stands in its place among the likeliest."""
    embedding_VD = backbone.model.get_input_embeddings().weight
    place_V = place_V.to(backbone.device)
    weight_VD = torch.zeros_like(embedding_VD)
    for rank in range(_RANKS):
        score = 1 - 0.1 * rank
        right = (place_V == rank)[:, None]
        weight_VD += (embedding_VD * right * score).roll(ahead, 0)
        # In this place of the others stands some other token, far away.
        weight_VD += (embedding_VD * ~right * score).roll(ahead + 17 * (rank + 1), 0)
    return weight_VD
