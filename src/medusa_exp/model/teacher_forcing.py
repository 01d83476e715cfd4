"""Teacher forcing: what each head reads and sees in training, from the text's own tokens.

Heads that are not sequential read hidden states alone. Sequential ones also see the tokens drafted
before theirs: in training the text's (Williams & Zipser, 1989), or from a step on their own
(scheduled sampling, Bengio et al., arXiv 1506.03099, with the likeliest token). Recurrent heads
are unrolled once: a head's states are those of the head before it and one step more.

`k` is an index, from 0: the head at k sees k+1 tokens, the root first.

B batch, T time, D hidden, W tokens of the head vocabulary, R labelled rows of one head, U rows that
any head has labelled, J draft tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medusa_exp.model.heads import MedusaHeads

_KEPT_BY_STEP = 8
"""States [U, D] in float32 that a step of a recurrent block keeps for its gradients; counted."""
_MOST_KEPT = 2**30


@dataclass(frozen=True)
class HeadInputs:
    """One head on its labelled rows."""

    logits_of: Callable[..., Tensor]
    """Maps rows of `rows` to logits_RW."""
    rows: tuple[Tensor, ...]
    """Tensors of R rows each."""
    parameters: list[torch.nn.Parameter]
    """All that `logits_of` trains; what made the rows may train more."""


class TeacherForcing:
    """The inputs of all heads on one batch.

    Args:
        heads: of any family.
        hidden_BTD: what they read: `heads_input` of the backbone's hidden states.
        input_ids_BT: the text.
        labeled: index_R of the lm_head and of each head, flat positions b * T + t: see `Batch`.
        any_labeled: index_U, see `Batch`. Without it, it is found, for which a GPU is waited for.
        chunk_rows: rows whose logits exist at once, where heads see their own drafts.
        sees_own_drafts: sequential heads see their first choices in place of all but the root.
        recomputes: are steps of recurrent heads computed again in the backward pass? They are in
            any case where what they compute would take more than 1 GiB.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        hidden_BTD: Tensor,
        input_ids_BT: Tensor,
        labeled: Sequence[Tensor],
        any_labeled: Tensor | None = None,
        *,
        chunk_rows: int,
        sees_own_drafts: bool = False,
        recomputes: bool = False,
    ) -> None:
        self.heads, self.labeled = heads, labeled
        self.hidden_ID, self.text_I = hidden_BTD.flatten(0, 1), input_ids_BT.flatten()
        self.chunk_rows, self.sees_own_drafts = chunk_rows, sees_own_drafts
        if heads.is_recurrent:
            any_labeled = torch.cat([*labeled[1:]]).unique() if any_labeled is None else any_labeled
            self._index_U, self._state_UD = any_labeled, self.hidden_ID[any_labeled]
            steps = heads.num_heads * heads.config.num_layers
            is_much = 4 * _KEPT_BY_STEP * steps * self._state_UD.numel() > _MOST_KEPT
            self._recomputes = (recomputes or is_much) and torch.is_grad_enabled()

    def of(self, k: int) -> HeadInputs:
        """Return the inputs of the head at index k: of recurrent heads, one after the other."""
        heads, index_R = self.heads, self.labeled[k + 1]
        if heads.is_recurrent:
            state_UD = self._advanced(k)
            states_RD = state_UD[torch.searchsorted(self._index_U, index_R)]
            project = partial(heads.lm_heads, k)
            return HeadInputs(project, (states_RD,), heads.lm_heads.parameters_of(k))
        rows: tuple[Tensor, ...] = (self.hidden_ID[index_R],)
        if heads.is_sequential:
            next_J = torch.arange(1, k + 2, device=index_R.device)
            seen_RJ = self.text_I[index_R[:, None] + next_J]
            rows += (self._own_drafts(*rows, seen_RJ) if self.sees_own_drafts else seen_RJ,)
        return HeadInputs(partial(heads.head_logits, k), rows, heads.head_parameters(k))

    def _advanced(self, k: int) -> Tensor:
        """Return the states of the next step, state_UD; they are those of the head at index k.

        Rows that this head has no label at may see tokens of another document, and are not used.
        """
        if k and self.sees_own_drafts:
            token_U = self._first_choices(k - 1, self._state_UD)
        else:
            token_U = self.text_I[(self._index_U + k + 1).clamp(max=len(self.text_I) - 1)]
        step = self.heads.advance
        if self._recomputes:
            step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
        self._state_UD = step(self._state_UD, token_U)
        return self._state_UD

    @torch.no_grad()
    def _first_choices(self, k: int, state_UD: Tensor) -> Tensor:
        chunks = [
            self.heads.lm_heads(k, x_CD).argmax(-1) for x_CD in state_UD.split(self.chunk_rows)
        ]
        return self._tokens(torch.cat(chunks))

    @torch.no_grad()
    def _own_drafts(self, hidden_RD: Tensor, drafted_RJ: Tensor) -> Tensor:
        """Return drafted_RJ with the heads' first choices in place of all but the root."""
        chosen = []
        for hidden_CD, seen_CJ in zip(
            hidden_RD.split(self.chunk_rows), drafted_RJ[:, :1].split(self.chunk_rows), strict=True
        ):
            for k in range(drafted_RJ.shape[1] - 1):
                best_C = self.heads.head_logits(k, hidden_CD, seen_CJ).argmax(-1)
                seen_CJ = torch.cat([seen_CJ, self._tokens(best_C)[:, None]], 1)
            chosen.append(seen_CJ)
        return torch.cat(chosen)

    def _tokens(self, places: Tensor) -> Tensor:
        return places if self.heads.token_map is None else self.heads.token_map[places]
