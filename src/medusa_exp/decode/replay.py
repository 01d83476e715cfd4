"""Ranks of sampled responses: which draft of each head is accepted, node by node, and where.

`tree/search.py` replays decoding from ranks_PK. Of greedy responses these are facts. At a
temperature the response is one draw, and the replay is unbiased if ranks are drawn given it:

- Of the likeliest tokens (`decode.draft=top`), the next token is drawn from the backbone's p and a
  child is accepted if it holds that token. The response's tokens are such draws: the rank is the
  place of the token among the head's likeliest, as in greedy responses (`scoring.answer_ranks`).
- Of sampled drafts (`drawn_ranks`), what comes out is distributed by p too. After some children
  were rejected, with p and q as they are then, it is y by that p; y comes from the next child with
  probability min(p(y), q(y)). So given y it does with min(1, q(y) / p(y)). If it does not, the
  child was another token x, which was rejected, and what follows hangs on x by q alone: x has the
  weight q(x) - min(p(x), q(x)). Both are simulated, child by child (from the law of rejection in
  `decode/sampled.py`, by Bayes' rule).

Of likeliest tokens a path of the tree is accepted with the probability that decoding accepts it
with. Of sampled drafts it is what recursive rejection would accept, node by node. Decoding judges
whole paths (`decode/traversal.py`), which one response does not tell, and accepts some more.

P positions of a response, T of it and its prompt, C of a chunk, D hidden, K heads, R draws, V
vocabulary, W head vocabulary, X = V, or W and all others as one.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.sampled import Rejection, draw, with_others
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, heads_input

_CHUNK = 32
"""Positions whose distributions exist at one time."""


@torch.no_grad()
def drawn_ranks(
    backbone: Backbone,
    heads: MedusaHeads,
    tokens_P: Tensor,
    hidden_TD: Tensor,
    rule: AcceptanceRule,
    max_rank: int,
) -> np.ndarray:
    """Return ranks_PK, drawn by the rule's seed: the place in the draw of the child that is token
    t+k, where token t of a sampled response is certain.

    What none of the first `max_rank` children would be, or stands beyond the response's end, has
    rank `max_rank`.

    Args:
        backbone: that responded, perhaps without its layers.
        heads: of any family; those that see tokens see the response's own.
        tokens_P: the response.
        hidden_TD: the backbone's states at all tokens before; the last P gave the response's.
        rule: sampling, with its temperature, top-k and top-p.
        max_rank: how many children count.
    """
    number, filters = len(tokens_P), (rule.temperature, rule.top_k, rule.top_p)
    hidden_PD = hidden_TD[len(hidden_TD) - number :]
    read_PD = heads_input(heads.prefix, hidden_TD[None])[0, len(hidden_TD) - number :]
    places_P = heads.to_head_vocab(tokens_P)
    generator = torch.Generator(tokens_P.device).manual_seed(rule.seed or 0)
    ranks_PK = torch.full((number, heads.num_heads), max_rank)
    for start in range(0, number, _CHUNK):
        stop = min(start + _CHUNK + heads.num_heads, number)
        p_CV = probabilities(backbone.next_logits(hidden_PD[start:stop]), *filters)
        p_CX = p_CV if heads.token_map is None else with_others(p_CV, heads.token_map)
        for k in range(heads.num_heads):
            end = min(start + _CHUNK, number - k - 1)
            if end <= start:
                break
            given = [read_PD[start:end].to(heads.dtype)]
            if heads.sees_tokens:
                given.append(tokens_P.unfold(0, k + 1, 1)[start:end])
            q_CW = probabilities(heads.head_logits(k, *given), *filters)
            q_CX = pad(q_CW, (0, p_CX.shape[1] - q_CW.shape[1]))
            of_k_CX = p_CX[k + 1 : k + 1 + end - start]
            truth_C = places_P[start + k + 1 : end + k + 1]
            ranks_PK[start:end, k] = _ranks(of_k_CX, q_CX, truth_C, max_rank, generator).cpu()
    return ranks_PK.numpy()


def _ranks(
    p_CX: Tensor, q_CX: Tensor, truth_C: Tensor, max_rank: int, generator: torch.Generator
) -> Tensor:
    """Return rank_C: which child is the token that came; outside the head vocabulary none is."""
    left = Rejection(p_CX, q_CX)
    can_be_C1 = (truth_C >= 0)[:, None]
    truth_C1 = truth_C.clamp(min=0)[:, None]
    rank_C = torch.full_like(truth_C, max_rank)
    shape = (len(truth_C), 2, max_rank)
    uniforms_C2R = torch.rand(shape, generator=generator, device=p_CX.device)
    for rank in range(max_rank):
        is_hit_C1 = can_be_C1 & (uniforms_C2R[:, 0, rank, None] < left.share_of(truth_C1))
        is_first_C = is_hit_C1[:, 0] & (rank_C == max_rank)
        rank_C = torch.where(is_first_C, rank, rank_C)
        token_C1 = draw(left.rejected(), uniforms_C2R[:, 1, rank, None])
        left.fail(token_C1)
    return rank_C
