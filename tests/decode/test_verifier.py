"""Who judges: torch, or the kernels; and what the kernels refuse. Without a GPU.

Whether the kernels judge rightly is tested in tests/kernels.
"""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medusa_exp.decode import cuda, verifier
from medusa_exp.decode.cuda import CupyKernels, kernels_on
from medusa_exp.decode.kernel_source import find_prebuilt, hash_of, prebuilt_name, source_of
from medusa_exp.decode.launch_plan import Plan, plan_for
from medusa_exp.decode.rule import Judge, Rule
from medusa_exp.decode.verification import verify
from medusa_exp.decode.verification_cupy import ARGUMENTS, Verifier, can_verify
from medusa_exp.decode.verification_host import verify_on_host
from medusa_exp.decode.verifier import choose_verifier
from medusa_exp.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class RecordingKernels:
    """Notes launches, and writes a verdict as kernels do: by address."""

    device = CPU
    num_processors = 132
    has_clusters = True

    def __init__(self):
        self.launches = []

    def launch(self, file, defines, entry, grid, threads, arguments):
        self.launches.append((file, defines, entry, grid, threads, arguments[0].copy()))


@pytest.fixture
def kernels():
    return RecordingKernels()


def arguments(**changed):
    """Return good arguments for Verifier, some changed."""
    return {
        "logits_BNV": torch.zeros(2, 3, 5),
        "tokens_BN": torch.zeros(2, 3, dtype=torch.long),
        "parents_BN": torch.tensor([[-1, 0, 0]]).expand(2, -1),
        "rule": "sampling",
        "uniforms_BN": torch.zeros(2, 3),
    } | changed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rule", "nucleus", "use one of"),
        ("temperature", 0.0, "temperature above 0"),
        ("top_k", 3, "do not filter"),
        ("top_p", 0.5, "do not filter"),
        ("max_depth", -1, "at least 0"),
        ("logits_BNV", torch.zeros(2, 3, 5).double(), "float32, float16 or bfloat16"),
        ("logits_BNV", torch.zeros(2, 3), r"must be \[B, N, V\]"),
        ("logits_BNV", torch.zeros(2, 0, 5), r"must be \[B, N, V\]"),
        ("logits_BNV", torch.zeros(2, 5, 3).transpose(1, 2), "contiguous along V"),
        ("logits_BNV", torch.zeros(2, 257, 5), "at most 65535 sequences of 256 nodes"),
        ("logits_BNV", torch.zeros(2, 3, 5, device="meta"), "on meta, the kernels on cpu"),
        ("tokens_BN", torch.zeros(2, 3), "tokens_BN is torch.float32"),
        ("tokens_BN", torch.zeros(2, 4).long(), "asks for"),
        ("tokens_BN", torch.zeros(3, 2).long().T, "contiguous along N"),
        ("tokens_BN", torch.zeros(2, 3, device="meta").long(), "tokens_BN is on meta"),
        ("parents_BN", torch.zeros(2, 3).int(), "parents_BN is torch.int32"),
        ("uniforms_BN", torch.zeros(2, 3).double(), "uniforms_BN is torch.float64"),
        ("uniforms_BN", torch.zeros(2, 2), "uniforms_BN has shape"),
        ("uniforms_BN", None, "needs uniforms_BN"),
    ],
)
def test_wrong_arguments_are_refused_and_never_launched(kernels, name, value, message):
    with pytest.raises(ValueError, match=message):
        Verifier(kernels)(**arguments(**{name: value}))
    assert kernels.launches == []


@pytest.mark.parametrize(
    "philox", [torch.zeros(3), torch.zeros(2).long(), torch.zeros(6).long()[::2]]
)
def test_a_wrong_state_of_the_random_numbers_is_refused(kernels, philox):
    with pytest.raises(ValueError, match="philox"):
        Verifier(kernels)(**arguments(uniforms_BN=None, philox=philox))
    assert kernels.launches == []


