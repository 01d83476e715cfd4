"""Verification and the rest of a captured step as CUDA kernels, through CuPy."""
