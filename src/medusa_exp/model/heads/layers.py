"""Layers of Medusa heads: residual blocks, and projections to the vocabulary.

A block starts as the identity. It is a module with

    forward(x) -> x    [..., D] each
    stacked(blocks, dtype) -> (x_KBD, count) -> x_KBD    one of each head at once, for decoding: a
                                                         module, in which packing finds layers

A projection maps a head's last block to logits. It is a module with

    forward(k, x_RD) -> logits_RW     of the head at index k (0 is head 1)
    start(backbone, token_counts_V)   make it as near to the backbone's lm_head as it can be, with
                                      logits of the same size as the backbone's
    attach(backbone)                  give it what it shares with the backbone, and does not save
    parameters_of(k)                  what the head at index k has of its own
    output_layers()                   its last linear layers, to W, all of one shape, in a list in
                                      which drafting may replace them by quantized ones
                                      (`model/int8.py`); empty where the matrix is the backbone's
    stacked(dtype) -> (x_KBD, count) -> logits_KBW    all heads at once, for decoding, by
                                      `stacked_linear`; a module where packing is to find layers
    token_map                         token ids of the head vocabulary, or None: all V tokens

B batch, D hidden, V vocabulary, W head vocabulary, K heads, R rows, J draft tokens, S rank, I and
O widths.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.int8 import Int8Linear
from medusa_exp.model.packed import is_faster_unbatched

Stacked = Callable[[Tensor, int], Tensor]
"""Maps x_KBI and the number of heads to use to [count, B, O]."""
_LARGE = 1 << 20
"""Weights of a layer from which on the 20 us of a call of its own are little of its time."""


class ResBlock(nn.Module):
    """x + SiLU(Wx + b), with W = 0 and b = 0 at the start."""

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = _zero_linear(hidden_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return x + silu(self.linear(x))

    @staticmethod
    def stacked(blocks: Sequence["ResBlock"], dtype: torch.dtype) -> "StackedBlocks":
        """Return a block of each head at once."""
        linear = stacked_linear([block.linear for block in blocks], dtype)
        return StackedBlocks(linear, lambda x, y: x + silu(y))


class StackedBlocks(nn.Module):
    """A block of each head at once: (x_KBD, count) -> join(x_KBD, linear(x_KBD, count))."""

    def __init__(self, linear: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self._join = linear, join

    def forward(self, x_KBD: Tensor, count: int) -> Tensor:
        """Apply the blocks of the first `count` heads."""
        return self._join(x_KBD, self.linear(x_KBD, count))


class GroundedBlock(nn.Module):
    """A block that also sees the embeddings e of J tokens: x + Ve + SiLU(W[x, e] + b).

    After Ankner et al., "Hydra" (2024), section 3, but that x itself passes unchanged. Heads that
    have it run one after the other, so that there is no stacked form.
    """

    def __init__(self, hidden_size: int, num_tokens: int, bias: bool = True) -> None:
        super().__init__()
        self.skip = _zero_linear(num_tokens * hidden_size, hidden_size, bias=False)
        self.linear = _zero_linear((1 + num_tokens) * hidden_size, hidden_size, bias)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Map [..., D] and [..., J * D] to [..., D]."""
        return x + self.skip(embedded) + silu(self.linear(torch.cat([x, embedded], -1)))


class RecurrentBlock(nn.Module):
    """One step of a recurrence over draft tokens, the same at every depth.

    From the state s so far and the embedding e of the token drafted last it makes the next state,

        s + out(SiLU(gate z) * up z) + skip n(e),    z = [n(s), n(e)]

    with n the normalization by the root of the mean square, lest it matter how large the embeddings
    of a backbone are, or how far a state has come. `out` and `skip` are zero at the start, and the
    step is the identity. Sharing over positions is that of the MLP speculator (Wertheimer et al.,
    arXiv 2404.19124) and of FastMTP (arXiv 2509.18362); the gated network is Shazeer's SwiGLU
    (arXiv 2002.05202). The state is as wide as the backbone's, so that the copied lm_head reads it.
    """

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * hidden_size, 2 * hidden_size, bias=bias)  # gate and up in one
        self.out = _zero_linear(hidden_size, hidden_size, bias=False)
        self.skip = _zero_linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Map states [..., D] and embeddings [..., D] to states [..., D]."""
        e = _normed(embedded)
        gate, up = self.inner(torch.cat([_normed(x), e], -1)).chunk(2, -1)
        return x + self.out(silu(gate) * up) + self.skip(e)


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], eps=1e-6)


def _scaled_lm_head(backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """Return the lm_head's matrix and its bias, if it has one, scaled as the logits are."""
    lm_head, scale = backbone.lm_head, backbone.logit_scale
    weight_VD, bias_V = lm_head.weight, getattr(lm_head, "bias", None)
    if scale == 1:
        return weight_VD, bias_V
    return weight_VD * scale, None if bias_V is None else bias_V * scale


