"""Drafters: the heads' draft tokens, filled into the tree that a step checks.

`FixedTreeDrafter` fills the same tree at every step, `DynamicTreeDrafter` picks the likeliest nodes
of a larger one, and `SequentialDrafter` is for heads that see the draft tokens before theirs: it
fills one depth after the other. Trees that stay the same take the heads' likeliest tokens, or draw
(`decode/sampled.py`): a rank is then the place in the draw.

B rows, D hidden, V vocabulary, W tokens of the head vocabulary, K heads, N tree nodes, R ranks, U
numbers to draw by. Of a dynamic tree, M nodes to choose from. Of sequential heads, M nodes of one
depth that have children, J tokens from the root to a node, Q = B x M states that a head reads.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from medusa_exp.decode.cuda.topk import can_pick
from medusa_exp.decode.rule import GREEDY, AcceptanceRule, pick_draw, pick_probabilities, pick_topk
from medusa_exp.decode.sampled import LEAST_DRAWN, Drawn, children_of, in_draw_order
from medusa_exp.decode.verify import TreeRelations
from medusa_exp.errors import UserError
from medusa_exp.model.heads import (
    FAMILIES,
    MedusaHeads,
    PrefixAttention,
    StackedHeads,
    from_head_places,
    head_vocabulary,
)
from medusa_exp.tree import Tree, chain


@dataclass(frozen=True)
class Draft:
    """A tree of draft tokens for each row; what is the same in all rows has B = 1."""

    tokens_BN: Tensor
    parents_BN: Tensor
    nodes: TreeRelations
    """What verification wants to know of the parents."""
    depths_BN: Tensor
    drawn: Drawn | None = None
    """What the tokens were drawn from, where they were."""

    @property
    def ancestors_BNN(self) -> Tensor:
        """[b, n, m]: is m an ancestor of n, or n itself?"""
        return self.nodes.ancestors_BNN


class Drafter(Protocol):
    """Makes a draft of `num_nodes` nodes a row, none deeper than `depth`."""

    num_nodes: int
    depth: int
    num_uniforms: int
    """Numbers that a step of sampling draws by: one a node, then those of the drafter's own."""
    key: Hashable
    """Equal for drafters that do the same."""
    prefix: PrefixAttention | None
    """What the hidden states that it is given have to go through."""

    def __call__(
        self, root_B: Tensor, hidden_BD: Tensor, uniforms_BU: Tensor | None = None
    ) -> Draft:
        """Return trees below the roots.

        Args:
            root_B: the token that follows for sure.
            hidden_BD: the backbone's last hidden state one position before it, or what `prefix`
                makes of that.
            uniforms_BU: `num_uniforms` numbers in [0, 1), for what draws.
        """
        ...


def check_tree_fits_heads(depth: int, num_ranks: int, num_heads: int, width: int) -> None:
    """Raise a UserError where a tree asks for draft tokens that the heads do not have.

    Args:
        depth: of the tree.
        num_ranks: most children of a node that one head drafts.
        num_heads: K.
        width: tokens that a head has logits of.
    """
    if depth > num_heads:
        raise UserError(f"the tree is {depth} guesses deep, and there are {num_heads} heads.")
    if num_ranks > width:
        raise UserError(f"the tree asks for guess {num_ranks} of a head, and it has {width}.")


_NO_CHANCE = -1e4
"""Log of a probability that is none. Sums over a path still tell 1e-9 apart in float64."""


