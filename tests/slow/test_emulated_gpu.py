"""The product on a GPU that is emulated: `nox -s emulated_gpu`. See tests/support/emulated.py.

What is found out so: what mixes devices, what waits for the host within a capture, what a replay
finds at the addresses that were captured, and who else wrote there.
"""

import json
from pathlib import Path

import pytest
from emulated import run
from gpu.forms import FORMS

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "as it is": [],
    "recurrent heads": ["head=recurrent"],
    "rooted heads, tied": ["head=rooted", "dtype=bf16"],
    "low-rank heads": ["head=medusa_lowrank"],
    "prefix attention": ["head.prefix_attention=true"],
    "looked up": ["tree.lookup=4"],
    "dynamic tree": ["tree=dynamic"],
    "eager steps": ["decode.cuda_graph=false"],
    "eager attention": ["model.attn_implementation=eager"],
    "growing batches": ["evaluate.batch_sizes=[1,2,3]"],
    "both learn": ["train=medusa2", "evaluate.batch_sizes=[1,2]"],
    "packed, averaged": ["train.batching=packed", "train.average=0.9", "train.accumulate=2"],
    "features from disk": ["train.features=cache", "train.loss=topk_kl"],
    "muon": ["train.optimizer=muon"],
    "float16": ["dtype.precision=16-mixed", "train.loss=lk"],
    "deterministic": [
        *("train.deterministic=true", "train.loss=nla", "train.head_weights=acceptance"),
        "head.prefix_attention=true",
    ],
    "deterministic, both learn": ["train.deterministic=true", "train=medusa2", "train.loss=kl"],
    "its own answers": [
        "stages=[pretrain,regenerate,train,calibrate,evaluate,export,report]",
        *("dataset.max_length=256", "regenerate.max_new_tokens=24", "train.text=regenerated"),
    ],
}
SAMPLED = {
    "likeliest drafts": ["decode.top_p=0.9", "decode.top_k=20", "decode.temperature=0.7"],
    "drawn drafts": ["decode.draft=sampled", "head=recurrent", "evaluate.batch_sizes=[1,2]"],
}
OF_TORCH = "decode.verifier=torch"  # kernels take a tenth of a second a step on a CPU


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The pretrained model, once for each process."""
    return tmp_path_factory.mktemp("cache")


def smoke(gpu: Path, cache: Path, out: Path, *settings: str) -> dict[str, float]:
    command = ["-m", "medusa_exp", "+experiment=smoke", "device=cuda", f"run_dir={out}"]
    few = ["tree.num_prompts=1", "evaluate.num_prompts=3", f"cache_dir={cache}"]
    run(gpu, *command, *few, *settings)
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_plain_decoding(gpu, cache, tmp_path, name):
    metrics = smoke(gpu, cache, tmp_path / "run", OF_TORCH, *VARIANTS[name])
    assert metrics["eval/identical_fraction"] == 1 and metrics["eval/tokens_per_step"] >= 1


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_by_the_kernels_too(gpu, cache, tmp_path, name):
    metrics = smoke(gpu, cache, tmp_path / "run", "decode=sampling", *SAMPLED[name])
    assert metrics["eval/tokens_per_step"] >= 1


def test_a_demo_on_a_gpu(gpu, tmp_path):
    command = ["-m", "medusa_exp", "+experiment=demo", "device=cuda", "evaluate.num_prompts=2"]
    done = run(gpu, *command, f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", OF_TORCH)
    assert done.stdout.count("the same tokens") == 4 and "NOT the same" not in done.stdout


def test_the_tests_of_a_gpu(gpu):
    folders = ["tests/decode", "tests/model", "tests/kernels/test_gpu.py"]
    # That one compares what the kernels' tests for the CPU compare too, and takes an hour here.
    left_out = ("-k", "not right_on_the_device")
    done = run(gpu, "-m", "pytest", "-q", "-m", "gpu", *left_out, *folders, cwd=ROOT)
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("parts", [["--parts", "steps_8B", "regeneration", "speedup"], ["--forms"]])
def test_the_benchmark_of_a_gpu(gpu, tmp_path, parts):
    out = tmp_path / "found.json"
    command = ["benchmarks/gpu/run.py", "--rehearse", "--minutes", "14", "--out", str(out)]
    run(gpu, *command, *parts, cwd=ROOT)
    found = json.loads(out.read_text())
    assert found["seconds"] and not [name for name in found["seconds"] if "failed" in found[name]]
    for name in {"forms_7B", "forms_8B"} & set(found):
        assert len(found[name]) == len(FORMS) + 1
        assert not any(form["is_refused"] for form in found[name].values())


CAPTURES = """
import torch

