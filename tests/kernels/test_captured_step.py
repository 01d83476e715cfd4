"""Decoding whose steps mask and keep nodes by kernels says what it says without."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode import rule, step
from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.verify import verify
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_the_kernels_decode_what_torch_decodes(monkeypatch, architecture, shim):
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=3)
    limits = Limits(40, {7})
    by_torch = Decoder(backbone, heads, TREE, cuda_graph=True)
    expected = [a.tokens for a in by_torch.decode(PROMPTS, limits)]
    launched = []
    monkeypatch.setattr(shim, "launch", _spy(shim.launch, launched))
    for module in (rule, step):
        monkeypatch.setattr(module, "step_kernels", lambda name, device: shim)
    ours = Decoder(backbone, heads, TREE, cuda_graph=True).decode(PROMPTS, limits)
    assert [a.tokens for a in ours] == expected
    wants_dict = architecture == "gemma2"  # of masks, by kind of layer
    assert set(launched) == {"commit", "topk_2"} | (set() if wants_dict else {"tree_mask"})


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("filters", [{}, {"top_k": 12, "top_p": 0.9}])
@pytest.mark.parametrize("kind", ["medusa", "medusa_lowrank", "recurrent"])
def test_drafts_are_drawn_and_judged_as_by_torch(monkeypatch, kind, filters, cuda_graph, shim):
    """Heads that share a distribution over a depth, have few tokens, or have one for each node."""
    backbone, few = Backbone(build_model("llama")), {}
    if kind == "medusa_lowrank":
        few = {"num_tokens": VOCAB_SIZE // 2, "token_counts": torch.arange(VOCAB_SIZE)}
    heads = build_heads(backbone, num_heads=3, kind=kind, **few)
    found, launched = [], []
    monkeypatch.setattr(shim, "launch", _spy(shim.launch, launched))
    kernels = KernelVerify(shim, LaunchConfig(2, threads=64))
    for judge, drawer in ((verify, None), (kernels, shim)):
        monkeypatch.setattr(rule, "pick_verify", lambda *given, judge=judge, **more: judge)
        monkeypatch.setattr(rule, "step_kernels", lambda name, device, drawer=drawer: drawer)
        sampled = AcceptanceRule("sampling", seed=5, draft="sampled", **filters)
        decoder = Decoder(backbone, heads, TREE, sampled, cuda_graph=cuda_graph)
        found.append([a.tokens for a in decoder.decode(PROMPTS, Limits(30))])
    assert found[0] == found[1]
    assert set(launched) == {"verify_2", "draws"} | ({"filter_1", "filter_2"} if filters else set())


def _spy(launch, entries: list[str]):
    def spied(file, defines, entry, *given):
        entries.append(entry)
        launch(file, defines, entry, *given)

    return spied
