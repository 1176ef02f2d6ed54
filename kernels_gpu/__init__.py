"""Ops in CUDA: kernels in the .cu files beside this one, compiled by NVRTC through CuPy when they are first used."""
