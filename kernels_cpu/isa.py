"""Which vector instructions the kernels use: all that this CPU has, or fewer if MINIRT_ISA says so.

MINIRT_ISA is there for tests and for machines that misreport themselves: avx512vnni, avx512, avxvnni, avx2, neon,
dotprod, or portable, which every CPU of the architecture runs. Unset, or `native`, takes what there is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba.core.codegen import get_host_cpu_features

from minirt.errors import UsageError

_V3 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_NEON = ("fp-armv8", "neon")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")

# name -> (the CPU LLVM compiles for, what this one must have for it)
SETS: dict[str, tuple[str, tuple[str, ...]]] = {"portable": ("x86-64" if X86 else "generic", ())}
if X86:
    SETS |= {
        "avx2": ("x86-64-v3", _V3),
        "avxvnni": ("x86-64-v3", (*_V3, "avxvnni")),
        "avx512": ("x86-64-v4", _V4),
        "avx512vnni": ("x86-64-v4", (*_V4, "avx512vnni")),
    }
elif ARM:
    SETS |= {"neon": ("generic", _NEON), "dotprod": ("generic", (*_NEON, "dotprod"))}
_TILES = ("amx-tile", "amx-bf16", "amx-int8")
_SSE = ("sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")


def host_features() -> frozenset[str]:
    """What this CPU has and the system lets a process use, by LLVM's names."""
    try:
        found = {feature for feature, there in llvm.get_host_cpu_features().items() if there}
    except RuntimeError:  # LLVM cannot tell on this system
        found = set()
    if ARM:
        found |= {*_NEON, "dotprod"} if _arm_has_dotprod() else set(_NEON)
    if found.issuperset(_TILES) and not _may_use_tiles():
        found -= {*_TILES}
    return frozenset(found)


def _may_use_tiles() -> bool:
    """Asks Linux for the tile registers of AMX, for all threads: a process that has not must not touch them."""
    arch_prctl, request, tile_data = (ctypes.c_long(number) for number in (158, 0x1023, 18))
    try:
        return sys.platform == "linux" and ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0
    except (OSError, AttributeError):
        return False


def _arm_has_dotprod() -> bool:
    """LLVM does not look."""
    if sys.platform == "darwin":
        return True
    try:
        return "asimddp" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def _choose() -> frozenset[str]:
    """The features to use. Tells Numba, which must not have compiled anything before."""
    name, config = os.environ.get("MINIRT_ISA", "") or "native", numba.config
    host = host_features()
    if name == "native":
        if config.CPU_NAME or config.CPU_FEATURES:  # told to compile for another CPU than this one
            return frozenset()
        if X86 and not config.ENABLE_AVX:
            return host & frozenset(_SSE)
        if "dotprod" in host:
            config.CPU_FEATURES = f"{get_host_cpu_features()},+dotprod".lstrip(",")
        return host
    if name not in SETS:
        raise UsageError(f"MINIRT_ISA={name} is not one of: native, {', '.join(SETS)}")
    cpu, features = SETS[name]
    missing = [feature for feature in features if feature not in host]
    if missing:
        raise UsageError(f"MINIRT_ISA={name}: this CPU has no {', '.join(missing)}")
    config.CPU_NAME, config.CPU_FEATURES = cpu, ",".join(f"+{feature}" for feature in features)
    return frozenset(features) | (frozenset(_SSE) if name != "portable" and X86 else frozenset())


FEATURES = _choose()


def has(*features: str) -> bool:
    return FEATURES.issuperset(features)
