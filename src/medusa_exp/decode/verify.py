"""Verification in torch, the specification: which draft tokens of a tree are accepted.

Three rules, one signature. `greedy` and `sampling` are lossless: what is committed is distributed
as if the backbone had generated it token by token (with `drawn`: together with what follows).
`typical` is Medusa's acceptance, which is not. Drafts that were sampled (`drawn`) go through
`decode/traversal.py`; others are taken as given.
`decode/cpu_verify.py` does the same faster where tensors lie in the host's memory, and the kernels
of `decode/cuda/verify.py` on a GPU.

A logit that is NaN counts as minus infinity. B batch, N tree nodes, V vocabulary, L path length. No
operation of `verify` waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.sampled import Drawn
from medusa_exp.decode.traversal import traverse
from medusa_exp.model.argmax import argmax

RULES = ("greedy", "sampling", "typical")


@dataclass
class Verdict:
    """The accepted path of each row of the batch."""

    path_BL: Tensor
    """Node numbers from the root (node 0) down, then -1."""
    num_accepted_B: Tensor
    """Draft tokens accepted: the path's nodes without the root."""
    next_token_B: Tensor
    """The backbone's own token after the path."""


def verify(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor,
    *,
    rule: str = "greedy",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniforms_BN: Tensor | None = None,
    epsilon: float = 0.09,
    alpha: float = 0.3,
    max_depth: int | None = None,
    nodes: "TreeRelations | None" = None,
    drawn: Drawn | None = None,
) -> Verdict:
    """Find the path of draft tokens that are accepted, and the token that follows it.

    greedy: the token after a node is its argmax, the lowest id where several tie. The outcome is
    that of step-by-step greedy decoding on the same logits.

    sampling: the token after a node is drawn from the backbone's distribution there by one uniform
    number, with the children's tokens first in the order of the draw. It is child c with
    probability p(c) and any other token x with p(x): what comes out is distributed by p, whatever
    is drafted, and no lossless rule accepts more of drafts that are not random. Of drafts that are,
    more pass: with `drawn`, whole paths are verified as `decode.traversal` says. A node's number
    decides whether it is kept, and the root's draws the token after the path.

    typical: a draft token x is accepted if p(x) > min(epsilon, alpha * exp(-entropy)) after its
    parent; of the accepted paths the longest counts, of these the likeliest, of these the first.
    The token after it is the argmax. (Medusa, section 2.3.1, with the defaults of the reference.)
    Lossy.

    Of siblings that hold the same token, the first counts.

    Args:
        logits_BNV: the backbone's logits after each node.
        tokens_BN: each node's token, 0..V-1; the root's is never compared. (The kernels also take
            tokens beyond V, and never accept them.)
        parents_BN: each node's parent, standing before it; -1 for the root, and for padding.
        rule: one of `RULES`.
        temperature: divides the logits for sampling and typical; above 0.
        top_k: sampling draws from the k likeliest tokens, and those that tie with the last.
        top_p: sampling draws from the likeliest tokens that together have this probability.
        uniforms_BN: for sampling, a number in [0, 1) for each node; more of them are not read.
        epsilon: of typical, the highest threshold.
        alpha: of typical, the factor on exp(-entropy).
        max_depth: depth of the deepest tree; N - 1 unless the caller knows better.
        nodes: what has been prepared of `parents_BN` before.
        drawn: for sampling, where the children were drawn from; None if they were not drawn.

    Raises:
        ValueError: the rule is not known, or lacks what it needs.
    """
    check_rule(rule, temperature, uniforms_BN)
    nodes = nodes or TreeRelations(parents_BN, max_depth)
    if rule == "greedy":
        return _greedy(logits_BNV, tokens_BN, nodes)
    if rule == "typical":
        return _typical(logits_BNV, tokens_BN, nodes, temperature, epsilon, alpha)
    assert uniforms_BN is not None
    if drawn is not None:
        filters = temperature, top_k, top_p
        end_B1, next_token_B = traverse(logits_BNV, tokens_BN, drawn, uniforms_BN, filters)
        return nodes.verdict(nodes.path_to(end_B1), next_token_B)
    p_BNV = probabilities(logits_BNV, temperature, top_k, top_p)
    return _sampling(p_BNV, tokens_BN, nodes, uniforms_BN)


