"""Ops in CUDA, through CuPy. Empty until the GPU engine is built; `--device gpu` says so."""
