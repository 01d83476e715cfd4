"""A step of fixed shapes waits for nothing, so that a CUDA graph can hold it whole: it reads no
value from the device, and neither makes a tensor on the host nor copies one from there.

Here the device is torch's "meta", whose tensors have no values: whoever reads one is told so. Only
a GPU shows the rest: kernels, compiled layers, and draws from a generator."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from tiny_models import build_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # private: torch 2.13
from torch.utils._pytree import tree_leaves  # private: torch 2.13

from medusa_exp.decode import step as steps
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import prefill
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.step import CapturedStep
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

PROMPTS = [[1, 2, 3], [4], [5, 6]]
HOST = torch.device("cpu")
TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])
RULES = {
    "greedy": AcceptanceRule(),
    "typical": AcceptanceRule("typical"),
    "sampling": AcceptanceRule("sampling"),
    "filtered": AcceptanceRule("sampling", temperature=0.7, top_k=5, top_p=0.9),
    "drawn": AcceptanceRule("sampling", draft="sampled"),
    "drawn, filtered": AcceptanceRule("sampling", top_k=5, top_p=0.9, draft="sampled"),
}
FEW = {"num_tokens": 40, "token_counts": torch.arange(64, 0, -1)}
HEADS = [
    {"kind": "medusa_tied", **FEW},
    {"kind": "medusa_lowrank", **FEW},
    {"kind": "hydra"},
    {"kind": "rooted"},
    {"kind": "recurrent", **FEW},
    {"prefix_attention": True},
    {"kind": "recurrent", "prefix_attention": True},
]
TREES = {
    "picked": Tree(TREE.parents, TREE.ranks, num_picked=5),
    "looked up": Tree(TREE.parents, TREE.ranks, num_lookup=3),
    "picked, looked up": Tree(TREE.parents, TREE.ranks, num_picked=5, num_lookup=3),
    "root alone": chain(0),
}


class Operations(TorchDispatchMode):
    """Notes each operation in which the host has a part, or that cannot do without values."""

    def __init__(self, noted: list[str]):
        super().__init__()
        self.noted, self.count = noted, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs, is_noted = function.name().removeprefix("aten::"), kwargs or {}, True
        self.count += 1
        try:
            made = function(*args, **kwargs)
            is_noted = is_on_host((args, kwargs, made))
            if name.startswith("index_put"):
                # A lone number is sent to where it is put, and places by a mask are counted first.
                index, value = args[1:3]
                kinds = [getattr(places, "dtype", None) for places in index]
                is_noted |= value.ndim == 0 or torch.bool in kinds
            return made
        finally:  # what raises is noted too: the caller may pass over that
            self.noted += [name] * is_noted


class Calls(TorchFunctionMode):
    """Notes what makes tensors of numbers: where they are to have no values, no operation does."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
    INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)

    def __init__(self, noted: list[str]):
        super().__init__()
        self.noted = noted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_list = False
        if function in self.INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            is_list = any(isinstance(part, list | np.ndarray) for part in index)
        self.noted += [function.__name__] * (function in self.MAKERS or is_list)
        return function(*args, **(kwargs or {}))


def is_on_host(values) -> bool:
    """Is a tensor on the CPU among these, or are they told to make one there?"""
    return any(getattr(leaf, "device", leaf) == HOST for leaf in tree_leaves(values))


def warm_step(monkeypatch, architecture, rule, tree=TREE, **head) -> CapturedStep:
    """Return a step that has run once, as before a capture: what is made lazily is there."""
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=3, **head).to("meta")
    check_tree_attention(backbone)  # once for each model, by values: so is the scale found
    scale = backbone.hidden_scale
    backbone.model.to("meta")
    decoder, on_host = Decoder(backbone, heads, tree, rule, cuda_graph=True), torch.Generator
    with monkeypatch.context() as patched:
        patched.setattr(torch, "Generator", lambda device: on_host())  # there is none on "meta"
        with decoder._step(decoder.drafter(), rule, len(PROMPTS), 40) as step:
            pass
    step.backbone.hidden_scale = scale
    if rule.name == "sampling":
        size = len(PROMPTS), step.drafter.num_uniforms
        step.verifier.uniforms_BN = torch.rand(size, device="meta")
    with torch.no_grad():  # inference mode would leave larger operations whole
        prefill(step.backbone, PROMPTS, step.cache)
        step._run()
    return step


def part_of_host(step: CapturedStep) -> list[str]:
    """Run a step, and return in what of it the host had a part."""
    noted: list[str] = []
    with torch.no_grad(), Operations(noted) as operations, Calls(noted):
        step._run()
    assert operations.count > 100
    return noted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_models_and_rules(monkeypatch, architecture, rule):
    assert part_of_host(warm_step(monkeypatch, architecture, RULES[rule])) == []


@pytest.mark.parametrize("rule", ["greedy", "drawn, filtered"])
@pytest.mark.parametrize("head", HEADS)
def test_heads(monkeypatch, head, rule):
    assert part_of_host(warm_step(monkeypatch, "llama", RULES[rule], **head)) == []


@pytest.mark.parametrize("rule", ["greedy", "typical", "filtered"])
@pytest.mark.parametrize("tree", TREES)
def test_trees(monkeypatch, tree, rule):
    assert part_of_host(warm_step(monkeypatch, "llama", RULES[rule], TREES[tree])) == []


TWO, NUMBER = torch.tensor([0, 1]), torch.tensor(2)  # of the host, and made beforehand
WAITS = {
    "item": lambda t: t[0, 0].item(),
    "if": lambda t: 1 if (t > 0).any() else 0,
    "list of values": lambda t: t.tolist(),
    "size": lambda t: t[: t[0, 0]],
    "mask": lambda t: t[t > 0],
    "sent": lambda t: TWO.to(t.device),
    "made there": lambda t: torch.tensor([0, 1], device=t.device),
    "made alike": lambda t: t.new_tensor([0, 1]),
    "array": lambda t: torch.from_numpy(np.arange(2)).to(t.device),
    "copied": lambda t: t[0, :2].copy_(TWO),
    "number": lambda t: t * NUMBER,
    "index": lambda t: t[TWO],
    "index of numbers": lambda t: t[:, [0, 1]],
    "number put": lambda t: t.__setitem__(2 * (torch.arange(2, device=t.device),), 5),
    "put by a mask": lambda t: t.__setitem__(t > 0, t.flatten()),
    "made on the host": lambda t: torch.zeros(3),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_is_found(monkeypatch, wait):
    step, outcome_of = warm_step(monkeypatch, "llama", RULES["greedy"]), steps.outcome_of

    def after_wait(draft, verdict):
        with suppress(RuntimeError):
            WAITS[wait](draft.tokens_BN)
        return outcome_of(draft, verdict)

    monkeypatch.setattr(steps, "outcome_of", after_wait)
    assert part_of_host(step)