def _zero_linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.zeros_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class BatchedLinear(nn.Module):
    """A linear layer of each head as one batched product: (x_KBI, count) -> [count, B, O]."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        # No buffers: nobody saves them.
        self.weight_KIO = (
            torch.stack([layer.weight.detach().T for layer in layers]).to(dtype).contiguous()
        )
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias_K1O = torch.stack(biases)[:, None].to(dtype) if biases else None

    def forward(self, x_KBI: Tensor, count: int) -> Tensor:
        """Multiply by the matrices of the first `count` layers."""
        if self.bias_K1O is None:
            return torch.bmm(x_KBI, self.weight_KIO[:count])
        return torch.baddbmm(self.bias_K1O[:count], x_KBI, self.weight_KIO[:count])


class UnbatchedLinear(nn.Module):
    """A linear layer of each head, called one by one: (x_KBI, count) -> [count, B, O].

    They are the very layers that were given, which packing finds here and changes. Not those in
    int8: packing judges by the rows of a step, and their float32 form is for more than eight alone.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._in_order = list(layers)
        self.packable = nn.ModuleList(one for one in layers if not isinstance(one, Int8Linear))

    def forward(self, x_KBI: Tensor, count: int) -> Tensor:
        """Call the first `count` layers on a place each."""
        pairs = zip(self._in_order[:count], x_KBI, strict=True)
        return torch.stack([layer(x_BI) for layer, x_BI in pairs])


def stacked_linear(
    layers: Iterable[nn.Module], dtype: torch.dtype
) -> BatchedLinear | UnbatchedLinear:
    """Return one linear layer of each head at once: (x_KBI, count) -> [count, B, O].

    Batched, as a copy in `dtype`. One by one, the very layers: those in int8, and large ones in a
    half type on a CPU where timing says that a row is faster so.
    """
    layers = list(layers)
    is_int8 = bool(layers) and all(isinstance(layer, Int8Linear) for layer in layers)
    if is_int8 or (_are_large_in_half_type(layers, dtype) and is_faster_unbatched(layers)):
        return UnbatchedLinear(layers)
    return BatchedLinear(layers, dtype)


