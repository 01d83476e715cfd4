"""A step of tree decoding: propose, run the backbone on the tree, verify, commit.

Two ways with one interface. `GrowingStep` has tensors of the sizes that are needed, and looks at
the outcome on the host to know them. `static_step.StaticStep` has the same sizes at every step.

B rows, N tree nodes, L path length, D hidden.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from medusa_exp.decode.cache import TreeCache
from medusa_exp.decode.draft import Draft, Proposer
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import Judge
from medusa_exp.decode.verify import Verdict
from medusa_exp.model.backbone import Backbone


class Step(Protocol):
    """Decodes one accepted path a row at each call."""

    cache: Any
    """To be filled with the prompts before `begin`."""
    judge: Judge

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        """Begin after the prompts.

        Args:
            root_B: the token after each prompt.
            hidden_BD: the hidden state that gave it.
            last: the last position that the model has for these prompts.
        """
        ...

    def advance(self) -> list[list[int]]:
        """Return the tokens that each active row commits."""
        ...

    def keep(self, places: list[int]) -> None:
        """Go on with some of the active rows alone."""
        ...


class GrowingStep:
    """A step whose tensors grow with the longest row, and shrink with the number of rows."""

    def __init__(
        self,
        backbone: Backbone,
        propose: Proposer,
        judge: Judge,
        cache: TreeCache,
        mask: StepMask,
    ) -> None:
        self.backbone, self.propose, self.judge = backbone, propose, judge
        self.cache, self.mask = cache, mask

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        """Begin after the prompts; see `Step`."""
        self.root_B, self.hidden_BD, self.last = root_B, hidden_BD, last

    def advance(self) -> list[list[int]]:
        """Return the tokens that each row commits; see `Step`."""
        draft = self.propose(self.root_B, self.hidden_BD)
        logits_BNV, hidden_BND = self.backbone.forward(
            draft.tokens_BN,
            self.cache,
            mask=self.mask.at(self.cache.lengths, draft.ancestors_BNN, draft.depths_BN),
            position_ids_BN=positions(self.cache.lengths, draft.depths_BN, self.last),
        )
        verdict = self.judge(
            logits_BNV, draft.tokens_BN, draft.parents_BN, self.propose.depth, draft.nodes
        )
        self.root_B, self.hidden_BD = verdict.next_token_B, at_end(hidden_BND, verdict)
        # The step's one wait for the device.
        said, paths = read_outcome(outcome(draft, verdict).tolist())
        self.cache.commit(paths)
        return said

    def keep(self, places: list[int]) -> None:
        """Drop the other rows from the cache and from the step's tensors; see `Step`."""
        if len(places) == len(self.root_B) or not places:
            return
        self.cache.keep_rows(places)
        index = torch.tensor(places, device=self.root_B.device)
        self.root_B, self.hidden_BD = self.root_B[index], self.hidden_BD[index]


def positions(lengths: list[int], depths_BN: Tensor, last: int) -> Tensor:
    """Return position_BN of each node, of which the model has none after `last`.

    Guesses beyond it are clamped: none of them can be accepted, for answers end before.
    """
    lengths_B1 = torch.tensor(lengths, device=depths_BN.device)[:, None]
    return (lengths_B1 + depths_BN).clamp(max=last)


def at_end(hidden_BND: Tensor, verdict: Verdict) -> Tensor:
    """Return hidden_BD of the last node of each path."""
    last_B1 = verdict.path_BL.gather(1, verdict.num_accepted_B[:, None])
    return hidden_BND.gather(1, last_B1[..., None].expand(-1, 1, hidden_BND.shape[2]))[:, 0]


def outcome(draft: Draft, verdict: Verdict) -> Tensor:
    """Return [B, 2 + 2 L]: next token, guesses accepted, path, and the tokens on it."""
    said_BL = draft.tokens_BN.gather(1, verdict.path_BL.clamp(min=0))
    heads = (verdict.next_token_B[:, None], verdict.num_accepted_B[:, None])
    return torch.cat([*heads, verdict.path_BL, said_BL], 1)


def read_outcome(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Return each row's tokens, and its path, of what `outcome` holds."""
    said, paths = [], []
    for next_token, accepted, *rest in rows:
        width = len(rest) // 2
        paths.append(rest[: accepted + 1])
        said.append([*rest[width + 1 : width + 1 + accepted], next_token])
    return said, paths