class _Draws:
    """Draws the tokens of a tree that stays the same, after the rule's temperature and filters.

    M nodes of a depth have children, R at most; each draws so many by numbers of its own (why:
    `decode/traversal.py`).
    """

    def __init__(self, rule: AcceptanceRule, tree: Tree, device: torch.device) -> None:
        self._draw = pick_draw(rule.verifier, device)
        self._probabilities = pick_probabilities(rule.verifier, device)
        self._filters = rule.temperature, rule.top_k, rule.top_p
        self._num_nodes, self._children = len(tree), children_of(tree)
        self._inner: list[list[int]] = [[] for _ in range(tree.depth)]
        """Nodes that have children, by depth."""
        for node, children in enumerate(self._children):
            if children:
                self._inner[tree.depths[node]].append(node)
        self._num_ranks = [
            max(len(self._children[node]) for node in nodes) for nodes in self._inner
        ]
        """R, by depth."""
        by_depth = [len(nodes) * ranks for nodes, ranks in self._by_depth()]
        self._starts = [sum(by_depth[:depth]) for depth in range(tree.depth)]
        self.number = sum(by_depth)

    def _by_depth(self) -> Iterator[tuple[list[int], int]]:
        return zip(self._inner, self._num_ranks, strict=True)

    def places(self, tree: Tree) -> np.ndarray:
        """Return where each node's token stands in [root, the draws of each inner node]."""
        first, start = {}, 1
        for nodes, num_ranks in self._by_depth():
            for node in nodes:
                first[node], start = start, start + num_ranks
        pairs = zip(tree.parents[1:], tree.ranks[1:], strict=True)
        return np.array([0, *(first[parent] + rank for parent, rank in pairs)])

    def distributions(self, logits_BMW: Tensor) -> Tensor:
        """Return the distributions that draws are from, of the heads' logits."""
        q = self._probabilities(logits_BMW, *self._filters)
        return q.where(q >= LEAST_DRAWN, 0.0)

    def of_depth(self, q: Tensor, uniforms_BU: Tensor, depth: int) -> Tensor:
        """Return draws [B, M, R] from q [B, M, W], or [B, 1, W] where it is the same for all M;
        depth 0 is that of head 1."""
        shape = count, num_ranks = len(self._inner[depth]), self._num_ranks[depth]
        start = self._num_nodes + self._starts[depth]
        uniforms_BMR = uniforms_BU[:, start : start + count * num_ranks].unflatten(1, shape)
        return self._draw(q.expand(-1, count, -1), uniforms_BMR)

    def record(self, q_by_depth: Sequence[Tensor], token_map: Tensor | None) -> Drawn:
        """Return what a step's tokens were drawn from: q of each depth, as `of_depth` has it."""
        q_index, start = [0] * self._num_nodes, 0
        for nodes, q in zip(self._inner, q_by_depth, strict=True):
            for place, node in enumerate(nodes):
                q_index[node] = start + min(place, q.shape[1] - 1)
            start += q.shape[1]
        return Drawn(torch.cat(q_by_depth, 1), tuple(q_index), self._children, token_map)


def key_of_rule(rule: AcceptanceRule) -> Hashable:
    """Return what of a rule decides how a drafter drafts, and by which kernels."""
    if rule.draft == "top":
        return rule.verifier
    return rule.verifier, rule.temperature, rule.top_k, rule.top_p


class _SameTreeDrafter:
    """What drafters have in common that fill the same tree at every step."""

    def __init__(
        self, heads: nn.Module, tree: Tree, device: torch.device, rule: AcceptanceRule
    ) -> None:
        self._draws: _Draws | None = None
        if rule.draft == "sampled" and tree.depth:
            tree = in_draw_order(tree)
            self._draws = _Draws(rule, tree, device)
        self._tree = tree
        self.num_nodes, self.depth = len(tree), tree.depth
        self.num_uniforms = len(tree) + (self._draws.number if self._draws else 0)
        self._heads = heads
        self.prefix = getattr(heads, "prefix", None) if self.depth else None
        key_of_heads = id(heads) if self.depth else None
        self.key: Hashable = (key_of_heads, self._tree, key_of_rule(rule))
        needs_topk = self.depth and self._draws is None
        self._topk = pick_topk(rule.verifier, device) if needs_topk else None
        self._parents_1N = torch.tensor([self._tree.parents], device=device)
        ancestors_1NN = torch.from_numpy(self._tree.mask).to(device)[None]
        self._nodes = TreeRelations(self._parents_1N, self.depth, ancestors_1NN)
        self._depths_1N = torch.from_numpy(self._tree.depths).to(device)[None]

    def _filled(self, tokens_BN: Tensor, q_by_depth: Sequence[Tensor]) -> Draft:
        """Return the tree with its tokens, and what they were drawn from, if they were."""
        drawn = None
        if self._draws is not None:
            drawn = self._draws.record(q_by_depth, head_vocabulary(self._heads))
        parents_BN = self._parents_1N.expand(len(tokens_BN), -1)
        return Draft(tokens_BN, parents_BN, self._nodes, self._depths_1N, drawn)


