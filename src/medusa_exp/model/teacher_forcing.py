"""Teacher forcing: what each head reads and sees in training, from the text's own tokens.

Heads that run side by side read hidden states alone, or these and the root, the text's next token.
Sequential ones also see the tokens drafted before theirs: in training the text's (Williams &
Zipser, 1989), or from a step on their own (scheduled sampling, Bengio et al., arXiv 1506.03099,
with the likeliest token). Recurrent heads are unrolled once: a head's states are those of the head
before it and one step more.

`k` is an index, from 0: the head at k sees k+1 tokens, the root first.

B batch, T time, D hidden, W tokens of the head vocabulary, R labelled rows of one head, U rows that
any head has labelled, J draft tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medusa_exp.model.argmax import argmax
from medusa_exp.model.heads import MedusaHeads, from_head_places

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


def teacher_forced(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    input_ids_BT: Tensor,
    labeled: Sequence[Tensor],
    any_labeled: Tensor | None = None,
    *,
    chunk_rows: int,
    sees_own_drafts: bool = False,
    recomputes: bool = False,
) -> Iterator[HeadInputs]:
    """Yield the inputs of each head on one batch, as many as `labeled` has heads.

    They are computed as they are asked for, with the gradients and in the precision of then.

    Args:
        heads: of any family.
        hidden_BTD: what they read: `heads_input` of the backbone's hidden states.
        input_ids_BT: the text.
        labeled: index_R of the lm_head and of each head, flat positions b * T + t: see `Batch`.
        any_labeled: index_U, see `Batch`. Without it, it is found, for which a GPU is waited for.
        chunk_rows: rows whose logits exist at once, where heads see their own drafts.
        sees_own_drafts: sequential heads see their first choices in place of all but the root.
        recomputes: are steps of recurrent heads, or that with the root, computed again in the
            backward pass? They are in any case where what they compute would take over 1 GiB.
    """
    text = hidden_BTD.flatten(0, 1), input_ids_BT.flatten(), labeled[1:]
    if not heads.is_recurrent and heads.root_block is None:
        yield from _each(heads, *text, chunk_rows if sees_own_drafts else None)
        return
    index_U = torch.cat(list(labeled[1:])).unique() if any_labeled is None else any_labeled
    steps = heads.num_heads * heads.config.num_layers if heads.is_recurrent else 1
    bytes_of_row = 4 * _KEPT_BY_STEP * steps * hidden_BTD.shape[-1]
    step: Callable[..., Tensor] = heads.advance if heads.is_recurrent else heads.with_root
    if torch.is_grad_enabled() and (recomputes or bytes_of_row * len(index_U) > _MOST_KEPT):
        step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
    if heads.is_recurrent:
        yield from _unrolled(heads, step, *text, index_U, chunk_rows if sees_own_drafts else None)
        return
    hidden_ID, text_I, indices = text
    state_UD = step(hidden_ID[index_U], text_I[index_U + 1])  # of the root, once for all heads
    for k, index_R in enumerate(indices):
        states_RD = state_UD[torch.searchsorted(index_U, index_R)]
        yield HeadInputs(partial(heads.logits_of_states, k), (states_RD,), heads.head_parameters(k))


def _each(
    heads: MedusaHeads,
    hidden_ID: Tensor,
    text_I: Tensor,
    indices: Sequence[Tensor],
    own_chunk: int | None,
) -> Iterator[HeadInputs]:
    for k, index_R in enumerate(indices):
        rows: tuple[Tensor, ...] = (hidden_ID[index_R],)
        if heads.is_sequential:
            next_J = torch.arange(1, k + 2, device=index_R.device)
            seen_RJ = text_I[index_R[:, None] + next_J]
            if own_chunk is not None:
                seen_RJ = _own_drafts(heads, *rows, seen_RJ, own_chunk)
            rows += (seen_RJ,)
        yield HeadInputs(partial(heads.head_logits, k), rows, heads.head_parameters(k))


def _unrolled(
    heads: MedusaHeads,
    step: Callable[..., Tensor],
    hidden_ID: Tensor,
    text_I: Tensor,
    indices: Sequence[Tensor],
    index_U: Tensor,
    own_chunk: int | None,
) -> Iterator[HeadInputs]:
    state_UD = hidden_ID[index_U]
    for k, index_R in enumerate(indices):
        if k and own_chunk is not None:
            token_U = _first_choices(heads, k - 1, state_UD, own_chunk)
        else:
            # Rows at which this head has no label may see another document's, and are not used.
            token_U = text_I[(index_U + k + 1).clamp(max=len(text_I) - 1)]
        state_UD = step(state_UD, token_U)
        states_RD = state_UD[torch.searchsorted(index_U, index_R)]
        project = partial(heads.lm_heads, k)
        yield HeadInputs(project, (states_RD,), heads.lm_heads.parameters_of(k))


@torch.no_grad()
def _first_choices(heads: MedusaHeads, k: int, state_UD: Tensor, chunk_rows: int) -> Tensor:
    chunks = [argmax(heads.lm_heads(k, x_CD)) for x_CD in state_UD.split(chunk_rows)]
    return from_head_places(heads, torch.cat(chunks))


@torch.no_grad()
def _own_drafts(
    heads: MedusaHeads, hidden_RD: Tensor, drafted_RJ: Tensor, chunk_rows: int
) -> Tensor:
    """Return drafted_RJ with the heads' first choices in place of all but the root."""
    chosen = []
    for hidden_CD, seen_CJ in zip(
        hidden_RD.split(chunk_rows), drafted_RJ[:, :1].split(chunk_rows), strict=True
    ):
        for k in range(drafted_RJ.shape[1] - 1):
            best_C = argmax(heads.head_logits(k, hidden_CD, seen_CJ))
            seen_CJ = torch.cat([seen_CJ, from_head_places(heads, best_C)[:, None]], 1)
        chosen.append(seen_CJ)
    return torch.cat(chosen)
