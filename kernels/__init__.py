"""CUDA C++ source of the kernels, shipped as medusa_exp.kernels; see README.md here."""
