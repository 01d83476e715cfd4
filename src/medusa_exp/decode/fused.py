"""Several products of one input as one: queries, keys and values; gate and up.

A layer of a Llama multiplies the same hidden states by the weights of queries, keys and values, and
later by those of gate and up. Of the few rows of a step such a product takes as long as its weight
takes to be read, and a GPU reads one large weight faster than three small ones, in one launch for
three (gpt-fast and the engines keep them as one). Here the weights of such a group are made to lie
one behind the other in one piece of memory, of which each stays a view: nothing is held twice, and
whoever reads the model finds what was there. In the graph of a compiled layer (compiled.py) their
products become one product, by a view of all of that memory.

M rows, K inputs, N outputs.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import getitem

import torch
from torch import fx, nn
from torch.nn.functional import linear

_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # multi-head latent attention
)
"""What transformers calls linear layers that are given the same input, in one parent."""


class Group:
    """Linear layers of one parent that may have one product."""

    def __init__(self, paths: tuple[str, ...], layers: tuple[nn.Linear, ...]) -> None:
        self.paths, self.layers = paths, layers

    def join(self) -> bool:
        """Let the weights (and biases) lie one behind the other, if they can; return if they do."""
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        if biases and len(biases) < len(weights):
            return False
        return _join(weights) and (not biases or _join(biases))


def groups_of(layer: nn.Module) -> list[Group]:
    """Return the groups of a decoder layer, by the names of their linear layers."""
    return [*_groups(layer)]


def _groups(layer: nn.Module) -> Iterator[Group]:
    for path, parent in layer.named_modules():
        for names in _NAMES:
            # Not of subclasses: what is quantized, packed or adapted has products of its own.
            found = tuple(p for p in map(parent._modules.get, names) if type(p) is nn.Linear)
            if len(found) == len(names):
                yield Group(tuple(f"{path}.{name}".lstrip(".") for name in names), found)


def _join(tensors: list[nn.Parameter]) -> bool:
    if not _lie_joined(tensors):
        first = tensors[0]
        kind = (first.dtype, first.device, first.shape[1:])
        if any((t.dtype, t.device, t.shape[1:]) != kind for t in tensors):
            return False
        with torch.inference_mode(False), torch.no_grad():
            joined = torch.cat([tensor.data for tensor in tensors])
            for tensor, part in zip(tensors, joined.split([len(t) for t in tensors]), strict=True):
                tensor.data = part
    return True


def _lie_joined(tensors: list[nn.Parameter]) -> bool:
    """Is each behind the one before it, in the same memory?"""
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    ends = accumulate((tensor.nbytes for tensor in tensors), initial=tensors[0].data_ptr())
    return (
        len(memory) == 1
        and all(t.is_contiguous() for t in tensors)
        and [t.data_ptr() for t in tensors] == [*ends][:-1]
    )


def fuse(graph: fx.GraphModule, groups: Iterable[tuple[str, ...]]) -> None:
    """Make one product of those of each group, in a graph that dynamo made of a decoder layer.

    Groups whose inputs differ, or are no longer products by these weights, keep their own.

    Args:
        graph: with the layer's parameters among its inputs; changed in place.
        groups: paths, within the layer, of linear layers whose weights lie joined.
    """
    for paths in groups:
        _fuse(graph.graph, paths)
    graph.recompile()


def _fuse(graph: fx.Graph, paths: tuple[str, ...]) -> None:
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    names = [_input_name(path, "weight") for path in paths]
    weights = [inputs[name] for name in names if name in inputs]
    products = [node for node in graph.nodes if _is_product_by(node, weights)]
    if len(products) != len(paths) or len({node.args[0] for node in products}) > 1:
        return
    first, ordered = products[0], sorted(products, key=lambda node: weights.index(node.args[1]))
    biases = [node.args[2] for node in ordered]
    if any(biases) and biases != [inputs.get(_input_name(path, "bias")) for path in paths]:
        return
    sizes = [weight.meta["example_value"].shape[0] for weight in weights]
    with graph.inserting_before(first):
        joined = [_all_of(graph, some[0], sum(sizes)) for some in (weights, biases)]
        product = graph.call_function(linear, (first.args[0], *joined))
        parts = graph.call_function(torch.split, (product, sizes, -1))
        for place, node in enumerate(ordered):
            node.replace_all_uses_with(graph.call_function(getitem, (parts, place)))
    for node in ordered:
        graph.erase_node(node)


def _input_name(path: str, name: str) -> str:
    """Return what dynamo calls a parameter of a module within the argument `layer`."""
    return f"l_layer_modules_{path.replace('.', '_modules_')}_parameters_{name}_"


def _is_product_by(node: fx.Node, weights: list[fx.Node]) -> bool:
    is_product = node.op == "call_function" and node.target is linear and len(node.args) == 3
    return is_product and not node.kwargs and node.args[1] in weights


def _all_of(graph: fx.Graph, first: fx.Node | None, size: int) -> fx.Node | None:
    """Return all that lies behind the first of some joined weights or biases, itself included."""
    if first is None:
        return None
    shape = (size, *first.meta["example_value"].shape[1:])
    strides = (*shape[1:], 1)
    return graph.call_function(torch.as_strided, (first, shape, strides))
