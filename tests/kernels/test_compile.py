"""What NVRTC makes of the kernels, with the flags that CuPy gives it; no GPU is needed."""

import functools
import importlib.util
import io
import re
import subprocess
from pathlib import Path

import pytest
import torch

from medusa_exp.decode.cuda.launch import DEFINES
from medusa_exp.decode.cuda.source import MODULES, source_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None,
    reason="needs CuPy and NVRTC: pip install --group kernels",
)

ARCHS = ("80", "90", "100")
BUDGET = 64
"""Registers of a thread, where a block may have 1024."""
STEP = [module for module in MODULES if module[0] in ("draws.cu", "mask.cu", "commit.cu")]
OF_ROWS = [module for module in MODULES if module not in STEP]
"""That read rows of logits, in clusters of blocks: verification, and what goes before."""


@functools.cache
def compiled(file: str, defines: tuple[str, ...], arch: str) -> tuple[bytes, str]:
    """Return machine code and the assembler's report."""
    from cupy._core import core
    from cupy.cuda.compiler import _NVRTCProgram

    options = core.assemble_cupy_compiler_options(tuple(f"-D{word}" for word in defines))
    options += ("-ftz=true", f"-arch=sm_{arch}", "--device-as-default-execution-space")
    options += ("--ptxas-options=-v",)
    report = io.StringIO()
    program = _NVRTCProgram(source_of(file), file, method="cubin")
    code, _ = program.compile(options, report)
    return code + b"\0", report.getvalue()  # CuPy takes the code for text, and drops its last byte


def resources(report: str) -> dict[str, tuple[int, int]]:
    """Return each entry's registers and bytes of spills."""
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return {name: (int(used), int(stores) + int(loads)) for name, stores, loads, used in found}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("file", "defines"), OF_ROWS)
def test_what_reads_rows_fits_its_registers(file, defines, arch):
    entries = resources(compiled(file, defines, arch)[1])
    clusters = (1,) if arch == "80" else (1, 2, 4, 8)
    name = {"filter.cu": "filter", "topk.cu": "topk"}.get(file, "verify")
    assert set(entries) == {f"{name}_{size}" for size in clusters}
    for entry, (registers, spilled) in entries.items():
        assert spilled == 0, f"{entry} spills {spilled} bytes"
        assert registers <= BUDGET, f"{entry} needs {registers} registers"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("file", "defines"), STEP)
def test_the_kernels_around_the_backbone_fit_too(file, defines, arch):
    [(registers, spilled)] = resources(compiled(file, defines, arch)[1]).values()
    assert spilled == 0 and registers <= BUDGET


def disassembled(code: bytes, entry: str, folder: Path) -> list[str]:
    """Return an entry's instructions, predicates left out."""
    import nvidia  # the folder that NVIDIA's packages share

    tools = [Path(place, "cu13", "bin", "nvdisasm") for place in nvidia.__path__]
    tool = next((tool for tool in tools if tool.is_file()), None)
    if tool is None:
        pytest.skip("there is no nvdisasm: pip install --group kernels")
    (folder / "code.cubin").write_bytes(code)
    text = subprocess.run(
        [tool, "-c", folder / "code.cubin"], capture_output=True, text=True, check=True
    ).stdout
    body = text.split(f"\n.text.{entry}:", 1)[1].split("\n.section", 1)[0]
    return re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("file", "entry"),
    [("greedy.cu", "verify_1"), ("sampling.cu", "verify_1"), ("topk.cu", "topk_1")],
)
def test_four_loads_are_in_flight(file, entry, arch, tmp_path):
    """A row streams in 16-byte loads, four of them issued before anything is done with one."""
    code, _ = compiled(file, DEFINES[torch.bfloat16], arch)
    instructions = disassembled(code, entry, tmp_path)
    assert len(instructions) > 100
    loads = [i for i, name in enumerate(instructions) if name.startswith("LDG.E.128.CONSTANT")]
    assert len(loads) >= 4
    first, last = loads[0], loads[3]
    between = {name.split(".")[0] for name in instructions[first : last + 1]}
    assert last - first <= 40
    assert not between & {"FMNMX", "FMNMX3", "FADD", "FMUL", "FFMA", "FSETP", "MUFU", "BAR", "BRA"}
