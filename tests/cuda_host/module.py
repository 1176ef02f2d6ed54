"""Kernels of a built library, launched as CuPy launches them."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from .arrays import DeviceArray, exposed
from .build import DYNAMIC, DYNAMIC_BYTES, HERE
from .elf import ALLOCATED, EXECUTED, OBJECT, THREAD_LOCAL, TLS, Elf
from .stream import stream

GLOBAL, CONSTANT, SHARED = range(3)  # kinds of memory
KINDS = {"p": "pointer", "c": "pointer to const", "i": "int", "u": "unsigned", "f": "float", "s": "struct"}
MOST_THREADS, MOST_SHARED = 1024, 48 << 10  # of a block; bytes, if it does not ask for more
LIMITS = ((2**31 - 1, 65535, 65535), (1024, 1024, 64))  # of a grid, of a block


class KernelError(RuntimeError):
    """What a kernel did wrong, or how it was launched wrongly."""


class Parameter(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint32), ("kind", ctypes.c_char))


class Kernel(ctypes.Structure):
    _fields_ = (("run", ctypes.c_void_p), ("parameters", ctypes.POINTER(Parameter)), ("count", ctypes.c_uint32))


class Region(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_size_t), ("end", ctypes.c_size_t), ("name", ctypes.c_char_p), ("kind", ctypes.c_uint32),
    )  # fmt: skip


class Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(Kernel)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_uint64),
        ("regions", ctypes.POINTER(Region)),
        ("n_regions", ctypes.c_uint64),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_uint64),
    )


class Module:
    """Kernels by name or name expression; `device` gives a launch its `seed` and the `seconds` it may take."""

    def __init__(self, path: Path, device: Any) -> None:
        self.path, self.device = path, device
        self.library = ctypes.CDLL(str(path))
        names = (ctypes.c_char * 0).in_dll(self.library, "cuda_host_names")
        exported = ctypes.string_at(ctypes.addressof(names)).decode().split("\n")
        # A kernel that is not extern "C" is not found by its plain name, as in CuPy.
        found = {n.strip(): i for i, n in enumerate(exported) if n[:1] != " " or hasattr(self.library, n.strip())}
        self.kernels = found
        elf = Elf(path.read_bytes())
        anchor = next(s for s in elf.symbols if s.name == DYNAMIC)
        self.library.cuda_host_shared.restype = ctypes.c_void_p
        self.dynamic = self.library.cuda_host_shared()
        shared_base = self.dynamic - anchor.value
        self.shared = [
            Region(shared_base + s.value, shared_base + s.value + s.size, s.name.encode(), SHARED)
            for s in elf.symbols
            if s.type == TLS and s.section and s.value != anchor.value
        ]
        function = next(s for s in elf.symbols if s.name == "cuda_host_launch")
        base = ctypes.cast(self.library.cuda_host_launch, ctypes.c_void_p).value - function.value
        self.globals = globals_of(elf, base)

    def get_function(self, name: str) -> Function:
        if name not in self.kernels:
            raise KernelError(f"no kernel '{name}' (it needs extern \"C\", or a name expression)")
        return Function(self, name)


class Function:
    """function(grid, block, args, shared_mem=bytes)"""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.kernel = Kernel.in_dll(module.library, f"cuda_host_kernel_{module.kernels[name]}")
        self.parameters = [(p.kind.decode(), p.bytes) for p in self.kernel.parameters[: self.kernel.count]]
        self.max_dynamic_shared_size_bytes = MOST_SHARED

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        grid, block = extents("grid", grid), extents("block", block)
        if math.prod(block) > MOST_THREADS:
            raise KernelError(f"{self.name}: {math.prod(block)} threads in a block, {MOST_THREADS} are possible")
        if not 0 <= shared_mem <= min(self.max_dynamic_shared_size_bytes, DYNAMIC_BYTES):
            raise KernelError(
                f"{self.name}: {shared_mem} bytes of dynamic shared memory, "
                f"max_dynamic_shared_size_bytes is {self.max_dynamic_shared_size_bytes}"
            )
        stream.do(self._run, grid, block, shared_mem, *args)

    def _run(self, grid: Sequence[int], block: Sequence[int], shared_mem: int, *args: Any) -> None:
        buffers = self.pack(args)
        pointers = (ctypes.c_void_p * (len(buffers) + 1))(*(ctypes.addressof(b) for b in buffers))
        dynamic = [Region(self.module.dynamic, self.module.dynamic + shared_mem, b"dynamic shared memory", SHARED)]
        regions = sorted(
            [*merged(self.arrays(args)), *self.module.shared, *self.module.globals, *(dynamic if shared_mem else [])],
            key=lambda r: r.begin,
        )
        error = ctypes.create_string_buffer(8192)
        launch = Launch(
            ctypes.pointer(self.kernel), pointers, (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block),
            self.module.device.seed, self.module.device.seconds, (Region * len(regions))(*regions), len(regions),
            ctypes.cast(error, ctypes.c_char_p), len(error),
        )  # fmt: skip
        if self.module.library.cuda_host_launch(ctypes.byref(launch)):
            raise KernelError(f"{self.name}: {self.readable(error.value.decode())}")

    def pack(self, args: Sequence[Any]) -> list[Any]:
        """Each argument in memory of its own, checked against the kernel's parameter."""
        if len(args) != len(self.parameters):
            raise KernelError(f"{self.name}: {len(args)} arguments for {len(self.parameters)} parameters")
        buffers = []
        for i, (value, (kind, n_bytes)) in enumerate(zip(args, self.parameters, strict=True)):
            if isinstance(value, DeviceArray):
                given, fits = np.uint64(value.ctypes.data), kind in "pc"
            elif isinstance(value, np.generic | bool | int | float):  # Python's numbers have 64 bits, as in CuPy
                given = np.asarray(value)[()]
                fits = given.nbytes == n_bytes and (kind == "s" or (given.dtype.kind == "f") == (kind == "f"))
            else:
                raise TypeError(f"{self.name}: argument {i}: Unsupported type {type(value)}")
            if not fits:
                what = f"{type(value).__name__} for a parameter of {n_bytes} bytes ({KINDS[kind]})"
                raise KernelError(f"{self.name}: argument {i}: {what}")
            data = given.tobytes()
            buffers.append(ctypes.create_string_buffer(data, len(data)))
        return buffers

    def arrays(self, args: Sequence[Any]) -> list[Region]:
        """The memory of the arguments, and of arrays that the kernel may know by their addresses."""
        kinds = [CONSTANT if kind == "c" else GLOBAL for kind, _ in self.parameters]
        given = [(f"argument {i}", a, kind) for i, (a, kind) in enumerate(zip(args, kinds, strict=True))]
        given += [("an array known by its address", ref(), GLOBAL) for ref in list(exposed.values())]
        return [
            Region(*byte_bounds(a), name.encode(), kind)
            for name, a, kind in given
            if isinstance(a, DeviceArray) and a.size
        ]

    def readable(self, text: str) -> str:
        """Addresses of code as file:line, C++ names as in the source."""
        text = re.sub(r"@([0-9a-f]+)@", lambda m: line_of(self.module.path, m[1]), text)
        return re.sub(r"\b_Z\w+", lambda m: tool("c++filt", m[0]).strip() or m[0], text)


