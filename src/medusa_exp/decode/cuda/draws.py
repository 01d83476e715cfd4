"""Draft tokens drawn from the heads' distributions by a CUDA kernel, as `decode.sampled.draw` does.

That torch function is the specification: of each draw a cumulative sum over all tokens and some
five operations more, where the kernel reads the distribution once for all draws.

B rows, M distributions of a depth, W tokens that heads can propose, R draws.
"""

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import Kernels, check_rows, struct_of

ARGUMENTS = struct_of(
    "q q_stride_b q_stride_m uniforms uniforms_stride_b uniforms_stride_m "
    "tokens num_tokens num_draws"
)
"""struct Arguments of kernels/cuda/draws.cu."""
MAX_DRAWS = 256
"""As kernels/cuda/draws.cu has it."""
_DEFINES = ("LOGIT_FLOAT32",)
_FEW_TOKENS = 1024
"""Up to so many tokens a block has 4 warps, else 32."""


def can_draw(q_BMW: Tensor, uniforms_BMR: Tensor) -> bool:
    """Return whether the kernel takes so many numbers, of these types and layouts."""
    is_float = q_BMW.dtype == uniforms_BMR.dtype == torch.float32
    is_contiguous = q_BMW.stride(2) == uniforms_BMR.stride(2) == 1
    return is_float and is_contiguous and uniforms_BMR.shape[2] <= MAX_DRAWS


class KernelDraw:
    """Draws with the CUDA kernel; called as `decode.sampled.draw` is. Nothing waits for the device.

    Args:
        kernels: device to launch on.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __call__(self, q_BMW: Tensor, uniforms_BMR: Tensor) -> Tensor:
        """Return tokens_BMR, places among the W; see `decode.sampled.draw`.

        Args:
            q_BMW: float32, contiguous along W; any other strides.
            uniforms_BMR: float32 numbers in [0, 1), contiguous along R; any other strides.

        Raises:
            ValueError: a tensor has the wrong device, type, shape or strides. Nothing is launched
                then.
        """
        check_rows(self._kernels, "q_BMW", q_BMW)
        check_rows(self._kernels, "uniforms_BMR", uniforms_BMR)
        batch, count, number = uniforms_BMR.shape
        if q_BMW.shape[:2] != uniforms_BMR.shape[:2] or number > MAX_DRAWS:
            raise ValueError(
                f"uniforms_BMR has shape {list(uniforms_BMR.shape)} for q_BMW of shape "
                f"{list(q_BMW.shape)}: they must agree in B and M, with at most {MAX_DRAWS} draws."
            )
        tokens_BMR = torch.empty(
            batch, count, number, dtype=torch.int64, device=self._kernels.device
        )
        arguments = np.zeros(1, ARGUMENTS)
        arguments[0] = (
            q_BMW.data_ptr(),
            *q_BMW.stride()[:2],
            uniforms_BMR.data_ptr(),
            *uniforms_BMR.stride()[:2],
            tokens_BMR.data_ptr(),
            q_BMW.shape[2],
            number,
        )
        threads = 128 if q_BMW.shape[2] <= _FEW_TOKENS else 1024
        self._kernels.launch("draws.cu", _DEFINES, "draws", (1, count, batch), threads, arguments)
        return tokens_BMR
