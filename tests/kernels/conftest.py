"""The kernels on the CPU: compiled once a session."""

import pytest
from kernel_shim import GXX, ShimKernels


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ShimKernels:
    if GXX is None:
        pytest.skip("there is no g++: the kernels cannot be run on the CPU")
    return ShimKernels(tmp_path_factory.mktemp("shim"))
