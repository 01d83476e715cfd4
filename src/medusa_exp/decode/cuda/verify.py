"""Which guesses of a tree come true: the kernels. `verification.verify` is the specification.

Of sampling, top_k and top_p are not among the kernels' work: they need the row sorted, and torch
does them (decode.verifier=auto sees to it).

No call waits for the device. Workspace and outputs are allocated once for a shape, and a verdict's
tensors are written again by the next call of the same shape. So a Verifier belongs to one stream,
and to one CUDA graph if it is captured: call it once before, so that nothing is compiled or
allocated during capture. Temperature, epsilon and alpha are frozen in a graph; logits, tokens,
parents and uniforms are read anew from their places.

B batch, N tree nodes, V vocabulary, L path length.

A shape of logits and a device in; how the verification kernels divide the work, out.

B batch, N tree nodes, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import MAX_NODES, Kernels, struct_of
from medusa_exp.decode.verify import RULES, Nodes, Verdict

MAX_SPLITS = 256


@dataclass(frozen=True)
class Plan:
    """How the work is laid out; kernels/forms.cuh says what the forms are."""

    form: str = "two"
    """two (launches), fused or lazy."""
    splits: int = 1
    """Of two and fused: parts of a row, each read by a block."""
    threads: int = 256
    walk_threads: int = 1024
    """Of two: threads of a block of the second launch."""
    cluster: int = 1
    """Of lazy: blocks that read a row together."""


def plan_for(shape: tuple[int, int, int], itemsize: int, kernels: Kernels) -> Plan:
    """Choose a layout for logits of shape [B, N, V].

    Two blocks a multiprocessor, each with 16 to 32 KB in flight, keep the memory busy. A few
    sequences do not give so many blocks but by splitting rows, and all rows of nodes with children
    at once; with more, only the rows on the path are read, a cluster of blocks a sequence. Where
    one becomes the better is an estimate: benchmarks/gpu.py measures it.
    """
    batch, num_nodes, vocab_size = shape
    wanted = 2 * kernels.num_processors
    if batch >= (8 if kernels.has_clusters else wanted // 4):
        sizes = (8, 4, 2) if kernels.has_clusters else ()
        cluster = next((size for size in sizes if size * batch <= wanted), 1)
        return Plan("lazy", threads=512 if cluster > 1 else 1024, cluster=cluster)
    num_rows = math.ceil(num_nodes / 3)  # with children: 22 of the 64 of the authors' tree
    longest = max(1, vocab_size * itemsize // (256 * 32))  # two loads a thread at least
    splits = min(math.ceil(wanted / (batch * num_rows)), longest, MAX_SPLITS)
    return Plan("two", splits=splits)


def check_plan(plan: Plan, kernels: Kernels) -> None:
    """Refuse a layout that the kernels would not survive."""
    for threads in (plan.threads, plan.walk_threads):
        if threads % 32 or not 32 <= threads <= 1024:
            raise ValueError(f"{plan}: threads must be a multiple of 32, from 32 to 1024.")
    if plan.form == "fused" and plan.threads > 512:
        raise ValueError(f"{plan}: a block of the fused form has at most 512 threads.")
    if plan.form not in ("two", "fused", "lazy"):
        raise ValueError(f"{plan}: the form is two, fused or lazy.")
    walkers = plan.walk_threads if plan.form == "two" else plan.threads
    if not 1 <= plan.splits <= min(MAX_SPLITS, walkers):
        raise ValueError(f"{plan}: a block of {walkers} threads can merge as many splits.")
    if plan.cluster not in (1, 2, 4, 8):
        raise ValueError(f"{plan}: a cluster has 1, 2, 4 or 8 blocks.")
    if plan.cluster > 1 and not kernels.has_clusters:
        raise ValueError(f"{plan}: clusters need sm_90.")


DEFINES = {
    torch.float32: ("LOGIT_FLOAT32",),
    torch.float16: ("LOGIT_FLOAT16",),
    torch.bfloat16: ("LOGIT_BFLOAT16",),
}
MAX_BATCH = 65535
MAX_VOCAB = 1 << 24
"""Infinite logits are counted in float32."""

_LOG2_E = 1.4426950408889634
ARGUMENTS = struct_of(
    "logits logits_stride_b logits_stride_n tokens tokens_stride_b parents parents_stride_b "
    "uniforms uniforms_stride_b philox partials counters path num_accepted next_token "
    "num_nodes vocab_size path_length num_splits",
    "scale epsilon alpha",
)
"""struct Arguments of kernels/tree.cuh."""


def can_verify(logits_BNV: Tensor) -> bool:
    """Say whether the kernels take logits of this type, shape and layout."""
    fits = logits_BNV.shape[1] <= MAX_NODES and logits_BNV.shape[2] <= MAX_VOCAB
    return fits and logits_BNV.dtype in DEFINES and logits_BNV.stride(2) == 1


@dataclass
class _Workspace:
    """What calls of one shape share."""

    verdict: Verdict
    partials_BNS4: Tensor
    counters_B: Tensor
    plan: Plan
    arguments: np.ndarray


class KernelVerify:
    """Calls the kernels with torch tensors.

    Args:
        kernels: where they run.
        plan: how to lay out every call; None chooses by shape.
    """

    def __init__(self, kernels: Kernels, plan: Plan | None = None) -> None:
        self.kernels = kernels
        self._plan = plan
        self._workspaces: dict[tuple[Any, ...], _Workspace] = {}

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
        nodes: Nodes | None = None,
        philox: Tensor | None = None,
    ) -> Verdict:
        """Find the path of guesses that come true; see `verification.verify`.

        A parent that does not stand before its node counts as padding, a token that the vocabulary
        lacks is never accepted, and a path has at most max_depth guesses.

        Args:
            logits_BNV: float32, float16 or bfloat16; any strides but that of V, which is 1.
            tokens_BN: int64; any stride of B.
            parents_BN: int64; any stride of B.
            rule: one of `RULES`.
            temperature: see `verification.verify`.
            top_k: must be None.
            top_p: must be None.
            uniforms_BN: float32; None draws them in the kernel, from philox.
            epsilon: see `verification.verify`.
            alpha: see `verification.verify`.
            max_depth: see `verification.verify`.
            philox: int64 [1 + B] on the device, a seed and then each sequence's count of calls,
                which the kernel raises; used by sampling where uniforms_BN is None.

        Raises:
            ValueError: an argument has the wrong device, type, shape or strides, or asks for what
                the kernels do not do. Nothing is launched then.
        """
        self._check_options(rule, temperature, top_k, top_p)
        self._check_tensors(logits_BNV, tokens_BN, parents_BN)
        if rule == "sampling":
            self._check_random(tokens_BN, uniforms_BN, philox)
        else:
            uniforms_BN = philox = None
        num_nodes = logits_BNV.shape[1]
        depth = num_nodes - 1 if max_depth is None else min(max_depth, num_nodes - 1)
        if depth < 0:
            raise ValueError(f"max_depth={max_depth} must be at least 0.")
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
            0 if philox is None else philox.data_ptr(),
            space.partials_BNS4.data_ptr(),
            space.counters_B.data_ptr(),
            verdict.path_BL.data_ptr(),
            verdict.num_accepted_B.data_ptr(),
            verdict.next_token_B.data_ptr(),
            num_nodes,
            logits_BNV.shape[2],
            depth + 1,
            space.plan.splits,
            0.0 if rule == "greedy" else _LOG2_E / temperature,
            epsilon,
            alpha,
        )
        self._launch(f"{rule}.cu", DEFINES[logits_BNV.dtype], logits_BNV.shape, space)
        return verdict

    def _launch(
        self, file: str, defines: tuple[str, ...], shape: torch.Size, space: _Workspace
    ) -> None:
        plan, batch, num_nodes = space.plan, shape[0], shape[1]
        launch, arguments = self.kernels.launch, space.arguments
        rows = (plan.splits, num_nodes, batch)
        if plan.form == "two":
            launch(file, defines, "read_rows", rows, plan.threads, arguments)
            launch(file, defines, "walk_tree", (1, 1, batch), plan.walk_threads, arguments)
        elif plan.form == "fused":
            launch(file, defines, "fused", rows, plan.threads, arguments)
        else:
            grid = (plan.cluster, 1, batch)
            launch(file, defines, f"lazy_{plan.cluster}", grid, plan.threads, arguments)

    def _workspace(self, logits_BNV: Tensor, length: int) -> _Workspace:
        batch, num_nodes, _ = shape = tuple(logits_BNV.shape)
        key = (*shape, length, logits_BNV.dtype)
        if key not in self._workspaces:
            plan = self._plan or plan_for(shape, logits_BNV.itemsize, self.kernels)
            check_plan(plan, self.kernels)
            device = logits_BNV.device
            verdict = Verdict(
                torch.empty(batch, length, dtype=torch.int64, device=device),
                torch.empty(batch, dtype=torch.int64, device=device),
                torch.empty(batch, dtype=torch.int64, device=device),
            )
            partials_BNS4 = torch.empty(batch, num_nodes, plan.splits, 4, device=device)
            counters_B = torch.zeros(batch, dtype=torch.int32, device=device)
            self._workspaces[key] = _Workspace(
                verdict, partials_BNS4, counters_B, plan, np.zeros(1, ARGUMENTS)
            )
        return self._workspaces[key]

    def _check_options(
        self, rule: str, temperature: float, top_k: int | None, top_p: float | None
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule={rule} is not known: use one of {', '.join(RULES)}.")
        if rule != "greedy" and not temperature > 0:
            raise ValueError(f"rule={rule} needs a temperature above 0; at 0, use rule=greedy.")
        if rule == "sampling" and (top_k is not None or top_p is not None):
            raise ValueError(
                "the kernels do not filter by top_k or top_p: use verification.verify."
            )

    def _check_tensors(self, logits_BNV: Tensor, tokens_BN: Tensor, parents_BN: Tensor) -> None:
        if logits_BNV.dtype not in DEFINES:
            raise ValueError(f"logits_BNV is {logits_BNV.dtype}: use float32, float16 or bfloat16.")
        if logits_BNV.ndim != 3 or 0 in logits_BNV.shape:
            raise ValueError(
                f"logits_BNV has shape {list(logits_BNV.shape)}: it must be [B, N, V]."
            )
        batch, num_nodes, vocab_size = logits_BNV.shape
        if batch > MAX_BATCH or num_nodes > MAX_NODES or vocab_size > MAX_VOCAB:
            raise ValueError(
                f"logits_BNV has shape {list(logits_BNV.shape)}: at most {MAX_BATCH} sequences of "
                f"{MAX_NODES} nodes over {MAX_VOCAB} tokens."
            )
        if vocab_size > 1 and logits_BNV.stride(2) != 1:
            raise ValueError("logits_BNV must be contiguous along V: call .contiguous().")
        self._check_device("logits_BNV", logits_BNV)
        self._check_nodes("tokens_BN", tokens_BN, torch.int64, (batch, num_nodes))
        self._check_nodes("parents_BN", parents_BN, torch.int64, (batch, num_nodes))

    def _check_random(
        self, tokens_BN: Tensor, uniforms_BN: Tensor | None, philox: Tensor | None
    ) -> None:
        if uniforms_BN is not None:
            shape = tuple(tokens_BN.shape)
            self._check_nodes("uniforms_BN", uniforms_BN, torch.float32, shape)
            return
        if philox is None:
            raise ValueError("rule=sampling needs uniforms_BN, a number in [0, 1) for each node.")
        if philox.dtype != torch.int64 or philox.shape != (1 + len(tokens_BN),):
            raise ValueError(f"philox must be int64 [1 + B]: it is {philox.dtype} {philox.shape}.")
        if not philox.is_contiguous():
            raise ValueError("philox must be contiguous.")
        self._check_device("philox", philox)

    def _check_nodes(
        self, name: str, value_BN: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        if value_BN.dtype != dtype:
            raise ValueError(f"{name} is {value_BN.dtype}: it must be {dtype}.")
        if tuple(value_BN.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(value_BN.shape)}, and logits_BNV asks for {list(shape)}."
            )
        if shape[1] > 1 and value_BN.stride(1) != 1:
            raise ValueError(f"{name} must be contiguous along N: call .contiguous().")
        self._check_device(name, value_BN)

    def _check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.kernels.device:
            raise ValueError(f"{name} is on {value.device}, the kernels on {self.kernels.device}.")