def check_rule(rule: str, temperature: float, uniforms_BN: Tensor | None) -> None:
    """See that a rule has what it needs; arguments as for `verify`.

    Raises:
        ValueError: the rule is not known, or lacks what it needs.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule} is not known: use one of {', '.join(RULES)}.")
    if rule != "greedy" and not temperature > 0:
        raise ValueError(f"rule={rule} needs a temperature above 0; at 0, use rule=greedy.")
    if rule == "sampling" and uniforms_BN is None:
        raise ValueError("rule=sampling needs uniforms_BN, a number in [0, 1) for each node.")


class TreeRelations:
    """What every rule asks of the trees of a batch, whatever their tokens.

    Where all rows have the same tree, B may be 1: it can then be kept from step to step.
    """

    def __init__(
        self, parents_BN: Tensor, max_depth: int | None = None, ancestors_BNN: Tensor | None = None
    ) -> None:
        """Prepare.

        Args:
            parents_BN: as for `verify`.
            max_depth: as for `verify`.
            ancestors_BNN: [b, n, m], is m an ancestor of n, or n itself? None to find it here.
        """
        self.size = parents_BN.shape[1]
        self.depth = self.size - 1 if max_depth is None else max_depth
        self.is_child_BN = parents_BN >= 0
        self.parent_BN = parents_BN.clamp(min=0)
        self.number_N = torch.arange(self.size, device=parents_BN.device)
        if ancestors_BNN is None:
            ancestors_BNN = self._find_ancestors()
        self.ancestors_BNN = ancestors_BNN
        is_sibling_BNN = parents_BN[:, :, None] == parents_BN[:, None, :]
        self.is_elder_BNN = is_sibling_BNN.tril(-1)
        """[b, n, m]: is m an elder sibling of n?"""

    def at_parent(self, values_BN: Tensor) -> Tensor:
        """Return for each node its parent's value."""
        return values_BN.gather(1, self.parent_BN.expand_as(values_BN))

    def without_elder(self, is_right_BN: Tensor) -> Tensor:
        """Keep of right siblings the first."""
        return is_right_BN & ~(self.is_elder_BNN & is_right_BN[:, None, :]).any(-1)

    def reached(self, is_right_BN: Tensor) -> Tensor:
        """Return which nodes are right together with all their ancestors; the root is."""
        is_right_BN = is_right_BN & self.is_child_BN
        is_right_BN[:, 0] = True
        return (is_right_BN[:, None, :] | ~self.ancestors_BNN).all(-1)

    def verdict(self, is_on_path_BN: Tensor, next_token_B: Tensor) -> Verdict:
        """Return the verdict that the marked nodes, root included, are the path."""
        # Parents stand before children: a path is its nodes in order of their numbers.
        path_BN = torch.where(is_on_path_BN, self.number_N, self.size).sort(dim=1).values
        path_BL = path_BN[:, : self.depth + 1]
        path_BL = path_BL.masked_fill(path_BL == self.size, -1)
        return Verdict(path_BL, is_on_path_BN.sum(1) - 1, next_token_B)

    def path_to(self, end_B1: Tensor) -> Tensor:
        """Return which nodes are on the path to one [B, N], the root and the node itself too."""
        end_B1N = end_B1[..., None].expand(-1, 1, self.size)
        return self.ancestors_BNN.expand(len(end_B1), -1, -1).gather(1, end_B1N)[:, 0]

    def last(self, is_on_path_BN: Tensor) -> Tensor:
        """Return the path's deepest node [B, 1]."""
        return (is_on_path_BN * self.number_N).amax(1, keepdim=True)

    def _find_ancestors(self) -> Tensor:
        is_self_NN = self.number_N[:, None] == self.number_N
        is_parent_BNN = self.parent_BN[:, :, None] == self.number_N
        way_BNN = is_self_NN | (is_parent_BNN & self.is_child_BN[:, :, None])
        # After r rounds a node knows its 2^r nearest ancestors.
        for _ in range(self.depth.bit_length()):
            way_BNN = (way_BNN.float() @ way_BNN.float()) > 0
        return way_BNN


