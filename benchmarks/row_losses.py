"""What compiling the loss of a row brings (train.compile): seconds of a head's loss and gradients.

    python benchmarks/row_losses.py [--out FILE]

One head, its chunks and gradients made as in training (loss_form=at_once), compiled and uncompiled
in turn: of 32,000 tokens, on 1,024 rows of 256 numbers in chunks of 256; on a GPU of 128,256, on
4,915 rows of 4,096 numbers in one chunk. Compilation is left out: it comes once. Products are most
of it on a CPU.
"""

import argparse
import time
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path

import torch
from measuring import Row, best_seconds, machine, show, write
from torch import Tensor, nn

from medusa_exp.model.loss import loss_and_acceptance
from medusa_exp.model.row_loss import (
    AcceptanceLoss,
    CrossEntropy,
    Divergence,
    RowLoss,
    compiled_loss,
)
from medusa_exp.model.targets import Targets, TeacherTargets, TokenTargets

_SIZES = {"cpu": (32_000, 256, 1024, 256), "cuda": (128_256, 4096, 4915, 4915)}
"""Tokens, size of a hidden state, rows, and rows of a chunk."""
_REPEATS = 8
_LOSSES = {
    "ce": CrossEntropy(),
    "kl": Divergence(),
    "nla": AcceptanceLoss("nla"),
    "lk": AcceptanceLoss("lk"),
}


class Head:
    """A projection, and what it is to learn."""

    def __init__(self, device: torch.device) -> None:
        tokens, width, rows, self.chunk_rows = _SIZES[device.type]
        with device:
            self.projection, teacher = (nn.Linear(width, tokens, bias=False) for _ in range(2))
            self.hidden_1TD = torch.randn(1, rows + 1, width)
            self.index_R = torch.arange(rows)
            self.labels_1T = torch.randint(tokens, (1, rows + 1))
            everywhere = torch.arange(rows + 1)

        def probabilities(hidden_RD: Tensor) -> Tensor:
            return teacher(hidden_RD).softmax(-1, torch.float32)

        self.teacher = TeacherTargets(self.hidden_1TD, probabilities, CrossEntropy(), everywhere)

    def targets(self, loss: RowLoss) -> Targets:
        """Return what is to be learned, by this loss."""
        if isinstance(loss, CrossEntropy):
            return TokenTargets(self.labels_1T)
        targets = copy(self.teacher)  # whose probabilities all losses share
        targets.loss = loss
        return targets

    def learn(self, targets: Targets) -> Tensor:
        """Compute loss and gradients; return the loss."""
        self.projection.weight.grad = None
        read, wanted = (self.hidden_1TD[0, self.index_R],), targets.at(self.index_R)
        parts = self.chunk_rows, [self.projection.weight]
        loss, _ = loss_and_acceptance(self.projection, targets, read, wanted, *parts)
        loss.backward()  # type: ignore[no-untyped-call]
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()


def measure(head: Head, name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """Time one loss in both ways; they must agree."""
    plain, compiled = head.targets(_LOSSES[name]), head.targets(_LOSSES[name])
    compiled.loss = compiled_loss(compiled.loss)

    def context() -> AbstractContextManager[None]:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    with context():
        start = time.perf_counter()
        found = head.learn(compiled)
        first = time.perf_counter() - start
        torch.testing.assert_close(found, head.learn(plain), rtol=1e-4, atol=0)
        ours, reference = best_seconds(
            _REPEATS, lambda: head.learn(compiled), lambda: head.learn(plain)
        )
    precision = str(dtype).removeprefix("torch.")
    return Row(
        f"loss and gradients, {name}, {precision}",
        "ms",
        1e3 * ours,
        "quicker than uncompiled",
        ours < reference,
        1e3 * reference,
        reference / ours,
        {"first call, s": first},
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write a JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head, told = Head(device), machine()
    rows = [
        measure(head, name, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
        for name in _LOSSES
    ]
    show(rows, told)
    if arguments.out:
        write(arguments.out, rows, told)


main()
