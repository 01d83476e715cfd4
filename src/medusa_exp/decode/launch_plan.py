"""A shape of logits and a device in; how the verification kernels divide the work, out.

B batch, N tree nodes, V vocabulary.
"""

import math
from dataclasses import dataclass

from medusa_exp.decode.cuda.runtime import Kernels

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
