"""Ops in Numba: kernels compiled for this CPU on first use, then kept on disk."""

from .compiled import may_compile
from .ops import CpuOps

__all__ = ["CpuOps", "may_compile"]
