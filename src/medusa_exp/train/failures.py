"""What can go wrong in the middle of a training, and what to do about it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from medusa_exp.config import TrainConfig
from medusa_exp.errors import UserError


class BadLoss(Exception):
    """A loss that is NaN or infinite; raised before it has changed anything."""

    def __init__(self, loss: float, documents: list[int], step: int) -> None:
        super().__init__(f"the loss is {loss} at step {step}")
        self.documents = documents
        """Numbers of the micro-batch's documents."""


def check_losses(losses: Sequence[tuple[Tensor, list[int]]], step: int) -> None:
    """Stop every process of a training where one of them has a bad loss.

    One alone would leave the others waiting for its gradient, and the checkpoint unwritten.

    Args:
        losses: of the micro-batches of an optimizer step, with the numbers of their documents.
        step: the number of steps before it.

    Raises:
        BadLoss: the first bad loss of any process, with the documents of its micro-batch.
    """
    values_A = torch.stack([loss for loss, _ in losses])
    is_bad = ~values_A.isfinite().all()
    is_shared = distributed.is_initialized()
    if is_shared:
        is_bad = is_bad.float()
        distributed.all_reduce(is_bad)
    if not is_bad:
        return
    mine = [(loss.item(), documents) for loss, documents in losses]
    found = [mine]
    if is_shared:
        found *= distributed.get_world_size()
        distributed.all_gather_object(found, mine)
    bad = (each for of_process in found for each in of_process if not math.isfinite(each[0]))
    raise BadLoss(*next(bad), step)


@contextmanager
def explain_memory(advice: str) -> Iterator[None]:
    """Say what to do where memory ends.

    Raises:
        UserError: instead of the error of torch, or of the operating system.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        said = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"out of memory ({said[:200]}): {advice}.") from error


def memory_of_training(settings: TrainConfig) -> str:
    """Return what to lower where a training has too little memory."""
    rows = settings.loss_chunk_rows or "chosen by the memory"
    return (
        f"lower train.batch_tokens (now {settings.batch_tokens}) and raise train.accumulate (now "
        f"{settings.accumulate}) by the same factor, which changes no result; or lower "
        f"train.loss_chunk_rows (now {rows}), head.num_heads or dataset.max_length, or set "
        "train.loss_form=recompute or head=medusa_tied. Where the model itself has no room, set "
        "model.quantization or model.device_map"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text
