"""Decoding in one call, over a tree or plainly, for those who want no `Decoder` to keep.

B rows, T prompt tokens, D hidden, K heads, V vocabulary.
"""

import math

from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_exp.decode.decoder import Decoder, Generation, OnStep
from medusa_exp.decode.loop import Limits, Response
from medusa_exp.decode.prompt_ids import Prompts
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree


def generate(
    model: PreTrainedModel | Backbone,
    heads: nn.Module,
    input_ids: Prompts,
    *,
    tree: Tree,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    draft: str = "top",
    eos_token_id: int | list[int] | None = None,
    seed: int | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Continue prompts once, without a `Decoder` to keep; see `Decoder.generate`.

    Steps are not captured as CUDA graphs, because a capture costs more than one call gains. For
    speed, keep a `Decoder`.

    At temperature 0 the tokens are those of plain greedy decoding; above it, they are draws from
    the same distribution as plain sampling's.

    Args:
        model: a causal language model of transformers.
        heads: any module with `heads(hidden_BD) -> logits_BKV`.
        input_ids: prompts [B, T]; or token ids or encodings, as for `Decoder.generate`.
        tree: the draft tokens that a step checks; not deeper than there are heads.
        attention_mask: [B, T], False or 0 at padding, left or right; an encoding has its own.
        max_new_tokens: at most so many a row.
        temperature: 0 is greedy.
        top_k: draw from the k likeliest tokens alone.
        top_p: draw from the likeliest tokens that together have this probability.
        draft: above temperature 0, the heads' likeliest tokens (top) or draws from them (sampled).
        eos_token_id: ids that end a row; the model's own by default.
        seed: of the draws; None draws anew each time.
        on_step: is called after each step with the tokens that it adds to each row.

    Raises:
        ValueError: as `Decoder.generate`, or the rule has no such value.
        UserError: as `Decoder` and `Decoder.generate`.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite.")
    rule = GREEDY
    if temperature > 0:
        rule = AcceptanceRule("sampling", temperature, top_k, top_p, seed=seed, draft=draft)
    return Decoder(model, heads, tree, rule, cuda_graph=False).generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        on_step=on_step,
    )


def decode_plain(
    backbone: Backbone, prompts: Prompts, limits: Limits, rule: AcceptanceRule = GREEDY
) -> list[Response]:
    """Decode a batch of prompts once without heads; see `Decoder.decode_plain`.

    As for `generate`, steps are not captured.
    """
    return Decoder(backbone, rule=rule, limits=limits, cuda_graph=False).decode_plain(prompts)
