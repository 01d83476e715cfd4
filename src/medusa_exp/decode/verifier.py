"""decode.verifier and a device in; the function that judges trees of guesses, out.

The torch code is the specification; the kernels do the same faster. B batch, N tree nodes, V
vocabulary.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import Kernels, kernels_on
from medusa_exp.decode.verification_host import verify_on_host
from medusa_exp.decode.verify import Verdict, verify
from medusa_exp.errors import UserError

VERIFIERS = ("auto", "torch", "cupy")


def choose_verifier(
    name: str, device: torch.device, *, is_filtered: bool
) -> Callable[..., Verdict]:
    """Return `verification.verify`, or what does the same by kernels.

    Args:
        name: torch, cupy, or auto: the kernels on a CUDA device where CuPy is installed and they
            can do what is asked, a walk over lists on a CPU where there is one, else torch.
        device: where the logits are.
        is_filtered: whether top_k or top_p is set, which the kernels do not do.

    Raises:
        UserError: cupy is asked for and cannot be had.
    """
    if name == "torch":
        return verify
    if name == "auto" and device.type == "cpu":
        return verify_on_host
    if name == "auto":
        if device.type != "cuda" or is_filtered or find_spec("cupy") is None:
            return verify
        return _kernels_where_they_can(device)
    if is_filtered:
        raise UserError(
            "decode.verifier=cupy does not filter by decode.top_k or decode.top_p: "
            "leave them out, or set decode.verifier=auto."
        )
    return _kernels(device)


def step_kernels(name: str, device: torch.device) -> Kernels | None:
    """Return the kernels that do what a step does besides judging, where it judges by kernels."""
    if device.type != "cuda" or name == "torch" or (name == "auto" and find_spec("cupy") is None):
        return None
    return kernels_on(device)


def _kernels(device: torch.device) -> Callable[..., Verdict]:
    from medusa_exp.decode.cuda.verify import Verifier

    return Verifier(kernels_on(device))


def _kernels_where_they_can(device: torch.device) -> Callable[..., Verdict]:
    from medusa_exp.decode.cuda.verify import can_verify

    verify_by_kernels = _kernels(device)

    def judge(logits_BNV: Tensor, tokens_BN: Tensor, parents_BN: Tensor, **options: Any) -> Verdict:
        function = verify_by_kernels if can_verify(logits_BNV) else verify
        return function(logits_BNV, tokens_BN, parents_BN, **options)

    return judge
