"""CUDA C++ source of the CuPy RawKernels, shipped as medusa_exp.kernels."""
