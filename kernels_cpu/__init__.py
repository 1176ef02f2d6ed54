"""Ops in Numba: kernels compiled for this CPU on first use, then kept on disk."""

from .compiled import most_threads
from .ops import CpuOps

__all__ = ["CpuOps", "most_threads"]
