"""Linear layers of a CPU with their weights packed for oneDNN: wide steps at the price of narrow.

A product of a few rows reads the whole matrix, and should take no longer than that. torch's own
`linear` takes 3 to 5 times as long for 8 rows as for one on many processors; of weights that lie as
oneDNN wants them it takes hardly longer, and one row is mostly faster too. Steps over a tree are
such products.

Which form is faster depends on processor, shape and rows, and is measured when a model is made
ready for decoding, for a second at most; `cache_dir` keeps what was found. What one form gives
differs from the other's by rounding alone. A row of a packed product is the same whatever stands
beside it; one that is alone may differ by rounding, where its inputs are many. Weights that are
packed for all numbers of rows are given up, and made again, to the last bit, by `unpack` and for
whoever saves them; an lm_head's stay.

A layer of all heads at once can be packed where it is not batched: `is_faster_unbatched` times it
when heads are stacked, and keeps nothing.

M rows, K inputs, N outputs.
"""

import logging
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from torch.nn.functional import linear

from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import content_key, read_json, write_json
from medusa_exp.runs.machine import cpu_name

log = logging.getLogger(__name__)

_ROWS, _UP_TO = (1, 8, 16, 64), (1, 12, 24)
"""Numbers of rows that are measured; up to which rows each but the last stands for others."""
_WORTH = (1.0, 0.9, 0.9, 1.1)
"""What all layers may take with packed weights, of what they take without, to use these: for trees
a gain that a step shows; from 64 rows on, where both forms do much the same work, a tenth longer.
"""
_CALL = 1e-5
"""Seconds by which a packed call is taken to be worse in a model than among others of its kind, as
they are measured: a model of narrow layers lost some 5 us a layer.
"""
_FEWEST = 1 << 16
"""Weights of a layer below which a call's own cost is all there is to it."""
_MOST = 1 << 22
"""Weights of a shape that are measured. Of larger layers a part."""
_DTYPES = (torch.float32, torch.bfloat16)
_WORTH_A_LINE = 10**8
"""Bytes of packed weights from which on it is said what memory they take."""
_SECONDS, _TRIES = 1.0, 9
"""For which all shapes together are measured, and how often at most."""
_FORMAT = 5
"""Another one where any of these changes, or how it is measured: choices are then made anew."""
_KIND = "packed"


