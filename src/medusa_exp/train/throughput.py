"""How fast a training is: tokens a second, and the share of the device's matrix rate (MFU).

Model FLOPs utilization after Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B: the
floating-point operations that the model needs, whatever is computed twice, over the time and over
what the device could do. There the rate is the maker's; here it is that of a large matrix product,
measured in the same process.

B batch, T time, D hidden, V vocabulary, K heads, L layers.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from medusa_exp.data.datamodule import Batch
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.heads.layers import RecurrentBlock
from medusa_exp.runs.machine import matrix_rate, peak_memory_bytes
from medusa_exp.train.module import MedusaModule

log = logging.getLogger(__name__)

_SECONDS = 0.5
"""That matrices are multiplied for; of a short training, a hundredth of its time."""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations that training needs, multiplications and additions.

    Of the frozen backbone a forward pass: 2 for each weight of a matrix and each token, and
    4 * heads * head_dim in each layer for each pair of a token and one that it sees (PaLM counts
    all pairs of a row; a causal model sees half of them. A sliding window is not considered). Of a
    head 6 for each weight and each label: 2 forward, and 4 for the gradients of weight and input;
    but 4 in its first block, whose input is frozen, and 4 for an lm_head that it shares. A head of
    kind recurrent needs one step from the state of the head before it. Padding needs nothing, nor
    does anything the second time. Left out of Medusa-2: the lm_head of the backbone's own loss, and
    the teacher of self-distillation.
    """

    of_token: float
    of_pair: float
    """A pair of tokens, of which one sees the other."""
    of_label: Sequence[float]
    """A label of the lm_head, and of each head [1 + K]."""

    @classmethod
    def of(
        cls, backbone: Backbone, heads: MedusaHeads, *, runs_layers: bool, asks_lm_head: bool
    ) -> "Operations":
        """Count for these models.

        Args:
            backbone: frozen.
            heads: that are trained.
            runs_layers: does a step run the backbone's layers, or are hidden states at hand?
            asks_lm_head: does a step ask the lm_head what it would predict?
        """
        text = backbone.model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or backbone.hidden_size // max(
            1, text.num_attention_heads
        )
        # Of keys and of values, which latent attention (MLA) has of two widths.
        widths = [getattr(text, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim")]
        of_pair = 2.0 * text.num_attention_heads * sum(widths) * backbone.num_layers
        of_token = 2.0 * _matrix_weights(backbone.body, text) if runs_layers else 0.0
        if heads.prefix is not None:
            of_token += 6.0 * sum(p.numel() for p in heads.prefix.parameters())
        lm_head = 2.0 * backbone.vocab_size * backbone.hidden_size
        of_heads = [_of_head(heads, k, lm_head) for k in range(heads.num_heads)]
        if heads.root_block is not None:
            of_heads[0] += _of_root(heads.root_block, heads.prefix is not None)  # once for all
        return cls(of_token, of_pair * runs_layers, [lm_head if asks_lm_head else 0.0, *of_heads])

    def of_batch(self, batch: Batch, times_backbone: float = 1.0) -> float:
        """Return those of a micro-batch; where the backbone learns too, it is run twice."""
        pairs = sum(length * (length + 1) / 2 for length in batch.lengths)
        labels = zip(self.of_label, batch.labeled, strict=True)
        of_backbone = self.of_token * sum(batch.lengths) + self.of_pair * pairs
        return times_backbone * of_backbone + sum(each * len(index_R) for each, index_R in labels)

    def of_tokens(self, number: float, row_tokens: int) -> float:
        """Return those of so many tokens in documents of this length, each of which is trained."""
        return number * (self.of_token + self.of_pair * row_tokens / 2 + sum(self.of_label))


def _matrix_weights(body: nn.Module, config: Any) -> float:
    """Count weights that each token is multiplied with: of experts, those that it is sent to."""
    number = 0.0
    experts = [
        getattr(config, n, None) for n in ("num_local_experts", "num_experts", "n_routed_experts")
    ]
    total = next((n for n in experts if n), 1)
    share = (getattr(config, "num_experts_per_tok", None) or total) / total
    for name, module in body.named_modules():
        part = share if _is_routed(name, module) else 1.0
        if hasattr(module, "in_features") and not any(module.children()):  # LoRA wraps a layer
            number += part * module.in_features * module.out_features  # packed ones, if quantized
        elif not isinstance(module, nn.Embedding):
            own = module.parameters(recurse=False)
            number += part * sum(p.numel() for p in own if p.ndim >= 2)
    return number


def _is_routed(name: str, module: nn.Module) -> bool:
    """Say whether a token may be sent past this part; shared experts see all tokens."""
    return "experts" in name.split(".") or "Experts" in type(module).__name__


def _of_root(block: RecurrentBlock, is_prefixed: bool) -> float:
    """Count for one position: an embedding has no gradient, a state if attention made it."""
    inner, skip, out = (part.weight.numel() for part in (block.inner, block.skip, block.out))
    return 6.0 * out + 4.0 * (inner + skip) + is_prefixed * inner


def _of_head(heads: MedusaHeads, k: int, lm_head: float) -> float:
    matrices = [p for p in heads.head_parameters(k) if p.ndim >= 2]
    blocks = list(heads.blocks[0 if heads.is_recurrent else k].children())
    first = [p for p in blocks[0].parameters() if p.ndim >= 2] if blocks else matrices[:1]
    if heads.root_block is not None:  # what they read has a gradient
        first = []
    if heads.is_recurrent:  # a state has a gradient, but for the first one; an embedding has none
        start = blocks[0]
        first = [start.skip.weight] if k else [start.skip.weight, start.inner.weight]
    shares = not heads.lm_heads.parameters_of(k)
    lm_head *= heads.config.head_vocab_size / heads.config.vocab_size
    weights, frozen_input = (sum(p.numel() for p in some) for some in (matrices, first))
    return 6.0 * weights - 2.0 * frozen_input + 2 * lm_head * shares


class Throughput(L.Callback):
    """Measures how fast a training is, and logs it with the steps that are logged.

    Time runs from the end of one optimizer step to the end of the next. The first one, in which
    libraries set themselves up, does not count, nor does one behind a validation or a checkpoint.
    """

    def __init__(self, operations: Operations, dtype: torch.dtype = torch.float32) -> None:
        self.operations, self.dtype = operations, dtype
        self.rate: float | None = None
        """The device's matrix rate, in operations a second, once it is measured."""
        self._all, self._recent, self._step = _Work(), _Work(), _Work()
        self._last: float | None = None
        self._device = torch.device("cpu")
        self._before: dict[str, float] = {}

    def measure_rate(self, device: torch.device, seconds_left: float) -> None:
        """Measure the matrix rate, for at most a hundredth of the time that the training takes."""
        if self.rate is None:
            self.rate = matrix_rate(device, self.dtype, min(_SECONDS, seconds_left / 100))
            self._last = None

    def on_train_start(self, trainer: L.Trainer, module: MedusaModule) -> None:
        """Forget what earlier stages needed of a GPU."""
        self._device = module.device
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: MedusaModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the micro-batch, and time the step where it is its last."""
        # Where the backbone learns too: forward, and the gradient of what each layer reads.
        times = 2.0 if module.is_joint() else 1.0
        self._step.tokens += trainer.world_size * sum(batch.lengths)
        self._step.operations += self.operations.of_batch(batch, times)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.perf_counter()
        if self._last is not None:
            self._step.seconds = now - self._last
            for work in (self._all, self._recent):
                work.add(self._step)
        self._last, self._step = now, _Work()
        if trainer.global_step % trainer.log_every_n_steps == 0 and self._recent.seconds:
            found = self._metrics(self._recent)
            module.log_dict(found, prog_bar=True)
            self._recent = _Work()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        """Keep the figures for a call that finds no step left to measure."""
        return {"metrics": self.metrics()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self._before = state_dict["metrics"]

    def metrics(self) -> dict[str, float]:
        """Return what was measured since the training was last begun or resumed.

        Where no step was, those of before; nothing of a training of a few steps.
        """
        return self._metrics(self._all) if self._all.seconds else self._before

    def describe(self) -> str:
        """Say it in words."""
        found = self.metrics()
        if not found:
            return ""
        share = found.get("train/mfu")
        return ", ".join(
            (
                f"{found['train/tokens_per_second']:,.0f} tokens/s",
                *([] if share is None else [f"{share:.0%} of the matrix rate"]),
                f"{found['train/peak_memory_gb']:.2f} GB at most",
            )
        )

    def _metrics(self, work: "_Work") -> dict[str, float]:
        found = {"train/tokens_per_second": work.tokens / work.seconds}
        if self.rate is not None:
            found["train/mfu"] = work.operations / work.seconds / self.rate
        return {**found, "train/peak_memory_gb": peak_memory_bytes(self._device) / 1e9}


@dataclass
class _Work:
    """What was done in some time."""

    tokens: int = 0
    operations: float = 0.0
    seconds: float = 0.0

    def add(self, other: "_Work") -> None:
        self.tokens += other.tokens
        self.operations += other.operations
        self.seconds += other.seconds