def test_what_the_kernels_are_told(kernels):
    given = arguments(temperature=0.5, max_depth=1)
    given["logits_BNV"] = torch.zeros(2, 4, 8, dtype=torch.bfloat16)[:, 1:, 2:7]
    verdict = Verifier(kernels, Plan("fused", splits=2, threads=64))(**given)
    [(file, defines, entry, grid, threads, told)] = kernels.launches
    assert (file, defines, entry) == ("sampling.cu", ("LOGIT_BFLOAT16",), "fused")
    assert (grid, threads) == ((2, 3, 2), 64)
    assert told["logits"] == given["logits_BNV"].data_ptr()
    assert (told["logits_stride_b"], told["logits_stride_n"]) == (32, 8)
    assert (told["tokens_stride_b"], told["parents_stride_b"]) == (3, 0)
    assert (told["num_nodes"], told["vocab_size"], told["path_length"]) == (3, 5, 2)
    assert told["scale"] == pytest.approx(2 / np.log(2))
    assert told["path"] == verdict.path_BL.data_ptr() and verdict.path_BL.shape == (2, 2)
    assert told["next_token"] == verdict.next_token_B.data_ptr()


def test_nothing_is_allocated_by_the_second_call_of_a_shape(kernels):
    verifier_ = Verifier(kernels)
    first = verifier_(**arguments())
    again = verifier_(**arguments(logits_BNV=torch.ones(2, 3, 5)))
    assert again.path_BL.data_ptr() == first.path_BL.data_ptr()
    one, two = (launch[-1] for launch in kernels.launches[::2])
    same = [name for name in ARGUMENTS.names if one[name] == two[name]]
    assert {"partials", "counters", "path", "num_accepted", "next_token"} <= set(same)


def test_the_plan_fills_the_device(kernels):
    for batch, vocab in ((1, 32000), (1, 128256), (4, 128256), (8, 128256), (64, 151936)):
        plan = plan_for((batch, 64, vocab), 2, kernels)
        if plan.form == "lazy":
            assert batch >= 8 and plan.cluster * batch <= 2 * 132
        else:
            assert 100 <= plan.splits * 22 * batch <= 3 * 132 and batch < 8
    kernels.has_clusters = False
    assert plan_for((8, 64, 128256), 2, kernels).cluster == 1


@pytest.mark.parametrize(
    "plan",
    [
        Plan("three"),
        Plan(threads=48),
        Plan(walk_threads=2048),
        Plan("two", splits=64, walk_threads=32),
        Plan("fused", threads=1024),
        Plan("lazy", cluster=3),
        Plan("lazy", splits=0),
    ],
)
def test_plans_that_the_kernels_would_not_survive(kernels, plan):
    with pytest.raises(ValueError, match="Plan"):
        Verifier(kernels, plan)(**arguments())
    kernels.has_clusters = False
    with pytest.raises(ValueError, match="sm_90"):
        Verifier(kernels, Plan("lazy", cluster=2))(**arguments())
    assert kernels.launches == []


def test_on_the_cpu_auto_walks_on_the_host():
    assert choose_verifier("auto", CPU, is_filtered=False) is verify_on_host
    assert choose_verifier("torch", CPU, is_filtered=False) is verify
    assert choose_verifier("torch", CUDA, is_filtered=False) is verify
    assert Judge(Rule(), CPU)._verify is verify_on_host


def test_auto_uses_the_kernels_where_they_can(monkeypatch, kernels):
    monkeypatch.setattr(verifier, "find_spec", lambda name: name)
    monkeypatch.setattr(verifier, "_kernels", lambda device: Verifier(kernels))
    assert choose_verifier("auto", CUDA, is_filtered=True) is verify
    judge = choose_verifier("auto", CUDA, is_filtered=False)
    judge(**arguments())
    assert len(kernels.launches) == 2
    odd = torch.zeros(2, 3, 5).double()
    assert not can_verify(odd)
    judge(**arguments(logits_BNV=odd))
    assert len(kernels.launches) == 2
    monkeypatch.setattr(verifier, "find_spec", lambda name: None)
    assert choose_verifier("auto", CUDA, is_filtered=False) is verify


def test_cupy_that_cannot_be_had_is_named():
    with pytest.raises(UserError, match="CUDA device"):
        choose_verifier("cupy", CPU, is_filtered=False)
    with pytest.raises(UserError, match=r"decode\.top_k"):
        choose_verifier("cupy", CPU, is_filtered=True)
    with pytest.raises(ValueError, match="verifier=numba"):
        Rule(verifier="numba")


def test_without_cupy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match=r"pip install 'medusa-exp\[cuda\]'"):
        CupyKernels(CUDA)
    kernels_on.cache_clear()


