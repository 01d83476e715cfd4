"""The one function to call from Python."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_exp.decode.loop import decode_tree
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree


@dataclass
class Generation:
    """What `generate` returns."""

    sequences: list[list[int]]
    """The new tokens of each row, a stop token included."""
    accept_lengths: list[list[int]]
    """Tokens committed at each step of each row; a row's sum is its length."""
    num_steps: int
    """Backbone steps in all."""


def generate(
    model: PreTrainedModel | Backbone,
    heads: nn.Module,
    input_ids: Tensor,
    *,
    tree: Tree,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
) -> Generation:
    """Continue prompts greedily: token for token what the model alone would say, in fewer steps.

    Args:
        model: a causal language model of transformers.
        heads: any module with `heads(hidden_BD) -> logits_BKV`.
        input_ids: prompts [B, T]. Rows are decoded one after another.
        tree: the guesses that a step checks; not deeper than there are heads.
        attention_mask: [B, T], False or 0 at padding, left or right.
        max_new_tokens: at most so many a row.
        eos_token_id: ids that end a row; the model's own by default.

    Raises:
        ValueError: the model is in training mode, where its dropout would speak along.
        UserError: a row is empty, or longer than the model's positions.
    """
    if model.training if isinstance(model, PreTrainedModel) else model.model.training:
        raise ValueError("the model is in training mode: call model.eval() first.")
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    ids = eos_token_id if eos_token_id is not None else list(backbone.eos_token_ids)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [
        decode_tree(
            backbone,
            heads,
            tree,
            row[keep.bool()].tolist(),
            max_new_tokens=max_new_tokens,
            stop_ids=[ids] if isinstance(ids, int) else ids,
        )
        for row, keep in zip(input_ids, mask, strict=True)
    ]
    return Generation(
        [row.tokens for row in rows],
        [row.accept_lengths for row in rows],
        sum(len(row.accept_lengths) for row in rows),
    )
