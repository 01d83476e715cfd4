"""Looked-up branches: draft tokens from the text itself, grafted onto the heads' tree.

Where text repeats (an edit, a summary, a quotation) the best guess is what followed the last time.
`Text` finds it on the host, in constant time a token: the continuation after the most recent of the
longest matches of what has just been said. `LookupDrafter` adds it to the tree of another drafter
as a chain of nodes. As far as the heads guess the same tokens the chain goes along with their
nodes, and leaves where they part: no two siblings hold one token, so that every rule of
verification takes such a tree as it is, and no looked-up node is spent on what the heads have.

The rules greedy and sampling are as lossless as without: what a step commits has the backbone's
law whatever is drafted, and a looked-up token is a draft like any other, certain before the draw.

B rows, N nodes of the heads' tree, C nodes of the chain, M = N + C, L = depth of the tree + C.
"""

from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.drafting import Draft, Drafter
from medusa_exp.decode.verify import TreeRelations
from medusa_exp.errors import UserError
from medusa_exp.model.heads import PrefixAttention

_ORDERS = range(1, 5)
"""Lengths of matches that are kept in tables; longer ones are found by following such a match."""


class Text:
    """A prompt and its response so far, and where the end of it was said before."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in _ORDERS]
        """For each order: where the last occurrence of some tokens ends."""
        self._place, self._length = 0, 0
        """What follows the match, and how long that is; 0 where there is none."""
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add what has been said since."""
        for token in tokens:
            self._add(token)

    def _add(self, token: int) -> None:
        said = self._tokens
        is_followed = self._length > 0 and said[self._place] == token
        place, length = (self._place + 1, self._length + 1) if is_followed else (0, 0)
        said.append(token)
        for order, after in zip(_ORDERS, self._after, strict=True):
            if order > len(said):
                break
            last = tuple(said[-order:])
            # A match that is longer than all tables know is followed; else the most recent counts.
            if length <= _ORDERS[-1] and last in after:
                place, length = after[last], order
            after[last] = len(said)
        self._place, self._length = place, length

    def continuation(self, length: int) -> list[int]:
        """Return so many tokens: what followed the match; without one, the last token repeated.

        What is copied may reach into its own beginning: text that goes in circles goes on so.
        """
        start = self._place if self._length else len(self._tokens) - 1
        found = self._tokens[start : start + length]
        while len(found) < length:
            found += found[: length - len(found)]
        return found


def check_draft(draft: str) -> None:
    """Raise a UserError where tokens of the heads are drawn, beside which none is looked up yet."""
    if draft == "sampled":
        raise UserError(
            "decode.draft=sampled draws all tokens of a tree, and tree.lookup adds some that are "
            "not drawn: set tree.lookup=0, or decode.draft=top."
        )


def count_found(prompt: list[int], response: list[int], at_most: int) -> np.ndarray:
    """Return found_P: where token t of a response is certain, how many looked-up tokens come true.

    Args:
        prompt: token ids.
        response: of P tokens.
        at_most: where to stop counting.
    """
    text = Text(prompt)
    found = []
    for place, token in enumerate(response, 1):
        text.extend([token])
        wanted = response[place : place + at_most]
        continued = text.continuation(len(wanted))
        pairs = zip(wanted, continued, strict=True)
        found.append(next((n for n, (a, b) in enumerate(pairs) if a != b), len(wanted)))
    return np.array(found, dtype=np.int64)


