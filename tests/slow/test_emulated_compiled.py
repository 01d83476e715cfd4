"""What torch.compile writes for a GPU, on one that is emulated: `nox -s emulated_gpu`.

Layers of a step, losses, and a training's backbone: Triton compiles their kernels, and its
interpreter runs them. See tests/support/emulated_gpu/emulated_triton.py.
"""

import pytest
from architectures import WHOLE
from emulated import run

COMPILED = """
import sys
from architectures import WHOLE, V, build, kinds_of_layers
from emulated_device import ran
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

name, is_by_kernels = sys.argv[1], sys.argv[1] == "llama"
backbone, limits = Backbone(build(name, WHOLE[name]).cuda()), Limits(6)
prompts = [[5, 9, 3, 7], [4], [*range(3, 20)]]
expected = [found.tokens for found in decode_plain(backbone, prompts, limits)]
tree = Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])
rule = AcceptanceRule(verifier="cupy" if is_by_kernels else "torch")
heads = build_heads(backbone, num_heads=3).cuda()
decoder = Decoder(backbone, heads, tree, rule, cuda_graph=True, compiles=True)
for count, graphs in (3, 2), (2, 2), (1, 4):
    of_trees = [decoder.decode(prompts[:count], limits, tree=t) for t in (tree, chain(2))]
    for found in (decoder.decode_plain(prompts[:count], limits), *of_trees):
        assert [answer.tokens for answer in found] == expected[:count]
    assert decoder.layers.num_graphs == graphs and not decoder.layers.is_refused
requests = [Request(prompt, Limits(2), tag=row) for row, prompt in enumerate(prompts * 6)]
slots = decoder.slots(18, 40, decoder.root_only())  # in few slots prompts run one by one
found = {one.request.tag: one.response.tokens for one in slots.decode(requests)}
assert [found[row] for row in range(18)] == [tokens[:2] for tokens in expected] * 6
graphs = 4 + kinds_of_layers(backbone.model)
assert decoder.layers.num_graphs == graphs and not decoder.layers.is_refused
assert sum(told.startswith("triton: ") for told in ran) >= 10
"""


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_layers_say_what_eager_ones_say(gpu, name):
    run(gpu, "-c", COMPILED, name)


LOSSES = """
import sys
import torch
from emulated_device import ran
from medusa_exp.model.row_loss import (
    AcceptanceLoss, CrossEntropy, Divergence, TopAcceptance, TopDivergence, compiled_loss,
)


def outcome(loss, device, logits_CW, wanted):
    logits_CW = logits_CW.to(device).requires_grad_()
    losses_C, accepted_C = loss(logits_CW, *(one.to(device) for one in wanted))
    weights_C = torch.arange(1.0, 1 + len(losses_C), device=device)
    [gradient_CW] = torch.autograd.grad((losses_C * weights_C).sum(), logits_CW)
    return [None if x is None else x.cpu() for x in (losses_C, accepted_C, gradient_CW)]


def check(loss, wanted_of):
    for rows, vocabulary in (4, 50), (9, 50), (6, 50), (5, 5003):
        logits_CW = torch.randn(rows, vocabulary).mul(3).to(getattr(torch, sys.argv[1]))
        p_CW = torch.randn(rows, vocabulary).mul(2).softmax(-1)
        ran.clear()
        found = outcome(compiled_loss(loss), "cuda", logits_CW, wanted_of(p_CW))
        assert sum(told.startswith("triton: ") for told in ran) >= 2  # forward and backward
        plain = outcome(loss, "cpu", logits_CW, wanted_of(p_CW))
        tied = (logits_CW.float().softmax(-1) / p_CW - 1).abs() < 1e-6  # where min(p, q) has a kink
        for _, _, gradient_CW in found, plain:
            gradient_CW[tied] = 0
        assert tied.sum() < 3
        torch.testing.assert_close(found, plain)


def top(p_CW):
    return p_CW.topk(32).indices, p_CW.topk(32).values.log()


torch.manual_seed(0)
check(CrossEntropy(), lambda p_CW: (p_CW.argmax(-1).index_fill(0, torch.tensor([1]), -100),))
check(Divergence(measures_acceptance=True), lambda p_CW: (p_CW,))
check(TopDivergence(), top)
for kind in ("tv", "nla", "lk"):
    check(AcceptanceLoss(kind), lambda p_CW: (p_CW,))
    check(TopAcceptance(AcceptanceLoss(kind)), top)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_losses_and_their_gradients_are_those_of_a_cpu(gpu, dtype):
    run(gpu, "-c", LOSSES, dtype)


FEW_ROWS = """
import torch
from emulated_device import ran
from medusa_exp.model.row_loss import AcceptanceLoss, CrossEntropy, Divergence, compiled_loss

for loss in (CrossEntropy(), Divergence(True), *map(AcceptanceLoss, ("tv", "nla", "lk"))):
    for rows in (2, 5):  # of the first it is compiled, and inductor is tempted to split them
        logits_CW = torch.randn(rows, 20_011, device="cuda", requires_grad=True)
        p_CW = torch.randn(rows, 20_011, device="cuda").softmax(-1)
        ran.clear()
        wanted = p_CW.argmax(-1) if loss == CrossEntropy() else p_CW
        compiled_loss(loss)(logits_CW, wanted)[0].sum().backward()
        kernels = [told for told in ran if told.startswith("triton: ")]
        assert len(kernels) == 2, (loss, kernels)