class FixedTreeDrafter(_SameTreeDrafter):
    """Fills the same tree with the heads' draft tokens at every step."""

    def __init__(
        self,
        heads: nn.Module,
        tree: Tree,
        device: torch.device,
        rule: AcceptanceRule = GREEDY,
    ) -> None:
        super().__init__(heads, tree, device, rule)
        tree, draws = self._tree, self._draws
        self._num_ranks = max(tree.ranks) + 1
        places = _places(tree, self._num_ranks) if draws is None else draws.places(tree)
        self._place_N = torch.from_numpy(places).to(device)
        self._drafted_N = self._place_N - 1

    def __call__(
        self, root_B: Tensor, hidden_BD: Tensor, uniforms_BU: Tensor | None = None
    ) -> Draft:
        tokens_B1 = root_B[:, None]
        if not self.depth:
            return self._filled(tokens_B1, ())
        logits_BKW = _head_logits(self._heads, hidden_BD, root_B, self.depth, self._num_ranks)
        if self._topk is not None and can_pick(logits_BKW, self._num_ranks):
            tokens_BN = tokens_B1.repeat(1, self.num_nodes)
            names = head_vocabulary(self._heads)
            self._topk(tokens_BN, logits_BKW, self._drafted_N, self._num_ranks, names)
            return self._filled(tokens_BN, ())
        q_by_depth: Sequence[Tensor] = ()
        if self._draws is None:
            found = logits_BKW.topk(self._num_ranks, dim=-1).indices.flatten(1)
        else:
            assert uniforms_BU is not None
            q_by_depth = self._draws.distributions(logits_BKW).split(1, dim=1)
            draws = [
                self._draws.of_depth(q_B1W, uniforms_BU, depth).flatten(1)
                for depth, q_B1W in enumerate(q_by_depth)
            ]
            found = torch.cat(draws, 1)
        drafted_BR = from_head_places(self._heads, found)
        tokens_BN = torch.cat([tokens_B1, drafted_BR], dim=1)[:, self._place_N]
        return self._filled(tokens_BN, q_by_depth)


def root_only(device: torch.device) -> Drafter:
    """Return the drafter that drafts nothing: steps over it decode plainly."""
    return FixedTreeDrafter(nn.Identity(), chain(0), device)


class DynamicTreeDrafter:
    """Picks, at every step and for every row, the likeliest nodes of a larger tree.

    A node is as likely as the product of the probabilities on its path; parents are likelier than
    their children, so that the N likeliest nodes are a tree, and the best one of N nodes if the
    heads' probabilities are right and their errors independent. (EAGLE-2, arXiv 2406.16858, ranks
    its drafts by the same product.)
    """

    def __init__(
        self, heads: nn.Module, choices: Tree, num_nodes: int, device: torch.device
    ) -> None:
        """Pick from a tree.

        Args:
            heads: any module with `heads(hidden_BD) -> logits_BKV`.
            choices: the tree to pick from.
            num_nodes: how many nodes to pick, the root included.
            device: where to.
        """
        self.num_nodes, self.depth = min(num_nodes, len(choices)), choices.depth
        self.num_uniforms = self.num_nodes
        self._heads = heads
        self.prefix = getattr(heads, "prefix", None)
        self.key: Hashable = (id(heads), choices, num_nodes)
        self._num_ranks = max(choices.ranks) + 1
        self._place_M = torch.from_numpy(_places(choices, self._num_ranks)).to(device)
        self._parent_M = torch.tensor(choices.parents, device=device).clamp(min=0)
        self._ancestors_MM = torch.from_numpy(choices.mask).to(device)
        self._depth_M = torch.from_numpy(choices.depths).to(device)

    def __call__(
        self, root_B: Tensor, hidden_BD: Tensor, uniforms_BU: Tensor | None = None
    ) -> Draft:
        logits_BKW = _head_logits(self._heads, hidden_BD, root_B, self.depth, self._num_ranks)
        top = logits_BKW.topk(self._num_ranks, dim=-1)
        log_sum_BK1 = logits_BKW.float().logsumexp(-1, keepdim=True)
        log_p_BKR = top.values.double() - log_sum_BK1.double()
        draft_BR = from_head_places(self._heads, top.indices).flatten(1)
        tokens_BM = torch.cat([root_B[:, None], draft_BR], 1)[:, self._place_M]
        # Minus infinity times 0, and NaN, would make every score of the row NaN.
        values_BKR = log_p_BKR.nan_to_num(nan=_NO_CHANCE).clamp(min=_NO_CHANCE, max=0)
        # A root is certain. Equal numbers (one of probability 1) must leave parents first.
        zero_B1 = values_BKR.new_zeros(len(root_B), 1)
        step_BM = torch.cat([zero_B1, values_BKR.flatten(1)], 1)[:, self._place_M] - 1e-9
        score_BM = step_BM @ self._ancestors_MM.T.to(step_BM.dtype)
        node_BN = score_BM.topk(self.num_nodes, dim=1).indices.sort(dim=1).values
        place_BM = torch.zeros_like(score_BM, dtype=torch.long).scatter_(
            1, node_BN, torch.arange(self.num_nodes, device=node_BN.device).expand_as(node_BN)
        )
        parents_BN = place_BM.gather(1, self._parent_M[node_BN])
        parents_BN[:, 0] = -1
        ancestors_BNN = self._ancestors_MM[node_BN[:, :, None], node_BN[:, None, :]]
        return Draft(
            tokens_BM.gather(1, node_BN),
            parents_BN,
            TreeRelations(parents_BN, self.depth, ancestors_BNN),
            self._depth_M[node_BN],
        )