class LookupDrafter:
    """Drafts as another drafter does, and grafts a chain of looked-up tokens onto its trees."""

    def __init__(self, drafter: Drafter, num_lookup: int, device: torch.device) -> None:
        """Prepare.

        Args:
            drafter: of the heads' tree.
            num_lookup: nodes of the chain, 1 or more.
            device: where the drafts are.
        """
        self.drafter, self.num_lookup = drafter, num_lookup
        self.num_nodes, self.depth = drafter.num_nodes + num_lookup, drafter.depth + num_lookup
        self.num_uniforms = self.num_nodes
        self.key: Hashable = (drafter.key, num_lookup)
        self.prefix: PrefixAttention | None = drafter.prefix
        self._place_C = torch.arange(num_lookup, device=device)
        self._parent_C = drafter.num_nodes + self._place_C[:-1]
        """Of the second node of the chain on."""
        self._is_above_CC = self._place_C[:, None] >= self._place_C

    def __call__(
        self,
        root_B: Tensor,
        hidden_BD: Tensor,
        uniforms_BU: Tensor | None = None,
        found_BL: Tensor | None = None,
    ) -> Draft:
        """Return trees below the roots; see `Drafter`.

        Args:
            root_B: as for every drafter.
            hidden_BD: as for every drafter.
            uniforms_BU: as for every drafter.
            found_BL: what may follow the roots, `depth` tokens of each row; None repeats the roots.
        """
        if found_BL is None:
            found_BL = root_B[:, None].expand(-1, self.depth)
        return self._graft(self.drafter(root_B, hidden_BD, uniforms_BU), found_BL)

    def _graft(self, draft: Draft, found_BL: Tensor) -> Draft:
        nodes, batch = draft.nodes, len(found_BL)
        depths_BN = draft.depths_BN.expand(batch, -1)
        expected_BN = found_BL.gather(1, (depths_BN - 1).clamp(min=0))
        # The last node up to which the heads guess what has been looked up: the root at least.
        end_B1 = nodes.last(nodes.reached(draft.tokens_BN == expected_BN))
        depth_B1 = depths_BN.gather(1, end_B1)
        added_BC = found_BL.gather(1, depth_B1 + self._place_C)
        parent_BC = torch.cat([end_B1, self._parent_C.expand(batch, -1)], 1)
        parents_BM = torch.cat([draft.parents_BN.expand(batch, -1), parent_BC], 1)
        ancestors_BMM = self._ancestors(nodes.ancestors_BNN.expand(batch, -1, -1), end_B1)
        return Draft(
            torch.cat([draft.tokens_BN, added_BC], 1),
            parents_BM,
            TreeRelations(parents_BM, self.depth, ancestors_BMM),
            torch.cat([depths_BN, depth_B1 + 1 + self._place_C], 1),
        )

    def _ancestors(self, ancestors_BNN: Tensor, end_B1: Tensor) -> Tensor:
        batch, size = ancestors_BNN.shape[:2]
        above_BCN = ancestors_BNN.gather(1, end_B1[..., None].expand(-1, self.num_lookup, size))
        none_BNC = ancestors_BNN.new_zeros(batch, size, self.num_lookup)
        chain_BCC = self._is_above_CC.expand(batch, -1, -1)
        return torch.cat(
            [torch.cat([ancestors_BNN, none_BNC], 2), torch.cat([above_BCN, chain_BCC], 2)], 1
        )


class Found:
    """What has been looked up for the rows of a step, in a tensor of one place and shape.

    Written before the step, so that a captured one reads it; that waits for nothing: the host
    writes again only after it has read the outcome of the step.
    """

    def __init__(self, drafter: Drafter, num_rows: int, device: torch.device) -> None:
        self.width = drafter.depth if isinstance(drafter, LookupDrafter) else 0
        """Tokens that are wanted for each row: none of a drafter that does not look up."""
        self._host_BL = torch.zeros(num_rows, self.width, dtype=torch.long)
        if device.type == "cuda":
            self._host_BL = self._host_BL.pin_memory()
        self.tokens_BL = self._host_BL.to(device, copy=True)
        self._drafter = drafter

    def write(self, rows: list[int], tokens: list[list[int]]) -> None:
        """Put tokens into these rows."""
        self._host_BL[torch.tensor(rows)] = torch.tensor(tokens)
        self.tokens_BL.copy_(self._host_BL, non_blocking=True)

    def draft(self, root_B: Tensor, hidden_BD: Tensor, uniforms_BU: Tensor | None) -> Draft:
        """Return what the drafter makes of this, and of what was found."""
        if isinstance(self._drafter, LookupDrafter):
            return self._drafter(root_B, hidden_BD, uniforms_BU, self.tokens_BL[: len(root_B)])
        return self._drafter(root_B, hidden_BD, uniforms_BU)
