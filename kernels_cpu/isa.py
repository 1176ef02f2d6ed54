"""Which vector instructions the kernels use: all that this CPU has, or fewer if MINIRT_ISA says so.

MINIRT_ISA is there for tests and for machines that misreport themselves: avx512vnni, avx512, avxvnni, avx2, neon, or
portable, which every CPU of the architecture runs. Unset, or `native`, takes what there is.
"""

from __future__ import annotations

import os
import platform

import llvmlite.binding as llvm
import numba

from minirt.errors import UsageError

_V3 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")

# name -> (the CPU LLVM compiles for, what this one must have for it)
SETS: dict[str, tuple[str, tuple[str, ...]]] = (
    {
        "portable": ("x86-64", ()),
        "avx2": ("x86-64-v3", _V3),
        "avxvnni": ("x86-64-v3", (*_V3, "avxvnni")),
        "avx512": ("x86-64-v4", _V4),
        "avx512vnni": ("x86-64-v4", (*_V4, "avx512vnni")),
    }
    if X86
    else {"portable": ("generic", ()), "neon": ("generic", ("neon",)), "dotprod": ("generic", ("neon", "dotprod"))}
)
_SSE = ("sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")


def supported(name: str) -> bool:
    """Whether this CPU has what the set needs."""
    host = llvm.get_host_cpu_features()
    return all(host.get(feature) for feature in SETS[name][1])


def _choose() -> frozenset[str]:
    """The features to use. Tells Numba, which must not have compiled anything before."""
    name = os.environ.get("MINIRT_ISA", "") or "native"
    host = llvm.get_host_cpu_features()
    if name == "native":
        if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # told to compile for another CPU than this one
            return frozenset()
        return frozenset(feature for feature, there in host.items() if there)
    if name not in SETS:
        raise UsageError(f"MINIRT_ISA={name} is not one of: native, {', '.join(SETS)}")
    if not supported(name):
        missing = ", ".join(feature for feature in SETS[name][1] if not host.get(feature))
        raise UsageError(f"MINIRT_ISA={name}: this CPU has no {missing}")
    cpu, features = SETS[name]
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = cpu, ",".join(f"+{feature}" for feature in features)
    return frozenset(features) | (frozenset(_SSE) if name != "portable" and X86 else frozenset())


FEATURES = _choose()


def has(*features: str) -> bool:
    return FEATURES.issuperset(features)
