"""Ops in CUDA: kernels in the .cu files beside this one, compiled by NVRTC through CuPy when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops import GpuOps

__all__ = ["open_card"]


def open_card() -> GpuOps:
    """The Ops of the first card. Raises ModelError if CuPy, a driver or a card is missing, or too old."""
    from .cuda import CudaDevice
    from .ops import GpuOps

    return GpuOps(CudaDevice())
