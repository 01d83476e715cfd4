"""The one function to call from Python."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.loop import Limits, decode_tree
from medusa_exp.decode.rule import AcceptanceRule
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
    """Backbone steps of the batch: those of the row that took most."""


def generate(
    model: PreTrainedModel | Backbone,
    heads: nn.Module,
    input_ids: Tensor,
    *,
    tree: Tree,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    seed: int | None = None,
) -> Generation:
    """Continue prompts as the model alone would, in fewer steps.

    At temperature 0 the tokens are those of plain greedy decoding; above it, they are draws from
    the same distribution as plain sampling's.

    Args:
        model: a causal language model of transformers.
        heads: any module with `heads(hidden_BD) -> logits_BKV`.
        input_ids: prompts [B, T].
        tree: the guesses that a step checks; not deeper than there are heads.
        attention_mask: [B, T], False or 0 at padding, left or right.
        max_new_tokens: at most so many a row.
        temperature: 0 is greedy.
        top_k: draw from the k likeliest tokens alone.
        top_p: draw from the likeliest tokens that together have this probability.
        eos_token_id: ids that end a row; the model's own by default.
        seed: of the draws; None draws anew each time.

    Raises:
        ValueError: the model is in training mode, where its dropout would speak along; or an
            argument has no such value.
        UserError: a row is empty, or longer than the model's positions; or the model cannot be
            decoded with trees.
    """
    if model.training if isinstance(model, PreTrainedModel) else model.model.training:
        raise ValueError("the model is in training mode: call model.eval() first.")
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check(input_ids, mask, max_new_tokens, temperature, backbone.vocab_size)
    check_tree_attention(backbone)
    ids = eos_token_id if eos_token_id is not None else list(backbone.eos_token_ids)
    limits = Limits(max_new_tokens, [ids] if isinstance(ids, int) else ids)
    rule = AcceptanceRule()
    if temperature > 0:
        rule = AcceptanceRule("sampling", temperature, top_k, top_p, seed=seed)
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    answers = decode_tree(backbone, heads, tree, prompts, limits, rule)
    return Generation(
        [answer.tokens for answer in answers],
        [answer.accept_lengths for answer in answers],
        max(len(answer.accept_lengths) for answer in answers),
    )


def _check(
    input_ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    temperature: float,
    vocab_size: int,
) -> None:
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(f"input_ids must be [B, T], not of shape {list(input_ids.shape)}.")
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be of input_ids' shape {list(input_ids.shape)}, "
            f"not {list(mask.shape)}."
        )
    kept = input_ids[mask.bool()]
    if kept.is_floating_point() or (
        kept.numel() and not 0 <= kept.min() <= kept.max() < vocab_size
    ):
        raise ValueError(f"input_ids must be integers from 0 to {vocab_size - 1}.")
    if max_new_tokens != int(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more, and whole.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite.")
