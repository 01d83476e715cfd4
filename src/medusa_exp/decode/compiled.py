"""Decoder layers under torch.compile: one compilation serves all layers of a model, and all trees.

A captured step still runs eager's kernels: beside the matrix products many small ones, for norms,
rotary positions and sums, which torch.compile fuses. What is compiled is one layer, not the whole
model ("regional compilation"): that takes seconds, and all layers of a kind share the outcome.

Layers of a kind differ, for torch, in one thing: the number by which each finds its keys and
values in the cache. So each is given a view of its own keys and values in the cache's stead, whose
`update` does not look at that number. Sizes of batch, tree and cache are symbols. Where one is 1
torch compiles anew, so that plain decoding (trees of one node) has a compilation of its own.

Products of one input are one product (fused.py), and a step's mask is folded before the layers.

Prompts that run together for many slots go through the same layers, into a cache of their own. With
positions that all rows share, and mostly without a mask, they have graphs of their own.
"""

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo  # private: torch 2.13
import torch.fx.experimental._config as shapes_config  # private: torch 2.13
from torch import Tensor, nn
from torch._dynamo.exc import (  # private: torch 2.13
    FailOnRecompileLimitHit,
    TorchDynamoException,
)
from transformers.cache_utils import Cache

from medusa_exp.decode.cache import FixedCache, GrowingCache
from medusa_exp.decode.fused import fuse, groups_of, join
from medusa_exp.errors import UserError
from medusa_exp.model.attention import fold_for_layer
from medusa_exp.model.backbone import Backbone

log = logging.getLogger(__name__)

_KINDS = 64
"""Graphs of a process: see `CompiledLayers.num_graphs`. torch allows 8."""

_PLACES = 4
"""Places of a layer's weights that are remembered."""