def build_drafter(
    heads: nn.Module, tree: Tree, device: torch.device, rule: AcceptanceRule = GREEDY
) -> Drafter:
    """Return what makes drafts of a tree: the same at every step, or some picked nodes of it.

    Args:
        heads: that draft.
        tree: the shape.
        device: where to.
        rule: says whether tokens are drawn, and how.

    Raises:
        UserError: nodes are to be picked, and each head waits for the one before, or their tokens
            are to be drawn.
    """
    is_sequential = bool(getattr(heads, "is_sequential", False))
    if tree.num_picked is not None:
        kind = heads.config.kind if is_sequential else None
        check_picks(kind, rule.draft)
    if is_sequential:
        return SequentialDrafter(heads, tree, device, rule)
    if tree.num_picked is None or tree.num_picked == 1:
        return FixedTreeDrafter(heads, tree if tree.num_picked is None else chain(0), device, rule)
    return DynamicTreeDrafter(heads, tree, tree.num_picked, device)


def check_picks(kind: str | None, draft: str) -> None:
    """Ask whether heads of this family (None: any that run side by side) can have nodes picked.

    Raises:
        UserError: each head waits for the one before, or their tokens are drawn.
    """
    if draft == "sampled":
        raise UserError(
            "tree=dynamic picks the likeliest nodes, and decode.draft=sampled draws them: a node "
            "that was picked for its token is no draw. Set tree=calibrated, or decode.draft=top."
        )
    if kind in FAMILIES and FAMILIES[kind].is_sequential:
        raise UserError(
            f"tree=dynamic: heads of kind={kind} cannot guess ahead of a choice. Set "
            "tree=calibrated, or train heads of another kind (head=rooted, medusa)."
        )


def _places(tree: Tree, num_ranks: int) -> np.ndarray:
    """Return where each node's token stands in [root, head 1's draft tokens, head 2's, ...]."""
    place_N = 1 + (tree.depths - 1) * num_ranks + np.array(tree.ranks)
    place_N[0] = 0
    return place_N


def _head_logits(
    heads: nn.Module, hidden_BD: Tensor, root_B: Tensor, depth: int, num_ranks: int
) -> Tensor:
    """Return logits_BKW of as many heads as the tree is deep; heads of others have W = V."""
    if isinstance(heads, MedusaHeads | StackedHeads):  # deeper heads need not be read
        states_BD, count = hidden_BD.to(heads.dtype), min(depth, heads.num_heads)
        logits_BKW = heads(states_BD, count, root_B, in_head_vocab=True)
    else:
        logits_BKW = heads(hidden_BD)
        if logits_BKW.ndim != 3:
            raise ValueError(
                f"heads(hidden_BD) must return [B, K, V], not {list(logits_BKW.shape)}."
            )
    check_tree_fits_heads(depth, num_ranks, *logits_BKW.shape[1:])
    return logits_BKW[:, :depth]


