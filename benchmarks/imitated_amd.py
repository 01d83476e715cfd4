"""Let torch's MKL take its kernels for AMD's Zen on a processor of Intel's."""

import ctypes
import struct
from pathlib import Path

import torch

_ANSWERS = {"mkl_serv_intel_cpu_true": 0, "mkl_serv_intel_cpu": 0, "mkl_serv_cpuiszen": 1}
"""MKL's questions about the processor, and what a Zen answers. Private: MKL in torch 2.13."""
_UNASKED = -1


def imitate_amd() -> None:
    """Answer MKL's questions as a Zen would, before its first product, on x86-64 Linux.

    It asks each once and keeps the answer in a variable, which the first instruction of the
    question's function reads.

    Raises:
        RuntimeError: MKL has asked already, or this torch was built otherwise.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        kept = {question: _answer_of(getattr(library, question)) for question in _ANSWERS}
    except (OSError, AttributeError, ValueError) as error:
        raise RuntimeError(f"{path}: no MKL that can be told so ({error}).") from error
    if asked := [name for name, one in kept.items() if one.value not in (_UNASKED, _ANSWERS[name])]:
        raise RuntimeError(f"{path}: {', '.join(asked)} has been asked before.")
    for question, one in kept.items():
        one.value = _ANSWERS[question]


def _answer_of(function: "ctypes._FuncPointer") -> ctypes.c_int:
    start = ctypes.cast(function, ctypes.c_void_p).value or 0
    code = ctypes.string_at(start, 64)
    place = code.index(b"\x8b\x05")  # mov eax, [rip + distance]
    (distance,) = struct.unpack_from("<i", code, place + 2)
    return ctypes.c_int.from_address(start + place + 6 + distance)
