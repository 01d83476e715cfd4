"""Where the ahead-of-time CUDA build belongs; all else about the build is in pyproject.toml.

MEDUSA_EXP_CUDA_ARCHS="80;90" is the name kept for compiling kernels into the wheel. There are no
kernels yet.
"""

import os

from setuptools import setup

if os.environ.get("MEDUSA_EXP_CUDA_ARCHS"):
    # Refused, since a wheel that lacks what was asked for would only show it at run time.
    raise SystemExit("MEDUSA_EXP_CUDA_ARCHS is set, but there are no kernels to compile: unset it.")

setup()