def _are_large_in_half_type(layers: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    return len(weights) == len(layers) and all(
        weight.dtype == dtype and weight.device.type == "cpu" and weight.numel() >= _LARGE
        for weight in weights
    )


class Projection(Protocol):
    """The contract of projections: see the top of this file."""

    token_map: Tensor | None

    def __call__(self, k: int, x_RD: Tensor) -> Tensor: ...
    def start(self, backbone: Backbone, token_counts_V: Tensor | None) -> None: ...
    def attach(self, backbone: Backbone) -> None: ...
    def parameters_of(self, k: int) -> list[nn.Parameter]: ...
    def output_layers(self) -> nn.ModuleList: ...
    def stacked(self, dtype: torch.dtype) -> Stacked: ...


class UntiedProjections(nn.ModuleList):
    """A separate matrix [V, D] for each head, as in the Medusa paper."""

    token_map = None

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__(
            nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
            for _ in range(config.num_heads)
        )

    def forward(self, k: int, x_RD: Tensor) -> Tensor:
        """Return logits_RV."""
        return self[k](x_RD)

    @torch.no_grad()
    def start(self, backbone: Backbone, token_counts_V: Tensor | None) -> None:
        """Copy the lm_head, bias and all."""
        weight_VD, bias_V = _scaled_lm_head(backbone)
        for projection in self:
            projection.weight.copy_(weight_VD)
            if bias_V is not None:
                projection.bias.copy_(bias_V)

    def attach(self, backbone: Backbone) -> None:
        """Nothing is shared."""

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Return its matrix, and its bias."""
        return list(self[k].parameters())

    def output_layers(self) -> nn.ModuleList:
        """Return the linear layers [V, D] of all heads."""
        return self

    def stacked(self, dtype: torch.dtype) -> Stacked:
        """Return the layers at once."""
        return stacked_linear(self, dtype)


def _frequent(token_counts_V: Tensor | None, number: int) -> Tensor:
    """Return the ids of the most frequent tokens, in order; of equally frequent ones the first."""
    assert token_counts_V is not None
    return token_counts_V.argsort(descending=True, stable=True)[:number].sort().values


class TiedProjection(nn.Module):
    """The backbone's own lm_head for all heads, frozen: there is nothing to train or to save.

    Of a smaller head vocabulary the lm_head's rows of those tokens, copied.
    """

    token_map: Tensor | None

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__()
        self._shared: tuple[nn.Module, ...] = ()  # in a tuple, lest it become a submodule
        self._scale = 1.0
        token_map = torch.zeros(config.num_tokens, dtype=torch.long) if config.num_tokens else None
        self.register_buffer("token_map", token_map)
        self._rows: tuple[Tensor, Tensor | None] | None = None

    def forward(self, k: int, x_RD: Tensor) -> Tensor:
        """Return logits_RW."""
        return self._project(x_RD, *self._weights())

    def start(self, backbone: Backbone, token_counts_V: Tensor | None) -> None:
        """Choose the head vocabulary."""
        if self.token_map is not None:
            self.token_map.copy_(_frequent(token_counts_V, len(self.token_map)))

    def attach(self, backbone: Backbone) -> None:
        """Share the lm_head."""
        self._shared, self._scale = (backbone.lm_head,), backbone.logit_scale
        self._rows = None

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Nothing is its own."""
        return []

    def output_layers(self) -> nn.ModuleList:
        """Return none: the lm_head gives the model's own logits too."""
        return nn.ModuleList()

    def stacked(self, dtype: torch.dtype) -> Stacked:
        """Return one product, for which the matrix is read once."""
        weight_VD, bias_V = self._weights()
        if self.token_map is not None:
            return lambda x_KBD, count: self._project(x_KBD, weight_VD, bias_V)
        [lm_head] = self._shared  # the module, whose weights may be packed
        return lambda x_KBD, count: self._scaled(lm_head(x_KBD.to(weight_VD.dtype)))

    def _project(self, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        return self._scaled(linear(x.to(weight_VD.dtype), weight_VD, bias_V))

    def _scaled(self, logits: Tensor) -> Tensor:
        return logits if self._scale == 1 else logits * self._scale

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        if not self._shared:
            raise ValueError(
                "these heads share the lm_head of their backbone: load them with it, by "
                "load_heads(path, model)."
            )
        [lm_head] = self._shared
        bias_V = getattr(lm_head, "bias", None)
        whole = lm_head.weight.detach(), None if bias_V is None else bias_V.detach()
        if self.token_map is None:
            return whole
        if self._rows is None or self._rows[0].device != whole[0].device:
            weight_VD, bias_V = whole
            of_bias = None if bias_V is None else bias_V[self.token_map]
            self._rows = weight_VD[self.token_map], of_bias
        return self._rows


class LowRankProjections(nn.Module):
    """For each head, or for all, a matrix [W, D], or its factors [W, S] and [S, D].

    A token outside the head vocabulary is never drafted: where it comes, the draft is wrong.
    """

    token_map: Tensor | None

    def __init__(self, config: MedusaHeadsConfig, *, is_shared: bool = False) -> None:
        super().__init__()
        num_tokens = config.head_vocab_size
        width = config.rank or config.hidden_size
        heads = range(1 if is_shared else config.num_heads)
        self.down = nn.ModuleList(
            nn.Linear(config.hidden_size, width, bias=False) for _ in heads if config.rank
        )
        self.up = nn.ModuleList(
            nn.Linear(width, num_tokens, bias=config.lm_head_bias) for _ in heads
        )
        token_map = torch.zeros(num_tokens, dtype=torch.long) if config.num_tokens else None
        self.register_buffer("token_map", token_map)

    def forward(self, k: int, x_RD: Tensor) -> Tensor:
        """Return logits_RW."""
        place = self._place(k)
        return self.up[place](self.down[place](x_RD) if len(self.down) else x_RD)

    @torch.no_grad()
    def start(self, backbone: Backbone, token_counts_V: Tensor | None) -> None:
        """Take the lm_head's rows of the most frequent tokens, and the best factors of them.

        The best factors are those of its singular vectors: here of the eigenvectors of W'W, which
        is small where there are many tokens.
        """
        weight_WD, bias = _scaled_lm_head(backbone)
        weight_WD = weight_WD.float()
        if self.token_map is not None:
            self.token_map.copy_(_frequent(token_counts_V, len(self.token_map)))
            weight_WD = weight_WD[self.token_map]
            bias = None if bias is None else bias[self.token_map]
        if len(self.down):
            _, vectors_DD = torch.linalg.eigh(weight_WD.T @ weight_WD)
            down_SD = vectors_DD[:, -self.down[0].out_features :].T
            for down in self.down:
                down.weight.copy_(down_SD)
            weight_WD = linear(weight_WD, down_SD)
        for up in self.up:
            up.weight.copy_(weight_WD)
            if bias is not None:
                up.bias.copy_(bias)

    def attach(self, backbone: Backbone) -> None:
        """Nothing is shared."""

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Return its matrix or its factors, and its bias; where one is for all, that at each k."""
        layers = [some[self._place(k)] for some in (self.down, self.up) if len(some)]
        return [parameter for layer in layers for parameter in layer.parameters()]

    def output_layers(self) -> nn.ModuleList:
        """Return the linear layers to W, [W, D], or [W, S] after `down`; one that is for all."""
        return self.up

    def _place(self, k: int) -> int:
        return k if len(self.up) > 1 else 0

    def stacked(self, dtype: torch.dtype) -> Stacked:
        """Return the layers, or both factors of them, at once."""
        up = stacked_linear(self.up, dtype)
        return StackedFactors(stacked_linear(self.down, dtype), up) if len(self.down) else up


class StackedFactors(nn.Module):
    """`down` and `up` of each head at once: (x_KBD, count) -> logits_KBW."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x_KBD: Tensor, count: int) -> Tensor:
        """Apply the factors of the first `count` heads."""
        logits_KBW: Tensor = self.up(self.down(x_KBD, count), count)
        return logits_KBW
