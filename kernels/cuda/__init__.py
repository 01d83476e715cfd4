"""CUDA C++ source of the kernels, shipped as medusa_exp.kernels.

kernels/README.md has the contract. The folder is not kernels itself: `python -m` looks for modules
where it is started, and transformers imports a library of that name.
"""
