"""CUDA C++ source of the kernels, shipped as medusa_exp.kernels; README.md here is their contract."""
