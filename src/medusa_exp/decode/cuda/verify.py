"""The CUDA verifier: which draft tokens are accepted, with the signature of `decode.verify.verify`.

That torch function is the specification; kernels/README.md is the kernels' contract. What top_k and
top_p leave out is taken from the logits first (filter.py).

No call waits for the device. Outputs are allocated once for a shape, and a verdict's tensors are
written again by the next call of the same shape. So a `KernelVerify` belongs to one stream, and to
one CUDA graph if it is captured: call it once before, so that nothing is compiled or allocated
during capture but a copy of the logits where some are left out, which a graph has in its own
memory. Temperature, the filters, epsilon and alpha are frozen in a graph; logits, tokens, parents
and uniforms are read anew from their places.

B batch, N tree nodes, V vocabulary, L path length, Q distributions of W tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.filter import KernelFilter, leaves_out
from medusa_exp.decode.cuda.launch import (
    DEFINES,
    LOG2_E,
    LaunchConfig,
    check_logits,
    fault_of,
    launch_config,
)
from medusa_exp.decode.cuda.runtime import MAX_NODES, Kernels, check_rows, check_tensor, struct_of
from medusa_exp.decode.sampled import Drawn
from medusa_exp.decode.verify import TreeRelations, Verdict, check_rule

ARGUMENTS = struct_of(
    "logits logits_stride_b logits_stride_n tokens tokens_stride_b parents parents_stride_b "
    "uniforms uniforms_stride_b q q_stride_b q_stride_q q_index places "
    "path num_accepted next_token num_nodes vocab_size path_length",
    "scale epsilon alpha",
)
"""struct Arguments of kernels/cuda/tree.cuh."""


def can_verify(logits_BNV: Tensor, drawn: Drawn | None = None) -> bool:
    """Return whether the kernels take what is of this type, shape and layout."""
    if drawn is not None and (drawn.q_BQW.dtype != torch.float32 or drawn.q_BQW.stride(2) != 1):
        return False
    return fault_of(logits_BNV, MAX_NODES) is None


@dataclass(frozen=True)
class _Tables:
    """What the kernel reads of a `Drawn` that stays the same from step to step."""

    token_map: Tensor | None
    """Kept, so that no other can have its address."""
    q_index_N: Tensor
    places_V: Tensor | None
    """Of each token among the W, or -1."""


@dataclass
class _Workspace:
    """Outputs and launch of all calls of one shape."""

    verdict: Verdict
    config: LaunchConfig
    arguments: np.ndarray


class KernelVerify:
    """Verifies draft trees with the CUDA kernels; called as `decode.verify.verify` is.

    Args:
        kernels: device to launch on.
        config: how every call is launched; None chooses by shape.
    """

    def __init__(self, kernels: Kernels, config: LaunchConfig | None = None) -> None:
        self.kernels = kernels
        self._config = config
        self._filter = KernelFilter(kernels, config)
        self._workspaces: dict[tuple[Any, ...], _Workspace] = {}
        self._tables: dict[tuple[Any, ...], _Tables] = {}

    def __call__(
        self,
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        parents_BN: Tensor,
        *,
        rule: str = "greedy",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        uniforms_BN: Tensor | None = None,
        epsilon: float = 0.09,
        alpha: float = 0.3,
        max_depth: int | None = None,
        nodes: TreeRelations | None = None,
        drawn: Drawn | None = None,
    ) -> Verdict:
        """Find the path of accepted draft tokens; see `decode.verify.verify`.

        A parent that does not come before its node counts as padding, a token that the vocabulary
        lacks is never accepted, and a path has at most max_depth draft tokens.

        Args:
            logits_BNV: float32, float16 or bfloat16; any strides but that of V, which is 1.
            tokens_BN: int64; any stride of B.
            parents_BN: int64; any stride of B.
            rule: one of `RULES`.
            temperature: see `decode.verify.verify`.
            top_k: see `decode.verify.verify`.
            top_p: see `decode.verify.verify`.
            uniforms_BN: float32, in [0, 1); needed by sampling. More than N are not read.
            epsilon: see `decode.verify.verify`.
            alpha: see `decode.verify.verify`.
            max_depth: see `decode.verify.verify`.
            nodes: not needed; the kernels read the tree from parents_BN.
            drawn: see `decode.verify.verify`; q_BQW is float32, any strides but that of W, which
                is 1. Children are drawn in the order of their numbers, as `in_draw_order` has it;
                token_map is read once.

        Raises:
            ValueError: an argument has the wrong device, type, shape or strides, or asks for what
                the kernels do not do. Nothing is launched then.
        """
        check_rule(rule, temperature, uniforms_BN)
        check_logits(logits_BNV, self.kernels, MAX_NODES)
        batch, num_nodes, vocab_size = logits_BNV.shape
        by_node = batch, num_nodes
        for name, value_BN in (("tokens_BN", tokens_BN), ("parents_BN", parents_BN)):
            check_tensor(self.kernels, name, value_BN, torch.int64, by_node, is_expanded=True)
        if rule != "sampling":
            uniforms_BN = drawn = None
        else:
            assert uniforms_BN is not None
            uniforms_BN = uniforms_BN[:, :num_nodes]
            check_tensor(
                self.kernels, "uniforms_BN", uniforms_BN, torch.float32, by_node, is_expanded=True
            )
        depth = num_nodes - 1 if max_depth is None else min(max_depth, num_nodes - 1)
        if depth < 0:
            raise ValueError(f"max_depth={max_depth} must be at least 0.")
        of_draws = (0, 0, 0, 0, 0) if drawn is None else self._of_draws(drawn, logits_BNV)
        if rule == "sampling" and leaves_out(top_k, top_p, vocab_size):
            logits_BNV = self._filter(logits_BNV, temperature, top_k, top_p)
        space = self._workspace(logits_BNV, depth + 1)
        verdict = space.verdict
        space.arguments[0] = (
            logits_BNV.data_ptr(),
            logits_BNV.stride(0),
            logits_BNV.stride(1),
            tokens_BN.data_ptr(),
            tokens_BN.stride(0),
            parents_BN.data_ptr(),
            parents_BN.stride(0),
            0 if uniforms_BN is None else uniforms_BN.data_ptr(),
            0 if uniforms_BN is None else uniforms_BN.stride(0),
            *of_draws,
            verdict.path_BL.data_ptr(),
            verdict.num_accepted_B.data_ptr(),
            verdict.next_token_B.data_ptr(),
            num_nodes,
            vocab_size,
            depth + 1,
            0.0 if rule == "greedy" else LOG2_E / temperature,
            epsilon,
            alpha,
        )
        self.kernels.launch(
            f"{rule if drawn is None else 'traversal'}.cu",
            DEFINES[logits_BNV.dtype],
            f"verify_{space.config.cluster}",
            (space.config.cluster, 1, batch),
            space.config.threads,
            space.arguments,
        )
        return verdict

    def _of_draws(self, drawn: Drawn, logits_BNV: Tensor) -> tuple[int, int, int, int, int]:
        """Return the fields of ARGUMENTS from q to places."""
        batch, num_nodes, vocab_size = logits_BNV.shape
        q_BQW, token_map = drawn.q_BQW, drawn.token_map
        width = vocab_size if token_map is None else len(token_map)
        check_rows(self.kernels, "drawn.q_BQW", q_BQW)
        if (len(q_BQW), q_BQW.shape[2]) != (batch, width):
            raise ValueError(
                f"drawn.q_BQW has shape {list(q_BQW.shape)}: it must be [{batch}, Q, {width}]."
            )
        key = drawn.q_index, q_BQW.shape[1], vocab_size, id(token_map)
        if key not in self._tables:
            if len(drawn.q_index) != num_nodes or not all(
                0 <= place < q_BQW.shape[1] for place in drawn.q_index
            ):
                raise ValueError(
                    f"drawn.q_index must name one of {q_BQW.shape[1]} distributions for each of "
                    f"{num_nodes} nodes."
                )
            self._tables[key] = self._make_tables(drawn, vocab_size)
        tables = self._tables[key]
        return (
            q_BQW.data_ptr(),
            q_BQW.stride(0),
            q_BQW.stride(1),
            tables.q_index_N.data_ptr(),
            0 if tables.places_V is None else tables.places_V.data_ptr(),
        )

    def _make_tables(self, drawn: Drawn, vocab_size: int) -> _Tables:
        device, places_V = self.kernels.device, None
        if drawn.token_map is not None:
            token_map = drawn.token_map.to(device)
            places_V = torch.full((vocab_size,), -1, dtype=torch.int32, device=device)
            number_W = torch.arange(len(token_map), dtype=torch.int32, device=device)
            places_V[token_map] = number_W
        return _Tables(drawn.token_map, torch.tensor(drawn.q_index, device=device), places_V)

    def _workspace(self, logits_BNV: Tensor, length: int) -> _Workspace:
        batch, _, vocab_size = shape = tuple(logits_BNV.shape)
        key = (*shape, length, logits_BNV.dtype)
        if key not in self._workspaces:
            row_bytes = vocab_size * logits_BNV.itemsize
            config = self._config or launch_config(batch, row_bytes, self.kernels)
            config.check(self.kernels)
            device = logits_BNV.device
            verdict = Verdict(
                torch.empty(batch, length, dtype=torch.int64, device=device),
                torch.empty(batch, dtype=torch.int64, device=device),
                torch.empty(batch, dtype=torch.int64, device=device),
            )
            self._workspaces[key] = _Workspace(verdict, config, np.zeros(1, ARGUMENTS))
        return self._workspaces[key]