def extents(what: str, given: Sequence[int]) -> tuple[int, ...]:
    sizes = (*(int(n) for n in given), 1, 1)[:3]
    if not all(0 < n <= most for n, most in zip(sizes, LIMITS[what == "block"], strict=True)):
        raise KernelError(f"{what} {sizes} is empty or too large")
    return sizes


def merged(regions: list[Region]) -> list[Region]:
    """Views of the same memory become one, constant if all are."""
    out: list[Region] = []
    for r in sorted(regions, key=lambda r: r.begin):
        if out and r.begin < out[-1].end:
            out[-1].end, out[-1].kind = max(out[-1].end, r.end), min(out[-1].kind, r.kind)
            if r.name not in out[-1].name:
                out[-1].name += b" = " + r.name
        else:
            out.append(r)
    return out


def globals_of(elf: Elf, base: int) -> list[Region]:
    """__device__ and __constant__ variables, and the constants of the source."""
    regions = []
    for i, section in enumerate(elf.sections):
        if not section.flags & ALLOCATED or section.flags & (EXECUTED | THREAD_LOCAL):
            continue
        if section.name.startswith(".rodata"):
            start = base + section.address
            regions.append(Region(start, start + section.size, b"constants", CONSTANT))
        elif section.name in (".data", ".bss", ".data.rel.ro"):
            regions += [
                Region(base + s.value, base + s.value + s.size, s.name.encode(), GLOBAL)
                for s in elf.symbols
                if s.type == OBJECT and s.section == i and s.size and "cuda_host" not in s.name
            ]
    return regions


def line_of(library: Path, address: str) -> str:
    """The line of an instruction in the kernel's source, not in the headers here whose functions it calls."""
    lines = tool("addr2line", "-i", "-e", str(library), f"0x{address}").splitlines()
    own = [x.split(" (")[0] for x in lines if not x.startswith(str(HERE))]
    return Path(own[0]).name if own else f"+0x{address}"


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