def _greedy(logits_BNV: Tensor, tokens_BN: Tensor, nodes: TreeRelations) -> Verdict:
    target_BN = argmax(logits_BNV)
    is_right_BN = (tokens_BN == nodes.at_parent(target_BN)) & nodes.is_child_BN
    is_on_path_BN = nodes.reached(nodes.without_elder(is_right_BN))
    next_token_B1 = target_BN.gather(1, nodes.last(is_on_path_BN))
    return nodes.verdict(is_on_path_BN, next_token_B1[:, 0])


def _sampling(
    p_BNV: Tensor, tokens_BN: Tensor, nodes: TreeRelations, uniforms_BN: Tensor
) -> Verdict:
    p_BN = _child_probability(p_BNV, tokens_BN, nodes)
    # A parent's interval [0, 1) holds its children first: n ends where the sum up to it does.
    is_elder_BNN = nodes.is_elder_BNN.to(p_BN.dtype).expand(len(p_BN), -1, -1)
    end_BN = torch.einsum("bnm,bm->bn", is_elder_BNN, p_BN) + p_BN
    is_drawn_BN = (nodes.at_parent(uniforms_BN) < end_BN) & (p_BN > 0)
    is_on_path_BN = nodes.reached(nodes.without_elder(is_drawn_BN))
    last_B1 = nodes.last(is_on_path_BN)
    is_child_BN = (nodes.parent_BN == last_B1) & nodes.is_child_BN
    rest_BV = p_BNV.gather(1, last_B1[..., None].expand(-1, 1, p_BNV.shape[2]))[:, 0]
    likeliest_B = argmax(rest_BV)
    # Padding rewrites a token that is nobody's: it adds nothing to `taken`.
    taken_BV = torch.zeros_like(rest_BV).scatter_add_(1, tokens_BN, is_child_BN.to(rest_BV.dtype))
    rest_BV = rest_BV.masked_fill(taken_BV > 0, 0.0)
    place_B1 = uniforms_BN.gather(1, last_B1) - (end_BN * is_child_BN).amax(1, keepdim=True)
    drawn_B = (rest_BV.cumsum(-1) <= place_B1).sum(-1)
    token_V = torch.arange(rest_BV.shape[1], device=rest_BV.device)
    # Rounding may leave a place behind the last token, or no token at all.
    final_B = torch.where(rest_BV > 0, token_V, -1).amax(-1)
    next_token_B = torch.where(final_B < 0, likeliest_B, drawn_B.minimum(final_B))
    return nodes.verdict(is_on_path_BN, next_token_B)


def _typical(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    nodes: TreeRelations,
    temperature: float,
    epsilon: float,
    alpha: float,
) -> Verdict:
    p_BNV = probabilities(logits_BNV, temperature)
    entropy_BN = torch.special.entr(p_BNV).sum(-1)
    threshold_BN = (alpha * (-entropy_BN).exp()).clamp(max=epsilon)
    p_BN = _child_probability(p_BNV, tokens_BN, nodes)
    is_reached_BN = nodes.reached(p_BN > nodes.at_parent(threshold_BN))
    way_BNN = nodes.ancestors_BNN.expand(len(p_BN), -1, -1)
    length_BN = way_BNN.sum(-1).masked_fill(~is_reached_BN, 0)
    is_longest_BN = length_BN == length_BN.amax(1, keepdim=True)
    step_BN = torch.where(is_reached_BN & nodes.is_child_BN, p_BN, 1.0).log()
    score_BN = torch.einsum("bnm,bm->bn", way_BNN.to(step_BN.dtype), step_BN)
    end_B1 = score_BN.masked_fill(~is_longest_BN, -torch.inf).argmax(1, keepdim=True)
    return nodes.verdict(nodes.path_to(end_B1), argmax(logits_BNV).gather(1, end_B1)[:, 0])


def _child_probability(p_BNV: Tensor, tokens_BN: Tensor, nodes: TreeRelations) -> Tensor:
    """Return [B, N], each node's probability after its parent: 0 for the root, padding and copies.

    A copy is a node whose token an elder sibling holds.
    """
    is_same_BNN = tokens_BN[:, :, None] == tokens_BN[:, None, :]
    is_copy_BN = (nodes.is_elder_BNN & is_same_BNN).any(-1)
    place_BN = nodes.parent_BN * p_BNV.shape[2] + tokens_BN
    p_BN = p_BNV.flatten(1).gather(1, place_BN)
    return p_BN.masked_fill(~nodes.is_child_BN | is_copy_BN, 0.0)
