"""Where the ahead-of-time CUDA build belongs; all else about the build is in pyproject.toml.

The kernels are compiled when they are first used. MEDUSA_EXP_CUDA_ARCHS="80;90" is the name kept
for compiling them into the wheel instead.
"""

import os

from setuptools import setup

if os.environ.get("MEDUSA_EXP_CUDA_ARCHS"):
    # Refused, since a wheel that lacks what was asked for would only show it at run time.
    raise SystemExit(
        "MEDUSA_EXP_CUDA_ARCHS is set, but kernels cannot be compiled into the wheel yet: "
        "unset it, and they are compiled when they are first used."
    )

setup()
