"""CUDA C++ compiled for GPUs that are not there, by NVRTC from its wheel, and what the kernels need of such a GPU."""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda_host.elf import Elf

REGISTERS, FRAME = 0x2F, 0x11  # attributes in .nv.info: of a symbol, a count
WITH_SIZE = 4  # the format of attributes with a payload; the others have two bytes of value


class NvrtcError(RuntimeError):
    """The compiler's messages."""


@dataclass(frozen=True)
class Resources:
    """Of a kernel: registers of a thread, bytes of a block's static shared memory, bytes of a thread's local memory
    (its stack frame), and bytes that spilling registers stores to it and loads from it."""

    registers: int
    shared: int
    local: int
    spill: int


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    resources: dict[str, Resources]  # by the kernel's name or name expression


class Nvrtc:
    """A library of NVRTC, and the headers that belong to it if they are there."""

    def __init__(self, library: Path, headers: Path | None) -> None:
        self.library, self.headers = ctypes.CDLL(str(library)), headers
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", archs)
        self.archs = tuple(archs)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(
        self, source: str, arch: int, name_expressions: Sequence[str] = (), options: Sequence[str] = ()
    ) -> Compiled:
        """For compute capability `arch` (75 for 7.5). Raises NvrtcError with the compiler's messages."""
        with self._program(source, name_expressions, (f"-arch=sm_{arch}", "--ptxas-options=-v", *options)) as program:
            names = {self._lowered(program, name): name for name in name_expressions}
            log = self._bytes("ProgramLog", program).decode()
            used = {names.get(kernel, kernel): r for kernel, r in resources(log).items()}
            return Compiled(self._bytes("CUBIN", program), used)

    def ptx(self, source: str, arch: int, options: Sequence[str] = ()) -> str:
        """The instructions that are then assembled for compute capability `arch`."""
        with self._program(source, (), (f"-arch=compute_{arch}", *options)) as program:
            return self._bytes("PTX", program).decode()

    @contextmanager
    def _program(
        self, source: str, name_expressions: Sequence[str], options: Sequence[str]
    ) -> Iterator[ctypes.c_void_p]:
        """Compiled with the flags that CuPy and minirt add."""
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        try:
            for name in name_expressions:
                self._call("AddNameExpression", program, name.encode())
            own = [f"-I{self.headers}"] if self.headers else []
            flags = ["-std=c++17", "-ftz=true", *own, *options]
            argv = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            if self.library.nvrtcCompileProgram(program, len(flags), argv):
                raise NvrtcError(self._bytes("ProgramLog", program).decode())
            yield program
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _call(self, function: str, *args: object) -> None:
        if error := getattr(self.library, f"nvrtc{function}")(*args):
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise NvrtcError(f"nvrtc{function}: {self.library.nvrtcGetErrorString(error).decode()}")

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw if what == "CUBIN" else buffer.value

    def _lowered(self, program: ctypes.c_void_p, name: str) -> str:
        lowered = ctypes.c_char_p()
        self._call("GetLoweredName", program, name.encode(), ctypes.byref(lowered))
        return (lowered.value or b"").decode()


@cache
def installed() -> tuple[Nvrtc, ...]:
    """Those in the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime (CUDA 13), or with -cu12 (CUDA 12)."""
    found = []
    for site in sys.path:
        for library in sorted(Path(site).glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True):
            own = library.parents[1] / "include"
            headers = [h for h in (own, library.parents[2] / "cuda_runtime/include") if (h / "cuda_fp16.h").exists()]
            found.append(Nvrtc(library, headers[0] if headers else None))
    return tuple(found)


def nvrtc_for(arch: int, headers: bool = False) -> Nvrtc | None:
    """One that can compile for this compute capability, and has CUDA's headers if they are wanted; if it is there."""
    return next((n for n in installed() if arch in n.archs and (n.headers or not headers)), None)


def resources(log: str) -> dict[str, Resources]:
    """What `ptxas -v` says of each kernel, by its name in the cubin."""

    def number(pattern: str, text: str) -> int:
        return sum(int(n) for n in re.findall(pattern, text))

    parts = re.split(r"Compiling entry function '(\S+)'", log)
    return {
        name: Resources(
            number(r"Used (\d+) registers", text),
            number(r"(\d+) bytes smem", text),
            number(r"(\d+) bytes stack frame", text),
            number(r"(\d+) bytes spill", text),
        )
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def registers_and_local(cubin: bytes) -> dict[str, tuple[int, int]]:
    """The same of any cubin, read from its attributes: kernel -> registers and bytes of local memory of a thread."""
    elf = Elf(cubin)
    data = elf.content(next(s for s in elf.sections if s.name == ".nv.info"))
    counts: dict[tuple[int, int], int] = {}
    offset = 0
    while offset < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, offset)
        offset += 4
        if form == WITH_SIZE:
            if attribute in (REGISTERS, FRAME):
                symbol, count = struct.unpack_from("<II", data, offset)
                counts[attribute, symbol] = count
            offset += size
    return {
        elf.symbols[symbol].name: (count, counts.get((FRAME, symbol), 0))
        for (attribute, symbol), count in counts.items()
        if attribute == REGISTERS
    }
