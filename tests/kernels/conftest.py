"""The kernels on the CPU: compiled once a session, with KERNEL_TEST_FLAGS if that is set."""

import os

import pytest
from kernel_shim import GXX, ShimKernels


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ShimKernels:
    if GXX is None:
        pytest.skip("there is no g++: the kernels cannot be run on the CPU")
    flags = tuple(os.environ.get("KERNEL_TEST_FLAGS", "").split())
    return ShimKernels(tmp_path_factory.mktemp("shim"), flags=flags)