class FakeCupy:
    """What of CuPy the kernels touch."""

    class CompileError(Exception):
        pass

    def __init__(self):
        self.calls, self.codes, self.paths, self.log = [], [], [], None
        self.cuda = SimpleNamespace(
            Device=lambda index: nullcontext(),
            compiler=SimpleNamespace(CompileException=FakeCupy.CompileError),
        )

    def RawModule(self, code=None, path=None, options=()):
        self.codes.append((code, options))
        self.paths.append(path)

        def get_function(entry):
            if self.log is not None:
                raise FakeCupy.CompileError(self.log)

            def kernel(grid, block, arguments, stream):
                self.calls.append((entry, grid, block, arguments, stream.ptr))

            return SimpleNamespace(kernel=kernel)

        return SimpleNamespace(get_function=get_function)


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    streams = iter(range(100, 200))
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: properties,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=next(streams)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_a_launch_goes_to_the_stream_of_the_moment_and_compiles_once(cupy):
    kernels = CupyKernels(torch.device("cuda"))
    assert (kernels.device, kernels.num_processors, kernels.has_clusters) == (CUDA, 132, True)
    told = np.zeros(1, ARGUMENTS)
    for _ in range(2):
        kernels.launch("greedy.cu", ("LOGIT_FLOAT16",), "fused", (1, 2, 3), 64, told)
    kernels.launch("greedy.cu", ("LOGIT_FLOAT16",), "lazy_2", (2, 1, 3), 64, told)
    assert cupy.codes == [(source_of("greedy.cu"), ("-DLOGIT_FLOAT16",))]
    assert [call[-1] for call in cupy.calls] == [100, 101, 102]
    assert cupy.calls[0][:4] == ("fused", (1, 2, 3), (64, 1, 1), (told,))


def test_a_compile_error_shows_the_compilers_log(cupy):
    cupy.log = "greedy.cu(1): error: what is this?"
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_90.*what is this\?"):
        CupyKernels(CUDA).launch("greedy.cu", (), "fused", (1, 1, 1), 32, np.zeros(1, ARGUMENTS))


def test_machine_code_of_the_wheel_is_preferred(cupy, monkeypatch, tmp_path):
    found = tmp_path / "greedy.fatbin"
    monkeypatch.setattr(cuda, "find_prebuilt", lambda *module: found)
    CupyKernels(CUDA).launch("greedy.cu", (), "fused", (1, 1, 1), 32, np.zeros(1, ARGUMENTS))
    assert cupy.paths == [str(found)]


def test_sources_have_no_include_left():
    for file in ("greedy.cu", "sampling.cu", "typical.cu", "commit.cu", "mask.cu"):
        source = source_of(file)
        assert "#include" not in source and "#pragma once" not in source
    assert source_of("greedy.cu").count("struct Arguments") == 1


def test_a_prebuilt_module_is_taken_if_it_fits(tmp_path):
    (tmp_path / "part.cuh").write_text("#pragma once\nint part;\n")
    (tmp_path / "a.cu").write_text('#include "part.cuh"\nint whole;\n')
    name = prebuilt_name("a.cu", ("X", "Y=2"))
    assert name == "a-x-y_2.fatbin"
    assert find_prebuilt("a.cu", ("X", "Y=2"), 90, tmp_path) is None
    entry = {"sha256": hash_of(source_of("a.cu", tmp_path)), "archs": [80, 90]}
    (tmp_path / "prebuilt.json").write_text(json.dumps({name: entry}))
    (tmp_path / name).write_bytes(b"code")
    for capability, fits in (
        (80, True),
        (86, True),
        (89, True),
        (90, True),
        (75, False),
        (100, False),
    ):
        assert (find_prebuilt("a.cu", ("X", "Y=2"), capability, tmp_path) is not None) == fits
    assert find_prebuilt("a.cu", ("X",), 90, tmp_path) is None
    (tmp_path / "part.cuh").write_text("#pragma once\nint changed;\n")
    assert find_prebuilt("a.cu", ("X", "Y=2"), 90, tmp_path) is None


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("sampling", top_k=4), True),
        (Rule("sampling", top_p=0.9), True),
        (Rule("sampling", top_p=1.0), False),
        (Rule("greedy", top_k=4, top_p=0.9), False),
    ],
)
def test_what_filters(rule, expected):
    assert rule.is_filtered is expected