class CompiledLayers:
    """The decoder layers of a backbone, compiled at their first calls within `in_place`."""

    def __init__(self, backbone: Backbone, backend: str = "inductor") -> None:
        """Prepare; nothing is compiled yet.

        Args:
            backbone: whose layers are meant. Elsewhere they run as they are.
            backend: of torch.compile.

        Raises:
            UserError: the model lies on a CPU, and there is no C++ compiler.
        """
        if backend == "inductor" and backbone.device.type == "cpu":
            _check_compiler()
        self.name, self.layers = backbone.name, layers_of(backbone)
        self.seconds = 0.0
        """What compiling took."""
        self.num_graphs = 0
        """What it made: at most one for each kind of layer, by whether batch and tree are 1, by
        whether trees or prompts are run, these with a mask or without, and by which products are
        one."""
        self.is_refused = False
        """Has it failed? Then all runs as without it."""
        self._backend = backend
        self._folds_masks = True
        join(self.layers)
        self._groups = {layer: groups_of(layer) for layer in self.layers}
        self._known: dict[Hashable, tuple[tuple[str, ...], ...]] = {}
        """What `_joined` has found."""
        if not self.layers:
            self._refuse("its decoder layers are not found, or are run by hooks")

    @contextmanager
    def in_place(self, cache: FixedCache | GrowingCache) -> Iterator[None]:
        """Run the model's layers compiled within the block: one forward call, on trees or prompts.

        The cache must be allocated. It is written, and where its next call begins is not moved.
        """
        if self.is_refused:
            yield
            return
        before = self.num_graphs
        for layer, part in zip(self.layers, cache.layers, strict=False):
            view = _LayerView(part.keys, part.values, part.num_columns - part.start)
            layer.__dict__["forward"] = partial(self._run, layer, view, cache)
        try:
            with _settings():
                yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)
        if self.num_graphs > before:
            log.info(
                "compiled a decoder layer for all %d of %s: %d graphs, %.1f s so far",
                *(len(self.layers), self.name, self.num_graphs, self.seconds),
            )

    def _run(
        self, layer: nn.Module, view: "_LayerView", whole: Cache, /, *args: Any, **kwargs: Any
    ) -> Any:
        viewed = tuple(view if value is whole else value for value in args)
        named = {key: view if value is whole else value for key, value in kwargs.items()}
        while not self.is_refused:
            call, backend = _compiler(self._backend, self._joined(layer))
            folded = self._folded(layer, view, named)
            before, start = backend.num_graphs, time.perf_counter()
            try:
                return call(layer, viewed, folded)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                # Raised before any of the layer has run.
                if folded is not named:  # a layer may do more with a mask than attend by it
                    self._folds_masks = False
                    continue
                self._refuse(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            finally:
                if made := backend.num_graphs - before:
                    self.num_graphs += made
                    self.seconds += time.perf_counter() - start
        return type(layer).forward(layer, *args, **kwargs)

    def _joined(self, layer: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Return the paths of the groups whose weights lie joined, now."""
        groups = self._groups[layer]
        place = (layer, *(group.place(layer) for group in groups))
        if place not in self._known:
            if len(self._known) > _PLACES * len(self.layers):
                self._known.clear()
            self._known[place] = tuple(g.paths for g in groups if g.lies_joined(layer))
        return self._known[place]

    def _folded(
        self, layer: nn.Module, view: "_LayerView", named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return arguments with the mask folded; the same ones where nothing is to be folded."""
        mask = named.get("attention_mask")
        if not self._folds_masks or mask is None:
            return named
        folded = fold_for_layer(layer, mask, view.keys.dtype)
        return named if folded is mask else {**named, "attention_mask": folded}

    def _refuse(self, reason: str) -> None:
        self.is_refused = True
        log.warning("%s: its layers are not compiled (%s): they run as they are", self.name, reason)


def layers_of(backbone: Backbone) -> list[nn.Module]:
    """Return the decoder layers of a model, in order; none where something else runs them."""
    layers = [*(backbone.layers() or ())]
    return [] if any("forward" in layer.__dict__ for layer in layers) else layers


class _LayerView:
    """One layer's keys and values, as a compiled layer is given them instead of the whole cache."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.keys, self.values, self.room = keys, values, room

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values into the last `room` columns; return all up to them."""
        start = self.keys.shape[2] - self.room
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class _Backend:
    """A backend of torch.compile that fuses products of one input, and counts what it makes."""

    def __init__(self, name: str, joined: tuple[tuple[str, ...], ...]) -> None:
        self.num_graphs = 0
        self._joined = joined
        self._backend = torch._dynamo.lookup_backend(name)  # private: torch 2.13

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        fuse(graph, self._joined)
        compiled: Callable[..., Any] = self._backend(graph, inputs)
        self.num_graphs += 1
        return compiled


@cache  # one for the process: what a model's decoders compile, others of it find
def _compiler(
    backend: str, joined: tuple[tuple[str, ...], ...]
) -> tuple[Callable[..., Any], _Backend]:
    counting = _Backend(backend, joined)
    return torch.compile(_forward, backend=counting, fullgraph=True, dynamic=True), counting


def _forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


@contextmanager
def _settings() -> Iterator[None]:
    """Set how torch generalizes, while layers may be compiled.

    An epsilon, or a scale, is a constant. Sizes that happen to be equal, such as
    those of the batch and of the heads, are still two sizes.
    """
    limits = {"recompile_limit": _KINDS, "fail_on_recompile_limit_hit": True}
    with ExitStack() as stack:
        stack.enter_context(
            torch._dynamo.config.patch(specialize_float=True, **limits)  # private: torch 2.13
        )
        stack.enter_context(shapes_config.patch(use_duck_shape=False))  # private: torch 2.13
        yield


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # private: torch 2.13
    from torch._inductor.exc import InvalidCxxCompiler  # private: torch 2.13

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "decode.compile=true needs a C++ compiler for a model on a CPU, and none is found: "
            "install g++, or leave decode.compile at auto."
        ) from error
