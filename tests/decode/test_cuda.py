"""How kernels are found, compiled and launched, with a CuPy that only notes what it is asked."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medusa_exp.decode.cuda import runtime
from medusa_exp.decode.cuda.runtime import CupyKernels, kernels_on
from medusa_exp.decode.cuda.source import find_prebuilt, hash_of, prebuilt_name, source_of
from medusa_exp.decode.cuda.verify import ARGUMENTS
from medusa_exp.errors import UserError

CUDA = torch.device("cuda", 0)


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
        kernels.launch("greedy.cu", ("LOGIT_FLOAT16",), "verify_1", (1, 2, 3), 64, told)
    kernels.launch("greedy.cu", ("LOGIT_FLOAT16",), "verify_2", (2, 1, 3), 64, told)
    assert cupy.codes == [(source_of("greedy.cu"), ("-DLOGIT_FLOAT16",))]
    assert [call[-1] for call in cupy.calls] == [100, 101, 102]
    assert cupy.calls[0][:4] == ("verify_1", (1, 2, 3), (64, 1, 1), (told,))


def test_a_compile_error_shows_the_compilers_log(cupy):
    cupy.log = "greedy.cu(1): error: what is this?"
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_90.*what is this\?"):
        CupyKernels(CUDA).launch("greedy.cu", (), "verify_1", (1, 1, 1), 32, np.zeros(1, ARGUMENTS))


def test_machine_code_of_the_wheel_is_preferred(cupy, monkeypatch, tmp_path):
    found = tmp_path / "greedy.fatbin"
    monkeypatch.setattr(runtime, "find_prebuilt", lambda *module: found)
    CupyKernels(CUDA).launch("greedy.cu", (), "verify_1", (1, 1, 1), 32, np.zeros(1, ARGUMENTS))
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
