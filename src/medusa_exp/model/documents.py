"""Tell transformers whether rows hold several documents, for the masks that it makes of them.

It would find that out from the positions, and wait for the GPU. B batch, T time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from transformers import masking_utils

_find_packed = masking_utils.find_packed_sequence_indices  # private: transformers 5.23
_is_packed: ContextVar[bool | None] = ContextVar("is_packed", default=None)
"""Do rows of the forward call that is running hold several documents? None: it is another's."""


def _documents_of(position_ids: Tensor) -> Tensor | None:
    if (is_packed := _is_packed.get()) is None:
        found: Tensor | None = _find_packed(position_ids)
        return found
    is_first = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    return is_first.cumsum(-1) if is_packed else None


masking_utils.find_packed_sequence_indices = _documents_of


@contextmanager
def told_what_is_packed(is_packed: bool) -> Iterator[None]:
    """Say of the forwards within whether their rows are packed with several documents."""
    token = _is_packed.set(is_packed)
    try:
        yield
    finally:
        _is_packed.reset(token)