"""


def test_losses_that_meet_few_rows_first_are_a_kernel_forward_and_one_backward(gpu):
    run(gpu, "-c", FEW_ROWS)


SPILLS = """
import sys
import emulated_triton
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.row_loss import AcceptanceLoss, CrossEntropy, Divergence, compiled_loss
from medusa_exp.tree import chain

emulated_triton.is_interpreting = False  # so that all that is computed means nothing
shapes = {"num_attention_heads": 32, "num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 4096}
for width, groups in (11008, 1), (14336, 4):  # of 7B and 8B
    model = LlamaForCausalLM._from_config(
        LlamaConfig(intermediate_size=width, num_key_value_heads=32 // groups, **shapes),
        dtype=torch.bfloat16,
    )
    backbone, rule = Backbone(model.eval().cuda()), AcceptanceRule(verifier="torch")
    heads = build_heads(backbone, num_heads=4).cuda().bfloat16()
    decoder = Decoder(backbone, heads, chain(4), rule, cuda_graph=True, compiles=True)
    decoder.decode([[3, 4, 5]], Limits(2))
    decoder.decode_plain([[3, 4, 5]], Limits(2))
    assert decoder.layers.num_graphs == 2
rows, vocabulary = 1024, 128_256
labels_C = torch.zeros(rows, dtype=torch.long, device="cuda")
p_CW = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
losses = {Divergence(True): p_CW, CrossEntropy(): labels_C, AcceptanceLoss("lk"): p_CW}
for loss, wanted in losses.items():
    logits_CW = torch.empty_like(p_CW).requires_grad_()
    compiled_loss(loss)(logits_CW, wanted)[0].sum().backward()
found = emulated_triton.machine_code
print(*(f"{name}: {taken}" for name, taken in found.items()), sep="\\n")
assert len(found) >= 30
# 64 registers: a multiprocessor has room for 1,024 threads
assert not [name for name, (registers, stack) in found.items() if stack or registers > 64]
"""


def test_what_is_compiled_for_large_models_spills_nothing_and_takes_few_registers(gpu):
    print(run(gpu, "-c", SPILLS).stdout)


TRAINING = """
import torch
from emulated_device import ran
from tiny_models import build_model
from medusa_exp.config import TrainConfig
from medusa_exp.data.batching import label_positions
from medusa_exp.data.datamodule import Batch
from medusa_exp.model import Backbone, build_heads
from medusa_exp.train.module import MedusaModule


def loss_and_gradients(module, batch):
    module.batch_loss(batch, [1, 1, 1])[0].backward()  # what is asked for, and compiled, once
    module.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    loss = module.batch_loss(batch, [1, 1, 1])[0]
    loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    return [value.cpu() for value in (loss, *(p.grad for p in module.heads.parameters()))]


# No token twice: two alike at the start say the same, where an acceptance loss has a kink.
ids_BT = (1 + torch.randperm(59)[:48]).view(2, 24).cuda()
is_trained_BT = torch.arange(24).cuda().expand(2, -1) % 3 > 0
restarted_BT = (torch.arange(24) % 10).cuda().expand(2, -1)
for name in ("llama", "gemma2"):
    backbone = Backbone(build_model(name).cuda())
    for loss in ("ce", "kl", "topk_kl", "nla"):
        settings = TrainConfig(
            loss=loss, head_weights="decay", learning_rate=1e-3, loss_chunk_rows=256,
            loss_form="at_once", compile="false",
        )
        heads = build_heads(backbone, num_heads=2).cuda()
        module = MedusaModule(
            backbone, heads, settings, max_steps=9, responses=list, max_rank=3, key=""
        )
        for positions_BT in (None, restarted_BT):
            example_BT = torch.ones_like(ids_BT)
            labeled = label_positions(is_trained_BT, example_BT, 2)
            some = torch.cat(list(labeled[1:])).unique()
            batch = Batch(
                ids_BT, is_trained_BT, example_BT, positions_BT, labeled=labeled, any_labeled=some
            )
            plain = loss_and_gradients(module, batch)
            if name == "llama" and positions_BT is None:
                ran.clear()
                with module.compiled(None) as is_compiled:
                    compiled = loss_and_gradients(module, batch)
                kernels = [told for told in ran if told.startswith("triton: ")]
                assert is_compiled and any("rsqrt" in told for told in kernels)
                assert any("softmax" in told or "logsumexp" in told for told in kernels)
                torch.testing.assert_close(compiled, plain)
"""


def test_a_micro_batch_does_not_wait_for_the_device_compiled_or_not(gpu):
    run(gpu, "-c", TRAINING)


CACHED = """
import sys
import torch, emulated_device
from tiny_models import build_model
from medusa_exp.model import Backbone
from medusa_exp.model.attention import few_shapes
from medusa_exp.train.defaults import compiled_backbone

backbone, ids = Backbone(build_model("llama").cuda().bfloat16()), torch.ones(3, 40).long().cuda()
with torch.no_grad():
    if sys.argv[1] == "prompts":  # compiled with the kernels that prompts are given
        for layer in backbone.layers():
            layer.compile(dynamic=True)
        backbone.hidden_states(ids)
        assert emulated_device.ran["flash attention"]
    else:
        with compiled_backbone(backbone, None), few_shapes():
            backbone.hidden_states(ids)
        assert emulated_device.ran["cudnn attention"]
        assert not emulated_device.ran["flash attention"]
"""


def test_what_torch_has_cached_for_other_kernels_is_not_taken_by_training(gpu):
    for what in ("prompts", "training"):
        run(gpu, "-c", CACHED, what)