state = torch.zeros(3, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    told = state * 2 + 1
    state.add_(1)
assert state.tolist() == [0, 0, 0]  # a capture computes nothing
for number in range(3):
    graph.replay()
    assert state[0] == number + 1 and told[0] == 2 * number + 1


def refused(work, message):
    try:
        work()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


def waiting_capture(work):
    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
    return capture


masked = lambda: state[state > 1]
for wait in (state.cpu, state.sum().item, state.nonzero, masked, torch.cuda.synchronize):
    refused(waiting_capture(wait), "captur")
torch.cuda.set_sync_debug_mode("error")
for wait in (state.cpu, state.nonzero, lambda: torch.zeros(2).to("cuda")):
    refused(wait, "synchronizing")
torch.cuda.set_sync_debug_mode("default")
refused(lambda: state + torch.zeros(3), "same device")
refused(lambda: torch.zeros(3)[torch.zeros(1, dtype=torch.long, device="cuda")], "same device")


def spoilt():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            state.cpu()
        except RuntimeError:
            pass


refused(spoilt, "previous error during capture")
own = torch.Generator("cuda")
refused(waiting_capture(lambda: state.uniform_(generator=own)), "not registered")
number, scaled = torch.tensor(2.0), torch.cuda.CUDAGraph()
with torch.cuda.graph(scaled):
    doubled = state * number
number.fill_(10)  # a graph has the number of the capture
scaled.replay()
assert doubled[0] == 2 * state[0]
begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
timed = torch.cuda.CUDAGraph()
with torch.cuda.graph(timed):
    begin.record()
    state.mul_(1)
    end.record()
timed.replay()
assert begin.elapsed_time(end) > 0
torch.manual_seed(3)
first = torch.rand(4, device="cuda")
torch.manual_seed(3)
assert torch.equal(first, torch.rand(4, device="cuda"))
assert torch.empty(2**25, dtype=torch.uint8, device="cuda").eq(0xCD).all()  # as it was given
assert torch.cuda.memory_allocated() > 0 and "emulated" in torch.cuda.get_device_name()
q, k, v = (torch.randn(1, 4, 5, 16, device="cuda", requires_grad=True) for _ in range(3))
host = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
attend = torch.nn.functional.scaled_dot_product_attention
attend(q, k, v, is_causal=True).square().sum().backward()
attend(*host, is_causal=True).square().sum().backward()
for there, here in zip((q, k, v), host):
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-5)
"""


KERNELS = """
import torch, emulated_device
from tiny_models import build_model
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import chain

backbone = Backbone(build_model("llama").cuda().bfloat16())
heads = build_heads(backbone, num_heads=2).cuda().bfloat16()
decoder = Decoder(backbone, heads, chain(2), AcceptanceRule(verifier="torch"), cuda_graph=True)


def kernels(work):
    emulated_device.ran.clear()
    work()
    return {name for name in emulated_device.ran if name.endswith(" attention")}


flash = {"flash attention"}
assert kernels(lambda: decoder.decode([[3, 4, 5]], Limits(2))) == flash | {"cudnn attention"}
assert kernels(lambda: decoder.decode([[3, 4, 5, 6]], Limits(2))) == flash  # and what was captured
ids = torch.ones(1, 7, dtype=torch.long).cuda()
assert kernels(lambda: backbone.hidden_states(ids)) == flash
assert torch.backends.cuda.cudnn_sdp_enabled()
"""


MASKS = """
import torch
from medusa_exp.model.attention import _fold_mask

for batch, nodes, groups, columns in (1, 1, 1, 257), (1, 4, 1, 260), (2, 1, 4, 257), (2, 4, 4, 300):
    wide = torch.ones(batch, 1, nodes, columns + 3, dtype=torch.bool, device="cuda")
    wide[..., ::5] = False
    for mask in (wide[..., :columns].contiguous(), wide[..., :columns]):
        for given in (mask, mask.half()):
            folded = _fold_mask(given, groups, torch.float16)
            assert all(stride % 16 == 0 for stride in folded.stride()[:3]), folded.stride()
            rows = groups * nodes if nodes > 1 else 1
            assert folded.shape == (batch, 1, rows, columns)
            assert _fold_mask(folded, 1, torch.float16) is folded
            expected = torch.zeros(mask.shape, dtype=torch.float16, device="cuda")
            if given.dtype == torch.bool:
                expected.masked_fill_(~mask, torch.finfo(torch.float16).min)
            else:
                expected.copy_(given)
            for group in range(rows // nodes):
                assert torch.equal(folded[:, :, group * nodes : (group + 1) * nodes], expected)
"""


def test_rows_of_masks_are_as_wide_as_kernels_want_them(gpu):
    run(gpu, "-c", MASKS)


CAPTURED = """
import torch
from tiny_models import build_model
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.model import Backbone

backbone, rule = Backbone(build_model("llama").cuda()), AcceptanceRule(verifier="torch")
prompts = [[3, 4, 5], [9, 8, 7, 6], [1] * 9]
expected = [decode_plain(backbone, [prompt], Limits(20))[0].tokens for prompt in prompts]
older = Decoder(backbone, rule=rule, cuda_graph=True)
assert older.decode_plain([prompts[0]], Limits(20))[0].tokens == expected[0]
newer = Decoder(backbone, rule=rule, cuda_graph=True)
newer.layers = CompiledLayers(backbone, "aot_eager")
garbage = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(8)]
for decoder in (newer, older, newer):
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert decoder.decode_plain([prompt], Limits(20))[0].tokens == tokens
for count in range(1, 7):  # old caches go, and all graphs with them
    some = [prompts[0]] * count
    assert [a.tokens for a in older.decode_plain(some, Limits(20))] == [expected[0]] * count
for count in (1, 2, 3, 2):  # as does what slots have captured, where more are wanted
    slots = older.slots(count, 256, older.root_only())
    requests = [Request(prompt, Limits(20), tag=n) for n, prompt in enumerate(prompts)]
    assert {f.request.tag: f.response.tokens for f in slots.decode(requests)} == dict(
        enumerate(expected)
    )
"""


def test_captured_steps_outlive_moved_weights_and_dropped_caches(gpu):
    run(gpu, "-c", CAPTURED)


def test_what_comes_in_many_shapes_has_no_kernel_planned_for_each(gpu):
    run(gpu, "-c", KERNELS)


def test_what_a_gpu_refuses_is_refused(gpu):
    run(gpu, "-c", CAPTURES, complains=True)
