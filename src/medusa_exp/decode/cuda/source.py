"""Source of the CUDA kernels, and the machine code compiled from it ahead of time.

A wheel that was built with MEDUSA_EXP_CUDA_ARCHS has machine code beside the sources; prebuilt.json
has the hash of the text each file was compiled from, and the devices it is for. setup.py, which
writes it, loads this file without the package: it imports only the standard library.
"""

import hashlib
import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

MODULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    *(
        (f"{name}.cu", (f"LOGIT_{dtype}",))
        for name in ("greedy", "sampling", "traversal", "typical", "filter", "topk")
        for dtype in ("FLOAT32", "FLOAT16", "BFLOAT16")
    ),
    ("draws.cu", ("LOGIT_FLOAT32",)),
    ("mask.cu", ()),
    *(("commit.cu", (f"UNIT_BYTES={size}",)) for size in (16, 4, 2)),
)
"""Every kernel file with the macros it is compiled with."""

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def folder() -> Traversable:
    """Return the folder of the sources."""
    return files("medusa_exp.kernels")


def source_of(file: str, where: Traversable | Path | None = None) -> str:
    """Return a kernel file with each `#include` replaced by that file's text, each file once.

    The compiler then needs no include path, and CuPy's cache, which looks at this text alone,
    notices every change.
    """
    where = folder() if where is None else where
    seen: set[str] = set()

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (where / name).read_text("utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: text_of(found[1]), text)

    return text_of(file)


def hash_of(source: str) -> str:
    """Return the hash that ties a prebuilt module to its source."""
    return hashlib.sha256(source.encode()).hexdigest()


def prebuilt_name(file: str, defines: tuple[str, ...]) -> str:
    """Return the file name of a kernel file compiled ahead of time."""
    return (
        "-".join([Path(file).stem, *(word.lower().replace("=", "_") for word in defines)])
        + ".fatbin"
    )


def find_prebuilt(
    file: str, defines: tuple[str, ...], capability: int, where: Traversable | Path | None = None
) -> Traversable | Path | None:
    """Return the module compiled ahead of time, if it fits this source and a device.

    Machine code runs on devices of the same generation and of the same or a later number in it:
    what is made for 80 runs on 86 and 89, not on 90.
    """
    where = folder() if where is None else where
    record = where / "prebuilt.json"
    if not record.is_file():
        return None
    entry = json.loads(record.read_text("utf-8")).get(prebuilt_name(file, defines))
    if entry is None or entry["sha256"] != hash_of(source_of(file, where)):
        return None
    fits = any(arch // 10 == capability // 10 and arch <= capability for arch in entry["archs"])
    return where / prebuilt_name(file, defines) if fits else None
