"""Medusa heads: K small networks that each guess one later token from one hidden state.

B batch, D hidden, V vocabulary, K heads. Head k (from 1) at position t guesses token t+1+k; the
backbone's own lm_head gives token t+1. After Cai et al., "Medusa" (2024), section 2.1.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from medusa_exp.model.backbone import Backbone


class MedusaHeadsConfig(PreTrainedConfig):
    """Shape of the heads, and which backbone they belong to."""

    model_type = "medusa"

    def __init__(
        self,
        num_heads: int = 4,
        num_layers: int = 1,
        hidden_size: int = 256,
        vocab_size: int = 2048,
        lm_head_bias: bool = False,
        backbone: str = "",
        backbone_identity: str = "",
        **kwargs: object,
    ) -> None:
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.lm_head_bias = lm_head_bias
        self.backbone = backbone
        self.backbone_identity = backbone_identity
        super().__init__(**kwargs)


class ResBlock(nn.Module):
    """x + SiLU(Wx + b), with W = 0 and b = 0 at the start: then it is the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return x + silu(self.linear(x))


class MedusaHeads(PreTrainedModel):
    """K heads of L residual blocks and a vocabulary projection each; none shares a parameter."""

    config_class = MedusaHeadsConfig
    base_model_prefix = "medusa"

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(size) for _ in range(config.num_layers)))
            for _ in range(config.num_heads)
        )
        self.lm_heads = nn.ModuleList(
            nn.Linear(size, config.vocab_size, bias=config.lm_head_bias)
            for _ in range(config.num_heads)
        )
        self.post_init()

    @property
    def num_heads(self) -> int:
        """K."""
        return len(self.lm_heads)

    def forward(self, hidden_BD: Tensor, num_heads: int | None = None) -> Tensor:
        """Return logits_BKV of the first `num_heads` heads (all of them by default)."""
        used = range(self.num_heads if num_heads is None else num_heads)
        return torch.stack([self.head_logits(k, hidden_BD) for k in used], dim=-2)

    def head_logits(self, k: int, hidden_RD: Tensor) -> Tensor:
        """Return logits_RV of the head at index k (0 is head 1)."""
        return self.lm_heads[k](self.blocks[k](hidden_RD))

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what the constructors made: transformers would draw every Linear anew."""


class StackedHeads(nn.Module):
    """The same heads for decoding: one tensor a layer instead of one a head and layer.

    A step runs all heads on one hidden state; together they take a half to a quarter of the time
    that they take one by one. In another dtype guesses may differ in a near-tie; what is decoded
    does not, for guesses are only guesses.
    """

    def __init__(self, heads: MedusaHeads, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.dtype = heads.num_heads, dtype

        def stacked(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
            weight_KIO = torch.stack([layer.weight.detach().T for layer in layers])
            biases = [layer.bias for layer in layers if layer.bias is not None]
            bias_K1O = torch.stack(biases).detach()[:, None].to(dtype) if biases else None
            return weight_KIO.to(dtype).contiguous(), bias_K1O

        depth = heads.config.num_layers
        self.layers = [stacked([b[i].linear for b in heads.blocks]) for i in range(depth)]
        self.projection = stacked(list(heads.lm_heads))

    @torch.no_grad()
    def forward(self, hidden_BD: Tensor, num_heads: int | None = None) -> Tensor:
        """Return logits_BKV of the first `num_heads` heads (all of them by default)."""
        count = self.num_heads if num_heads is None else num_heads
        x_KBD = hidden_BD.to(self.dtype).expand(count, -1, -1)
        for layer in self.layers:
            x_KBD = x_KBD + silu(_stacked_linear(x_KBD, layer, count))
        return _stacked_linear(x_KBD, self.projection, count).transpose(0, 1)


def stack_heads(heads: MedusaHeads, backbone: Backbone) -> StackedHeads:
    """Stack heads for decoding with a backbone: on a GPU in its dtype, for half the reading."""
    dtype = backbone.model.dtype if backbone.device.type == "cuda" else heads.dtype
    return StackedHeads(heads, dtype)


def _stacked_linear(x_KBI: Tensor, layer: tuple[Tensor, Tensor | None], count: int) -> Tensor:
    weight_KIO, bias_K1O = layer
    if bias_K1O is None:
        return torch.bmm(x_KBI, weight_KIO[:count])
    return torch.baddbmm(bias_K1O[:count], x_KBI, weight_KIO[:count])


AutoConfig.register("medusa", MedusaHeadsConfig)
AutoModel.register(MedusaHeadsConfig, MedusaHeads)


def build_heads(
    model: PreTrainedModel | Backbone,
    *,
    num_heads: int,
    num_layers: int = 1,
    kind: str = "medusa",
) -> MedusaHeads:
    """Build fresh float32 heads that fit a backbone, on its device.

    Every projection starts as the backbone's lm_head, so that at step 0 each head predicts what
    the backbone predicts one place earlier: far better than random, and soon better than that.

    Raises:
        ValueError: `kind` is not known.
    """
    if kind != "medusa":
        raise ValueError(f"kind={kind} is not known: use medusa.")
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    lm_head = backbone.lm_head
    bias = getattr(lm_head, "bias", None)
    heads = MedusaHeads(
        MedusaHeadsConfig(
            num_heads=num_heads,
            num_layers=num_layers,
            hidden_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            lm_head_bias=bias is not None,
            backbone=str(backbone.model.config.name_or_path),
            backbone_identity=backbone.identity(),
        )
    ).float()
    with torch.no_grad():
        for projection in heads.lm_heads:
            projection.weight.copy_(lm_head.weight)
            if bias is not None:
                projection.bias.copy_(bias)
    return heads.to(backbone.device)