@dataclass(frozen=True)
class _Depth:
    """How the nodes of one depth are drafted."""

    path_MJ: Tensor
    """Nodes from the root to each parent, which is the last of them."""
    above_M: Tensor | None
    """Place of each parent's own parent among the M of the depth before; the root has itself. None
    where these are all M, in order."""
    children_C: Tensor
    parent_C: Tensor
    """Place of each child's parent among the M."""
    rank_C: Tensor
    places_N: Tensor
    """Of each node, the place of its parent times `num_ranks`, and its rank; else -1."""
    num_ranks: int


class SequentialDrafter(_SameTreeDrafter):
    """Fills the same tree at every step, each draft token with those before it in view."""

    _heads: MedusaHeads

    def __init__(
        self,
        heads: MedusaHeads,
        tree: Tree,
        device: torch.device,
        rule: AcceptanceRule = GREEDY,
    ) -> None:
        """Plan the tree's depths; `rule` as for `build_drafter`.

        Raises:
            UserError: it asks for draft tokens that the heads lack.
        """
        check_tree_fits_heads(
            tree.depth, max(tree.ranks) + 1, heads.num_heads, heads.config.head_vocab_size
        )
        super().__init__(heads, tree, device, rule)
        self._depths = [_plan(self._tree, depth, device) for depth in range(1, self.depth + 1)]

    def __call__(
        self, root_B: Tensor, hidden_BD: Tensor, uniforms_BU: Tensor | None = None
    ) -> Draft:
        tokens_BN = root_B[:, None].repeat(1, self.num_nodes)
        hidden_BD = hidden_BD.to(self._heads.dtype)
        state_BMD = hidden_BD[:, None]
        q_by_depth: list[Tensor] = []
        for k, plan in enumerate(self._depths):
            if self._heads.is_recurrent:
                above_BMD = state_BMD if plan.above_M is None else state_BMD[:, plan.above_M]
                state_BMD = self._heads.advance(above_BMD, tokens_BN[:, plan.path_MJ[:, -1]])
                logits_QW = self._heads.lm_heads(k, state_BMD.flatten(0, 1))
            else:
                drafted_BMJ = tokens_BN[:, plan.path_MJ]
                hidden_QD = hidden_BD.repeat_interleave(drafted_BMJ.shape[1], 0)
                logits_QW = self._heads.head_logits(k, hidden_QD, drafted_BMJ.flatten(0, 1))
            logits_BMW = logits_QW.view(len(tokens_BN), len(plan.path_MJ), -1)
            if self._topk is not None and can_pick(logits_BMW, plan.num_ranks):
                names = head_vocabulary(self._heads)
                self._topk(tokens_BN, logits_BMW, plan.places_N, plan.num_ranks, names)
                continue
            if self._draws is None:
                found_BMR = logits_BMW.topk(plan.num_ranks).indices
            else:
                assert uniforms_BU is not None
                q_by_depth.append(self._draws.distributions(logits_BMW))
                found_BMR = self._draws.of_depth(q_by_depth[-1], uniforms_BU, k)
            drafted_BMR = from_head_places(self._heads, found_BMR)
            tokens_BN[:, plan.children_C] = drafted_BMR[:, plan.parent_C, plan.rank_C]
        return self._filled(tokens_BN, q_by_depth)


def _plan(tree: Tree, depth: int, device: torch.device) -> _Depth:
    children = [node for node in range(len(tree)) if tree.depths[node] == depth]
    parents = sorted({tree.parents[node] for node in children})
    before = sorted(
        {max(tree.parents[n], 0) for n in range(len(tree)) if tree.depths[n] == depth - 1}
    )
    above = [before.index(max(tree.parents[parent], 0)) for parent in parents]
    of_children = [parents.index(tree.parents[node]) for node in children]
    ranks = [tree.ranks[node] for node in children]
    places, num_ranks = np.full(len(tree), -1), max(ranks) + 1
    places[children] = np.array(of_children) * num_ranks + ranks
    return _Depth(
        torch.tensor(
            [tree.mask[parent].nonzero()[0].tolist() for parent in parents], device=device
        ),
        None if above == [*range(len(before))] else torch.tensor(above, device=device),
        torch.tensor(children, device=device),
        torch.tensor(of_children, device=device),
        torch.tensor(ranks, device=device),
        torch.from_numpy(places).to(device),
        num_ranks,
    )