class PackedLinear(nn.Linear):
    """What `pack` makes of a `Linear`, in place: the same product by the faster form."""

    packed: Tensor
    uses_packed: Sequence[bool]
    """By the places of `_ROWS`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        # Not by attributes, which a module looks up slowly: small layers' calls must not wait.
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        rows = x.numel() // self.in_features
        if not (rows and self.uses_packed[bisect_left(_UP_TO, rows)]) or _is_more_asked(
            x, self.packed
        ):
            return linear(x, self.weight if weight is None else weight, bias)
        return _product(x, self.packed, bias)

    def __getattr__(self, name: str) -> Any:
        """Return what a module has; the weight, where it was given up, made anew."""
        if name == "weight" and self._parameters.get("weight") is None:
            return self.packed.to_dense()
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Leave no weight out that was given up: what is saved is loaded elsewhere."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.setdefault(f"{prefix}weight", self.weight)


def _is_more_asked(x: Tensor, packed: Tensor) -> bool:
    """Is this for training, or in another type: of what packed weights do not know?"""
    is_trained = torch.is_grad_enabled() and x.requires_grad
    return is_trained or x.dtype != packed.dtype or torch.is_autocast_enabled("cpu")


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    multiply = torch.ops.mkldnn._linear_pointwise.default  # private: torch 2.13
    return multiply(x, packed, bias, "none", [], "")


def pack(
    modules: Iterable[nn.Module], cache_dir: str | Path | None = None, kept: Sequence[Any] = ()
) -> None:
    """Pack the linear layers in modules whose products get faster by it.

    Nothing is done on other devices, in types that oneDNN does not pack, and of small layers.

    Args:
        modules: a model, heads.
        cache_dir: keeps what was measured.
        kept: layers whose weights are needed elsewhere, and stay.
    """
    inside = [module for root in modules for module in root.modules()]
    tied = {id(m.weight) for m in inside if isinstance(m, nn.Embedding)}
    found: dict[tuple[Any, ...], list[nn.Linear]] = defaultdict(list)
    for module in dict.fromkeys(inside):
        if type(module) is nn.Linear and _can_be_packed(module):
            found[_shape(module)].append(module)
    found = {shape: layers for shape, layers in found.items() if _packs(shape[-1])}
    if not found:
        return
    choices = _choices(found, cache_dir)
    added = freed = 0
    chosen = [(layer, choices[_key(shape)]) for shape in found for layer in found[shape]]
    chosen = [(layer, uses) for layer, uses in chosen if any(uses)]
    for layer, uses in chosen:
        needed = not all(uses) or id(layer.weight) in tied or any(layer is one for one in kept)
        added += layer.weight.nbytes
        freed += 0 if needed else layer.weight.nbytes
        _pack_one(layer, uses, keeps_weight=needed)
    if chosen:
        log.log(
            logging.INFO if added >= _WORTH_A_LINE else logging.DEBUG,
            "%d of %d linear layers are packed for this processor: %s, of which %s take the "
            "place of the weights as they were",
            *(len(chosen), sum(map(len, found.values())), decimal(added), decimal(freed)),
        )


def unpack(modules: Iterable[nn.Module]) -> None:
    """Make the linear layers in modules again what they were, to the last bit."""
    for layer in [module for root in modules for module in root.modules()]:
        if isinstance(layer, PackedLinear):
            if layer._parameters.get("weight") is None:
                layer._parameters["weight"] = nn.Parameter(layer.weight, requires_grad=False)
            del layer.packed, layer.uses_packed
            layer.__class__ = nn.Linear


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    is_frozen = not (weight.requires_grad and torch.is_grad_enabled())
    return is_plain and is_frozen and weight.dtype in _DTYPES and weight.numel() >= _FEWEST


def _reordered(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)  # private: torch 2.13
    return packed


def _packs(dtype: torch.dtype) -> bool:
    """Does torch pack this type here? None without oneDNN; bfloat16 not without AVX-512."""
    try:
        _product(torch.ones(1, 16, dtype=dtype), _reordered(torch.ones(16, 16, dtype=dtype)), None)
    except (AttributeError, RuntimeError):
        return False
    return dtype in _DTYPES


@torch.inference_mode()
def is_faster_unbatched(layers: Sequence[nn.Linear]) -> bool:
    """Say whether one row through each of some layers is faster one by one than batched.

    Timed here, for an eighth of a second, as if they were packed where torch packs their type. A
    batched product of bfloat16 takes two to three times as long on some processors, and half as
    long on others.

    Args:
        layers: of one shape.
    """
    weights = [_part(layer.weight) for layer in layers]
    weight_KIO = torch.stack([weight.T for weight in weights]).contiguous()
    x_K1I = weight_KIO.new_ones(len(layers), 1, layers[0].in_features)
    multiply = linear
    if _packs(weight_KIO.dtype):
        multiply, weights = _product, [_reordered(weight) for weight in weights]

    def one_by_one() -> None:
        for x_1I, weight in zip(x_K1I, weights, strict=True):
            multiply(x_1I, weight, None)

    calls: list[Callable[[], object]] = [one_by_one, partial(torch.bmm, x_K1I, weight_KIO)]
    unbatched, batched = _least_seconds(calls, _SECONDS / 8)
    return unbatched < batched


def _part(weight: Tensor) -> Tensor:
    """Return of a weight what is measured."""
    return weight[: max(1, _MOST // weight.shape[1])].detach()


def _pack_one(layer: nn.Linear, uses: Sequence[bool], keeps_weight: bool) -> None:
    packed = _reordered(layer.weight.detach())
    layer.__class__ = PackedLinear
    assert isinstance(layer, PackedLinear)
    layer.__dict__["packed"], layer.uses_packed = packed, tuple(uses)  # no buffer: nobody saves it
    if not keeps_weight:
        layer._parameters["weight"] = None


def _shape(layer: nn.Linear) -> tuple[Any, ...]:
    return layer.out_features, layer.in_features, layer.bias is not None, layer.weight.dtype


def _key(shape: tuple[Any, ...]) -> str:
    return " ".join(map(str, shape))


def _choices(
    found: dict[tuple[Any, ...], list[nn.Linear]], cache_dir: str | Path | None
) -> dict[str, list[bool]]:
    """Return for each shape where packed is used, of what is measured now or was before."""
    if cache_dir is None:
        return _measured(found)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = [cpu_name(), capability, torch.get_num_threads(), torch.__version__]
    key = content_key(_FORMAT, machine, [[_key(shape), len(found[shape])] for shape in found])
    with entry(cache_dir, _KIND, f"{key}.json") as (path, partial_path):
        if partial_path is not None:
            write_json(partial_path, _measured(found))
    choices: dict[str, list[bool]] = read_json(path)
    return choices


@torch.inference_mode()
def _measured(found: dict[tuple[Any, ...], list[nn.Linear]]) -> dict[str, list[bool]]:
    """Say for each shape and each of `_ROWS` whether packed weights are used.

    Where they are faster, and the whole gains by it.
    """
    shapes = [_Sample.of(layers) for layers in found.values()]
    uses: list[list[bool]] = [[] for _ in shapes]
    for rows, worth in zip(_ROWS, _WORTH, strict=True):
        plain_S, ours_S = _times(shapes, rows)
        is_faster_S = ours_S <= plain_S * max(worth, 1.0)
        gained = torch.where(is_faster_S, ours_S, plain_S).sum() / plain_S.sum()
        for own, is_faster in zip(uses, is_faster_S.tolist(), strict=True):
            own.append(is_faster and gained.item() <= worth)
    gains = any(any(own[1:-1]) for own in uses)  # a step over a tree, somewhere
    # What prompts alone gain by stays as it is too: its calls in steps must not cost more.
    uses = [own if gains and any(own[:-1]) else [False] * len(_ROWS) for own in uses]
    return {_key(shape): own for shape, own in zip(found, uses, strict=True)}


@dataclass
class _Sample:
    """Weights of one shape that are measured."""

    weights: list[Tensor]
    packed: list[Tensor]
    share: float
    """Of a layer: a measured weight of a large one is a part of it."""
    factor: float
    """All weights of the shape over those that are measured."""

    @classmethod
    def of(cls, layers: list[nn.Linear]) -> "_Sample":
        first = layers[0].weight
        parts = [_part(layer.weight) for layer in layers]
        share = parts[0].numel() / first.numel()
        parts = parts[: max(1, _MOST // parts[0].numel())]
        factor = len(layers) / (len(parts) * share)
        return cls(parts, [_reordered(part) for part in parts], share, factor)


def _times(shapes: list[_Sample], rows: int) -> tuple[Tensor, Tensor]:
    """Return what all layers of each shape take as they are, and packed: seconds_S.

    Shapes take turns, as in a model, so that a layer's weights come from memory: others have been
    read since its last turn. Each weight's best time counts.
    """
    draws = torch.Generator().manual_seed(0)
    turns = zip_longest(
        *([(s, i) for i in range(len(one.weights))] for s, one in enumerate(shapes))
    )
    order = [place for turn in turns for place in turn if place is not None]
    inputs = [
        torch.randn(rows, one.weights[0].shape[1], generator=draws).to(one.weights[0].dtype)
        for one in shapes
    ]
    calls = [partial(linear, inputs[s], shapes[s].weights[i], None) for s, i in order]
    calls += [partial(_product, inputs[s], shapes[s].packed[i], None) for s, i in order]
    best = torch.tensor(_least_seconds(calls, _SECONDS / len(_ROWS)), dtype=torch.double)
    of_order = torch.tensor([s for s, _ in order])
    sums = torch.zeros(2, len(shapes), dtype=torch.double).index_add(1, of_order, best.view(2, -1))
    sums[1] += _CALL * torch.tensor([len(one.weights) * one.share for one in shapes])
    plain_S, ours_S = sums * torch.tensor([one.factor for one in shapes])
    return plain_S, ours_S


def _least_seconds(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the least that each call took, of calls in turn for so many seconds in all.

    Of one thread its own time counts. How often they are called goes by the processor's time: a
    busy machine must not leave too few calls to judge by.
    """
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    best = [float("inf")] * len(calls)
    end = time.process_time() + seconds * torch.get_num_threads()
    for number in range(_TRIES):
        best = [min(least, _seconds(clock, call)) for least, call in zip(best, calls, strict=True)]
        if number and time.process_time() > end:  # the first calls of a shape prepare others
            break
    return best


def _seconds(clock: Callable[[], float], call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start
