"""What can go wrong in the middle of a training, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medusa_exp.errors import UserError


class BadLoss(Exception):
    """A loss that is NaN or infinite; raised before it has changed anything."""

    def __init__(self, loss: float, step: int, documents: list[int]) -> None:
        super().__init__(f"the loss is {loss} at step {step}")
        self.documents = documents
        """Numbers of the micro-batch's documents."""


@contextmanager
def explain_memory(batch_tokens: int, chunk_rows: int, accumulate: int) -> Iterator[None]:
    """Say what to lower where memory ends.

    Raises:
        UserError: instead of the error of torch, or of the operating system.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"out of memory ({reason}): lower train.batch_tokens (now "
            f"{batch_tokens}) and raise train.accumulate (now {accumulate}) by the same factor, "
            f"which changes no result; or lower train.loss_chunk_rows (now {chunk_rows}), "
            "head.num_heads or dataset.max_length."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text
