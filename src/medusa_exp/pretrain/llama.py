"""A small Llama, and what Lightning trains of it from scratch: all.

B batch, T time, V vocabulary.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp.config import PretrainConfig
from medusa_exp.data.datamodule import Batch
from medusa_exp.train.schedule import scheduled


def build_llama(settings: PretrainConfig, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """Return it with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_key_value_heads,
            max_position_embeddings=settings.max_position_embeddings,
            bos_token_id=None,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
            attn_implementation="eager",  # a sixth less time a step than sdpa on a CPU
        )
    )


class LanguageModelModule(L.LightningModule):
    """Plain next-token training on all tokens, prompts too."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        learning_rate: float,
        warmup_fraction: float,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.warmup_fraction = warmup_fraction
        self.max_steps = max_steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy over real tokens."""
        ids_BT = batch.input_ids_BT
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        targets_BT = ids_BT.masked_fill(batch.documents_BT == 0, -100)[:, 1:]
        loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets_BT.flatten())
        self.log("pretrain/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with warm-up and cosine."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        return scheduled(optimizer, self.warmup_fraction, self.max_steps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm; Lightning's own clipping takes a fused optimiser for one that unscales."""
        assert gradient_clip_val is not None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)
