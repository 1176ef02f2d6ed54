"""From a device's name to the Ops that compute there. Only `minirt.llama` asks."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from .errors import ModelError, UsageError
from .ops import Ops

DEVICES = ("auto", "cpu", "gpu", "reference")


def open_ops(device: str, threads: int | None) -> Ops:
    """The Ops of a device: auto is a card if there is one and CuPy is installed, else the CPU.

    Raises UsageError on an unknown name or an impossible thread count, ModelError if a card was asked for in vain.
    """
    if device not in DEVICES:
        raise UsageError(f"unknown device '{device}' (one of: {', '.join(DEVICES)})")
    if device == "gpu":
        return _card()
    n_cpu = usable_cpus()
    if threads is not None and not 1 <= threads <= n_cpu:
        raise UsageError(f"--threads {threads} is out of range (1 to {n_cpu}, the CPUs this process may use)")
    if device == "auto" and has_cupy():
        try:
            return _card()
        except ModelError:
            pass
    if device == "reference":
        from .reference import ReferenceOps

        return ReferenceOps()
    from kernels_cpu import CpuOps, may_compile

    if not may_compile():
        raise UsageError("NUMBA_DISABLE_JIT is set, and the CPU kernels must be compiled; or use --device reference")
    return CpuOps(threads or physical_cores())


def has_cupy() -> bool:
    """Whether it is installed; importing it to find out takes half a second."""
    return importlib.util.find_spec("cupy") is not None


def has_card() -> bool:
    """Whether `auto` is a card."""
    if not has_cupy():
        return False
    try:
        _card()
    except ModelError:
        return False
    return True


def _card() -> Ops:
    from kernels_gpu import open_card

    return open_card()


def compilations() -> tuple[int, int]:
    """How many kernels this process has compiled, and how many of those could not be kept for the next one."""
    if "kernels_cpu" not in sys.modules:
        return 0, 0
    from kernels_cpu import compiled

    return len(compiled.compilations), len(compiled.unkept)


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Usable CPUs, a core with two hardware threads counted once: a second one adds no memory bandwidth."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)
