"""The heads' likeliest tokens by a kernel, run on the CPU, against a sort in float64."""

import pytest
import torch
from kernel_shim import ORDERS
from tiny_models import VOCAB_SIZE, build_model
from topk_cases import check_topk, exact_topk_cases, topk_case

from medusa_exp.decode import rule
from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.topk import KernelTopK
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.rule import GREEDY
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.tree import Tree, chain

TREES = (
    chain(3),
    Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 4), (0, 0, 0), (2, 4, 3)]),
    Tree.from_paths([(i,) for i in range(33)]),  # more ranks than the kernel has room for
)


@pytest.mark.parametrize("order", ORDERS)
def test_finds_the_likeliest(shim, order):
    shim.order = order
    check_topk(shim, map(topk_case, range(200)))


@pytest.mark.parametrize("flush", [False, True])
def test_the_smallest_logits_and_zeros(shim, flush):
    """A GPU computes with numbers below 1e-38 as with zeros; comparing them must not."""
    shim.order = "random"
    cases = exact_topk_cases()
    assert all(case.expected is not None for case in cases)  # before anything is flushed
    torch.set_flush_denormal(flush)
    try:
        check_topk(shim, cases * 7)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("width", [4099, 32000, 128256])
def test_large_vocabularies(shim, width):
    shim.order = "random"
    check_topk(shim, (topk_case(seed, width) for seed in range(7)))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    [
        ("medusa", None),
        ("hydra", None),
        ("recurrent", None),
        *((kind, VOCAB_SIZE * 3 // 4) for kind in ("medusa_tied", "rooted", "recurrent")),
    ],
)
def test_drafts_are_those_of_torch(monkeypatch, kind, num_tokens, tree, shim):
    draws = torch.Generator().manual_seed(0)
    backbone, few = Backbone(build_model("llama")), {}
    if num_tokens is not None:
        few = {"num_tokens": num_tokens, "token_counts": torch.rand(VOCAB_SIZE, generator=draws)}
    heads = build_heads(backbone, num_heads=3, kind=kind, **few)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws))
    heads = stack_heads(heads, backbone)
    hidden_BD = torch.randn(2, backbone.hidden_size, generator=draws)
    found = []
    for kernels in (None, shim):
        monkeypatch.setattr(rule, "step_kernels", lambda name, device, kernels=kernels: kernels)
        before = len(shim.launched)
        with torch.inference_mode():
            draft = build_drafter(heads, tree, backbone.device, GREEDY)(torch.arange(2), hidden_BD)
        found.append(draft.tokens_BN.tolist())
    assert found[0] == found[1]
    of_depths = kind in ("recurrent", "hydra")
    times = tree.depth if of_depths else 1
    expected = 0 if tree is TREES[2] else times
    assert [name[:4] for name in shim.launched[before:]] == ["topk"] * expected


def test_what_cannot_be_found(monkeypatch, shim):
    tokens_BN, logits_BMW = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 3, 8)
    places_N, names = torch.arange(-1, 4), torch.arange(8)
    kernel = KernelTopK(shim)
    kernel(tokens_BN, logits_BMW, places_N, 2, names)
    for given, message in (
        ((tokens_BN, logits_BMW.double(), places_N, 2), "torch.float64"),
        ((tokens_BN, logits_BMW[0], places_N, 2), r"\[B, N, V\]"),
        ((tokens_BN, logits_BMW.transpose(1, 2), places_N, 2), "contiguous along V"),
        ((tokens_BN, logits_BMW, places_N, 9), "9 ranks of 8 tokens"),
        ((tokens_BN, logits_BMW, places_N, 0), "0 ranks of 8 tokens"),
        ((tokens_BN[:1], logits_BMW, places_N, 2), "tokens_BN has shape"),
        ((tokens_BN.T.contiguous().T, logits_BMW, places_N, 2), "tokens_BN must be contiguous"),
        ((tokens_BN, logits_BMW, places_N[1:], 2), "places_N has shape"),
        ((tokens_BN, logits_BMW, places_N.int(), 2), "places_N is torch.int32"),
        ((tokens_BN, logits_BMW, places_N, 2, names[1:]), "token_map has shape"),
        ((tokens_BN, logits_BMW, places_N, 2, names.to("meta")), "token_map is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(*given)
    with pytest.raises(ValueError, match="33 ranks"):
        kernel(tokens_BN, torch.zeros(2, 3, 100), places_N, 33)
    monkeypatch.setattr(shim, "has_clusters", False)
    with pytest.raises(ValueError, match="sm_90"):
        KernelTopK(shim, LaunchConfig(2))(tokens_BN, logits_BMW, places_N, 2)
