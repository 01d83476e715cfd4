"""Draft tokens put on their nodes by a CUDA kernel: the likeliest of the heads' logits.

What torch does for it is the specification (topk, the head vocabulary's token ids, the nodes' picks
of these), but for NaN and the order of tokens that tie. On a GPU topk alone is 14 kernels, one
after the other; this is one (kernels/cuda/topk.cu).

B batch, M rows of a sequence (one a head, or one for each node that is drafted from), W tokens that
heads can propose, R ranks, N tree nodes.
"""

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.launch import (
    DEFINES,
    LaunchConfig,
    check_logits,
    fault_of,
    launch_config,
)
from medusa_exp.decode.cuda.runtime import Kernels, check_tensor, struct_of

ARGUMENTS = struct_of(
    "logits logits_stride_b logits_stride_m places token_map tokens num_tokens num_ranks num_nodes"
)
"""struct Arguments of kernels/cuda/topk.cu."""
MAX_RANKS = 32
"""As kernels/cuda/topk.cu has it."""


def can_pick(logits_BMW: Tensor, num_ranks: int) -> bool:
    """Return whether the kernel takes logits of this type, shape and layout, and so many ranks."""
    return fault_of(logits_BMW) is None and num_ranks <= min(MAX_RANKS, logits_BMW.shape[2])


class KernelTopK:
    """Fills nodes of a draft tree with the CUDA kernel. Nothing waits for the device.

    Args:
        kernels: device to launch on.
        config: how every call is launched; None chooses by shape.
    """

    def __init__(self, kernels: Kernels, config: LaunchConfig | None = None) -> None:
        self._kernels, self._config = kernels, config

    def __call__(
        self,
        tokens_BN: Tensor,
        logits_BMW: Tensor,
        places_N: Tensor,
        num_ranks: int,
        token_map: Tensor | None = None,
    ) -> None:
        """Write the tokens of the nodes that are drafted from these logits.

        Args:
            tokens_BN: int64, contiguous; written where `places_N` says so.
            logits_BMW: float32, float16 or bfloat16; any strides but that of W, which is 1.
            places_N: int64, m * R + rank of each node, or -1 where it is not drafted here.
            num_ranks: R.
            token_map: int64 [W], the token ids of the head vocabulary; None where it is all tokens.

        Raises:
            ValueError: a tensor has the wrong device, type, shape or strides, or there are not so
                many ranks. Nothing is launched then.
        """
        check_logits(logits_BMW, self._kernels)
        batch, count, width = logits_BMW.shape
        if not 0 < num_ranks <= min(MAX_RANKS, width):
            raise ValueError(
                f"{num_ranks} ranks of {width} tokens: there must be 1 to {MAX_RANKS}, and no more "
                "than tokens."
            )
        num_nodes = tokens_BN.shape[-1]
        check_tensor(self._kernels, "tokens_BN", tokens_BN, torch.int64, (batch, num_nodes))
        check_tensor(self._kernels, "places_N", places_N, torch.int64, (num_nodes,))
        if token_map is not None:
            check_tensor(self._kernels, "token_map", token_map, torch.int64, (width,))
        config = self._config or launch_config(
            batch * count, width * logits_BMW.itemsize, self._kernels
        )
        config.check(self._kernels)
        arguments = np.zeros(1, ARGUMENTS)
        arguments[0] = (
            logits_BMW.data_ptr(),
            *logits_BMW.stride()[:2],
            places_N.data_ptr(),
            0 if token_map is None else token_map.data_ptr(),
            tokens_BN.data_ptr(),
            width,
            num_ranks,
            num_nodes,
        )
        self._kernels.launch(
            "topk.cu",
            DEFINES[logits_BMW.dtype],
            f"topk_{config.cluster}",
            (config.cluster, count, batch),
            config.threads,
            arguments,
        )
