"""What kernels that read rows of logits take, and how they are launched.

B batch, N places, V vocabulary; a row is the V logits of a place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import Kernels

DEFINES = {
    torch.float32: ("LOGIT_FLOAT32",),
    torch.float16: ("LOGIT_FLOAT16",),
    torch.bfloat16: ("LOGIT_BFLOAT16",),
}
MAX_GRID = 65535
"""Of CUDA, along y and z."""
MAX_VOCAB = 1 << 24
"""Tokens that tie are counted in float32, and so are infinite logits; of filter.cu, so many weights
fit into 64 bits."""
LOG2_E = 1.4426950408889634
_SHORT_ROW = 128 << 10
"""Bytes of a row that two blocks read as fast as eight: between V = 32,000 and 128,256 in bf16."""


@dataclass(frozen=True)
class LaunchConfig:
    """How a row's work is divided: so many blocks (a cluster) of so many threads."""

    cluster: int = 1
    threads: int = 1024

    def check(self, kernels: Kernels) -> None:
        """Raise ValueError if the kernels would not survive this on the device."""
        if self.threads % 32 or not 32 <= self.threads <= 1024:
            raise ValueError(f"{self}: threads must be a multiple of 32, from 32 to 1024.")
        if self.cluster not in (1, 2, 4, 8):
            raise ValueError(f"{self}: a cluster has 1, 2, 4 or 8 blocks.")
        if self.cluster > 1 and not kernels.has_clusters:
            raise ValueError(f"{self}: clusters need sm_90.")


def launch_config(batch: int, row_bytes: int, kernels: Kernels) -> LaunchConfig:
    """Choose for a batch of sequences whose rows of logits take so many bytes.

    Measured on an H200 at 108 points (three rules, B 1 to 64, V 32,000 to 151,936, bf16): at most
    3.0 us above the best configuration of a point, 0.15 us on average.
    """
    if not kernels.has_clusters:
        return LaunchConfig()
    is_long = row_bytes > _SHORT_ROW and 8 * batch <= kernels.num_processors
    return LaunchConfig(cluster=8 if is_long else 2, threads=512)


def fault_of(logits_BNV: Tensor, most_places: int = MAX_GRID) -> str | None:
    """Return why kernels do not take logits of this type, shape and layout; None if they do."""
    if logits_BNV.dtype not in DEFINES:
        return f"logits_BNV is {logits_BNV.dtype}: use float32, float16 or bfloat16."
    shape = list(logits_BNV.shape)
    if len(shape) != 3 or 0 in shape:
        return f"logits_BNV has shape {shape}: it must be [B, N, V]."
    if shape[0] > MAX_GRID or shape[1] > most_places or shape[2] > MAX_VOCAB:
        return (
            f"logits_BNV has shape {shape}: at most {MAX_GRID} sequences of {most_places} nodes "
            f"over {MAX_VOCAB} tokens."
        )
    if shape[2] > 1 and logits_BNV.stride(2) != 1:
        return "logits_BNV must be contiguous along V: call .contiguous()."
    return None


def check_logits(logits_BNV: Tensor, kernels: Kernels, most_places: int = MAX_GRID) -> None:
    """Raise ValueError if the kernels do not take these logits, or are on another device."""
    if fault := fault_of(logits_BNV, most_places):
        raise ValueError(fault)
    if logits_BNV.device != kernels.device:
        raise ValueError(f"logits_BNV is on {logits_BNV.device}, the kernels on {kernels.device}.")
