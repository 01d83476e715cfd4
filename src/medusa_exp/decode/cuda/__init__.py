"""CUDA kernels of a decoding step: verification, tree mask and KV-cache commit, through CuPy."""
