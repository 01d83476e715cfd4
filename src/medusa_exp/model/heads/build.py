"""Fresh heads for a backbone."""

from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.heads import FAMILIES, MedusaHeads
from medusa_exp.model.heads.prefix_attention import attention_heads


def build_heads(
    model: PreTrainedModel | Backbone,
    *,
    num_heads: int,
    num_layers: int = 1,
    kind: str = "medusa",
    bias: bool = True,
    rank: int | None = None,
    num_tokens: int | None = None,
    prefix_attention: bool = False,
    token_counts: Tensor | None = None,
) -> MedusaHeads:
    """Build fresh float32 heads that fit a backbone, on its device.

    Every projection starts as the backbone's lm_head, or as near to it as it can, so that at step 0
    each head predicts what the backbone predicts one place earlier: far better than random, and
    soon better than that.

    Args:
        model: the backbone.
        num_heads: K.
        num_layers: residual blocks of each head; medusa_tied and hydra need one at least.
        kind: a name of `FAMILIES`.
        bias: of the residual blocks.
        rank: of medusa_lowrank's matrices; None is full.
        num_tokens: that medusa_lowrank's heads know, the most frequent ones; None is all.
        prefix_attention: let a layer of attention over all hidden states stand before the heads.
        token_counts: how often each token comes [V], for `num_tokens`.

    Raises:
        ValueError: `kind` is not known, or a number does not fit it.
    """
    if kind not in FAMILIES:
        raise ValueError(f"kind={kind} is not known: use one of {', '.join(FAMILIES)}.")
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    check_shape(kind, num_layers, rank, num_tokens)
    if num_tokens is not None and token_counts is None:
        raise ValueError("num_tokens needs token_counts, to know which tokens are frequent.")
    lm_head = backbone.lm_head
    config = MedusaHeadsConfig(
        kind=kind,
        num_heads=num_heads,
        num_layers=num_layers,
        bias=bias,
        rank=None if rank is None else min(rank, backbone.hidden_size),
        num_tokens=None if num_tokens is None else min(num_tokens, backbone.vocab_size),
        prefix_attention=prefix_attention,
        num_attention_heads=attention_heads(
            backbone.model.config.get_text_config(), backbone.hidden_size
        ),
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_bias=getattr(lm_head, "bias", None) is not None,
        backbone=str(backbone.model.config.name_or_path),
        backbone_identity=backbone.identity(),
    )
    heads = MedusaHeads(config).float().to(backbone.device)
    heads.lm_heads.start(lm_head, token_counts)
    return heads.attach(backbone)


def check_shape(kind: str, num_layers: int, rank: int | None, num_tokens: int | None) -> None:
    """Raise a ValueError where these do not make heads."""
    if num_layers < (fewest := FAMILIES[kind].min_layers):
        raise ValueError(f"kind={kind} needs num_layers of {fewest} or more.")
    is_small = rank is not None or num_tokens is not None
    if is_small != (kind == "medusa_lowrank"):
        raise ValueError("rank or num_tokens, and kind=medusa_lowrank, go together.")
