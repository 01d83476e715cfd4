"""What a step checks, and what makes it: drafts, which are trees of guesses, and proposers.

B rows, D hidden, N tree nodes.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from medusa_exp.decode.verify import Nodes
from medusa_exp.errors import UserError
from medusa_exp.model.heads import PrefixAttention


@dataclass(frozen=True)
class Draft:
    """A tree for each row; what is the same in all rows has B = 1."""

    tokens_BN: Tensor
    parents_BN: Tensor
    nodes: Nodes
    """What verification wants to know of the parents."""
    depths_BN: Tensor

    @property
    def ancestors_BNN(self) -> Tensor:
        """[b, n, m]: is m an ancestor of n, or n itself?"""
        return self.nodes.ancestors_BNN


class Proposer(Protocol):
    """Makes a draft of `num_nodes` nodes a row, none deeper than `depth`."""

    num_nodes: int
    depth: int
    key: Hashable
    """Equal for proposers that do the same."""
    prefix: PrefixAttention | None
    """What the hidden states that it is given have to go through."""

    def __call__(self, root_B: Tensor, hidden_BD: Tensor) -> Draft:
        """Return trees below the roots.

        Args:
            root_B: the token that follows for sure.
            hidden_BD: the backbone's last hidden state one position before it, or what `prefix`
                makes of that.
        """
        ...


def check_fit(depth: int, num_ranks: int, num_heads: int, vocab_size: int) -> None:
    """Raise a UserError where a tree asks for guesses that there are not."""
    if depth > num_heads:
        raise UserError(f"the tree is {depth} guesses deep, and there are {num_heads} heads.")
    if num_ranks > vocab_size:
        raise UserError(f"the tree asks for guess {num_ranks} of a head, and it has {vocab_size}.")
