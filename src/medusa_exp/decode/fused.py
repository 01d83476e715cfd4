"""Several products of one input as one: queries, keys and values; gate and up.

A layer of a Llama multiplies the same hidden states by the weights of queries, keys and values, and
later by those of gate and up. Of the few rows of a step such a product takes as long as its weight
takes to be read, and a GPU reads one large weight faster than three small ones, in one launch for
three (gpt-fast and the engines keep them as one). Here the weights of such a group are made to lie
one behind the other in one piece of memory, of which each stays a view: nothing is held twice, and
whoever reads the model finds what was there. In the graph of a compiled layer (compiled.py) their
products become one product, by a view of all of that memory.

Weights move when they are joined, as they do by `Module.to`: captured steps look whether they lie
where they did. `save_pretrained` and safetensors' `save_file` write joined weights as they write
others; `save_model` refuses what shares memory.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # multi-head latent attention
)
"""What transformers calls linear layers that are given the same input, in one parent."""
_ALIGNED = 16
"""Bytes. Of an input that begins elsewhere inductor makes a copy, of that weight alone."""
_IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
_IN_PLACE |= {"iand", "ior", "ixor", "ilshift", "irshift"}


@dataclass(frozen=True)
class Group:
    """Linear layers of one parent that may have one product: their paths within a layer."""

    paths: tuple[str, ...]

    def tensors(self, layer: nn.Module) -> list[list[nn.Parameter]]:
        """Return the weights, and the biases if there are any; nothing of what cannot be joined."""
        try:
            found = [layer.get_submodule(path) for path in self.paths]
        except AttributeError:
            return []
        # Not of subclasses: what is quantized, packed or adapted has products of its own.
        if any(type(module) is not nn.Linear for module in found):
            return []
        weights = [module._parameters.get("weight") for module in found]
        biases = [module._parameters.get("bias") for module in found]
        columns = [weights] if all(bias is None for bias in biases) else [weights, biases]
        kept = [[tensor for tensor in column if tensor is not None] for column in columns]
        is_complete = all(len(column) == len(found) for column in kept)
        return kept if is_complete and all(map(_is_alike, kept)) else []

    def place(self, layer: nn.Module) -> Hashable:
        """Return which modules these are, and where their weights lie; quick to ask, at each call.

        What `lies_joined` says stays true for as long as this is the same; None is no such place.
        """
        found: list[Hashable] = []
        try:
            for path in self.paths:
                module: Any = layer
                for name in path.split("."):
                    module = module._modules[name]
                found.append(id(module))
                for name in ("weight", "bias"):
                    if (tensor := module._parameters.get(name)) is not None:
                        found += (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                    found.append(name)
        except (AttributeError, KeyError, RuntimeError):  # of what is gone, or has no address
            return None
        return tuple(found)

    def lies_joined(self, layer: nn.Module) -> bool:
        """Do their weights, and biases, lie one behind the other in the same memory?"""
        columns = self.tensors(layer)
        return bool(columns) and all(map(_lie_joined, columns))


def _is_alike(tensors: list[nn.Parameter]) -> bool:
    if any(type(t) is not nn.Parameter or type(t.data) is not Tensor for t in tensors):
        return False
    kinds = {(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}
    is_tied = len({id(tensor) for tensor in tensors}) < len(tensors)
    return len(kinds) == 1 and not is_tied and not any(tensor.is_inference() for tensor in tensors)


def groups_of(layer: nn.Module) -> list[Group]:
    """Return the groups of a decoder layer, by the names of their linear layers."""
    return [
        Group(tuple(f"{path}.{name}".lstrip(".") for name in names))
        for path, parent in layer.named_modules()
        for names in _NAMES
        if all(type(parent._modules.get(name)) is nn.Linear for name in names)
    ]


def join(layers: Iterable[nn.Module]) -> None:
    """Let the weights of each group of these layers lie joined, where they can.

    Not within a step: memory is given back here, and what was captured is for nothing. A weight
    that belongs to several groups, of tied layers, stays with the first.
    """
    taken: set[int] = set()
    for layer in layers:
        for group in groups_of(layer):
            columns = group.tensors(layer)
            some = {id(tensor) for column in columns for tensor in column}
            if some & taken:
                continue
            taken |= some
            for tensors in columns:
                if not _lie_joined(tensors) and not _join(tensors):
                    return  # there is no memory for it: nor for what follows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else what lay apart stays, beside what lies joined


def _join(tensors: list[nn.Parameter]) -> bool:
    try:
        with torch.inference_mode(False), torch.no_grad():
            joined = torch.cat([tensor.data for tensor in tensors])
    except RuntimeError:  # of memory; a CPU's has no class of its own
        return False
    for tensor, part in zip(tensors, joined.split([len(t) for t in tensors]), strict=True):
        tensor.data = part
    return True


def _lie_joined(tensors: list[nn.Parameter]) -> bool:
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    ends = accumulate((tensor.nbytes for tensor in tensors), initial=tensors[0].data_ptr())
    return (
        len(memory) == 1
        and tensors[0].data_ptr() % _ALIGNED == 0
        and all(tensor.is_contiguous() for tensor in tensors)
        and [tensor.data_ptr() for tensor in tensors] == [*ends][:-1]
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
    if {node.args[1] for node in products} != set(weights) or len(set(weights)) != len(paths):
        return
    if _is_changed_between(graph, products):
        return
    first, ordered = products[0], sorted(products, key=lambda node: weights.index(node.args[1]))
    biases = [node.args[2] for node in ordered]
    names = [_input_name(path, "bias") for path in paths]
    if any(biases) and biases != [inputs.get(name, name) for name in names]:
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


def _is_changed_between(graph: fx.Graph, products: list[fx.Node]) -> bool:
    """Is anything written to between the first and the last of the products: their input, maybe?"""
    nodes = [*graph.nodes]
    return any(map(_writes, nodes[nodes.index(products[0]) : nodes.index(products[-1])]))


def _writes(node: fx.Node) -> bool:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    is_in_place = name.endswith("_") and not name.endswith("__")
    is_operator = getattr(target, "__module__", "") == "_operator" and name in _IN_PLACE
    return is_in_place or is_operator or bool(node.kwargs.get("out") or node.kwargs.get("inplace"))


def _all_of(graph: fx.Graph, first: fx.Node | None, size: int) -> fx.Node | None:
    """Return a view of all joined weights, or biases, by the first of them."""
    if first is None:
        return None
    shape = (size, *first.meta["example_value"].shape[1:])
    strides = (*shape[1:], 1)
    return graph.call_function(torch.as_strided, (first, shape, strides))
