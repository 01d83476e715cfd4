"""Logits in; the distribution that sampling draws from, out. The same for plain and tree decoding.

V vocabulary.
"""

import torch
from torch import Tensor


def probabilities(
    logits_V: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return probabilities over the last dimension, in float32 or wider.

    Temperature, then top-k, then top-p, as transformers applies them: of tokens that tie for place
    k all stay, and top-p keeps the token with which the sum reaches `top_p`. NaN counts as minus
    infinity; tokens of infinite logit share all the probability, and where none is above minus
    infinity, token 0 has it.
    """
    wide_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
    wide_V = wide_V.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    largest_1 = wide_V.amax(-1, keepdim=True)
    # Differences to the largest: infinities of one sign are equal, and not NaN. Divided only then,
    # or a tiny temperature would make infinities of several logits.
    below_V = torch.where(wide_V == largest_1, 0.0, (wide_V - largest_1) / temperature)
    token_V = torch.arange(below_V.shape[-1], device=below_V.device)
    below_V = below_V.masked_fill((largest_1 == -torch.inf) & (token_V > 0), -torch.inf)
    if top_k is not None:
        kth_1 = below_V.topk(min(top_k, below_V.shape[-1]), dim=-1).values[..., -1:]
        below_V = below_V.masked_fill(below_V < kth_1, -torch.inf)
    if top_p is not None and top_p < 1:  # the sum of all may round to more than 1 before its end
        below_V = _nucleus(below_V, top_p)
    return below_V.softmax(-1)


def _nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    ordered_V, place_V = logits_V.sort(dim=-1, descending=True, stable=True)
    p_V = ordered_V.softmax(-1)
    is_out_V = p_V.cumsum(-1) - p_V >= top_p
    is_out_V[..., 0] = False
    return logits_V.masked_fill(is_out_V.gather(-1, place_V.argsort(-1)), -torch.inf)
