"""CUDA C++ built with g++ into a library that runs the kernels on the CPU, every access to memory checked.

The source is preprocessed with cuda_host.h before it, kernels are found in the result and exported with a description
of their parameters, and the whole is compiled with the calls of -fsanitize=thread before each load and store, which
memory.cpp answers instead of libtsan. In the assembly each shared array gets a gap after it, so that the end of one is
not the start of the next; arrays of dynamic shared memory, undefined until then, become names of one buffer.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from .elf import FUNCTION, TLS, Elf

HERE = Path(__file__).parent
RUNTIME = ("fibers.cpp", "meetings.cpp", "memory.cpp", "undefined.cpp")
DYNAMIC = "cuda_host_dynamic_shared"
DYNAMIC_BYTES = 227 << 10  # what a block may have on Hopper
GAP = "\t.zero\t64"

CHECKS = (
    "thread,alignment,null,bounds,shift-exponent,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow"
)
FLAGS = [
    "-std=c++17",
    "-O1",
    "-gdwarf-4",
    "-fPIC",
    "-fno-exceptions",
    "-ffp-contract=off",
    "-w",
    f"-fsanitize={CHECKS}",
]
# Locals that nobody wrote hold a pattern; volatile accesses are told from others; thread_local without initialisers.
WHERE_KNOWN = [
    "-mllvm=-tsan-distinguish-volatile=1",
    "-ftrivial-auto-var-init=pattern", "--param=tsan-distinguish-volatile=1", "-fno-extern-tls-init", "-fno-gnu-unique",
]  # fmt: skip
# What __global__ becomes, and after it the kernel's name; a template's angle brackets may come before.
KERNEL = re.compile(
    r"(?P<template>template\s*<[^;{}]*>\s*)?(?:\b(?:extern\s*\"C\"|static|inline)\s*)*"
    r"__attribute__\(\(__used__, noinline\)\)[^;{}()]*?\b(?P<name>\w+)\s*\("
)


class BuildError(RuntimeError):
    """The compiler's messages."""


def missing_compiler() -> str:
    """Why nothing can be built on this machine, or nothing."""
    return "" if shutil.which(compiler()) else f"no {compiler()} to build kernels for the CPU"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def build(
    source: str, name: str, expressions: tuple[str, ...], options: tuple[str, ...], cache_dir: Path
) -> tuple[Path, list[str]]:
    """The library's path, and which kernels it exports as cuda_host_kernel_<i>: first the name expressions."""
    given = [o for o in options if re.match(r"-[DUI]|--(define-macro|undefine-macro|include-path)=", o)]
    flags = [*FLAGS, *known_flags(compiler())]
    text = run(
        [compiler(), *flags, "-E", "-x", "c++", f"-I{HERE}", *given, "-include", HERE / "cuda_host.h", "-"],
        f'#line 1 "{name}"\n{source}',
    )
    kernels = list(expressions) + [m["name"] for m in KERNEL.finditer(text) if not m["template"]]
    text += f'\n# 1 "exports of {name}"\n'
    text += "".join(export(i, kernel) for i, kernel in enumerate(kernels))
    objects = runtime_objects(cache_dir)
    library = cache_dir / f"{digest(text, *flags, *map(str, objects))}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            link(text, flags, objects, Path(scratch)).replace(library)
    exported = {s.name for s in Elf(library.read_bytes()).symbols if s.type == FUNCTION}
    # A kernel with a mangled name is not found by its plain one, as in CuPy.
    return library, [k if k in expressions or k in exported else "" for k in kernels]


def export(number: int, kernel: str) -> str:
    return (
        f'extern "C" const ::cuda_host::Kernel cuda_host_kernel_{number} = ::cuda_host::Described<&{kernel}>::value;\n'
    )


def link(text: str, flags: Sequence[str], objects: Sequence[Path], scratch: Path) -> Path:
    assembly, kernels, dynamic, library = (scratch / n for n in ("k.s", "k.o", "dynamic.s", "k.so"))
    run([compiler(), *flags, "-x", "c++", "-S", "-o", assembly, "-"], text)
    assembly.write_text(with_gaps(assembly.read_text("latin-1")), "latin-1")  # strings may hold any byte
    run([compiler(), "-c", "-o", kernels, assembly])
    names = [DYNAMIC] + [s.name for s in Elf(kernels.read_bytes()).symbols if s.type == TLS and s.section == 0]
    dynamic.write_text(dynamic_shared(names))
    run([compiler(), "-shared", "-o", library, kernels, dynamic, *objects])
    return library


def with_gaps(assembly: str) -> str:
    """Unused bytes after every thread-local (that is, shared) variable."""
    lines, shared = [], False
    for line in assembly.splitlines():
        if directive := re.match(r"\s*\.(?:section\s+[^,]+(?:,\s*\"(\w*)\")?|text\b|data\b|bss\b)", line):
            shared = "T" in (directive[1] or "")
        lines.append(line)
        if shared and re.match(r"\s*\.zero\b", line):
            lines.append(GAP)
    return "\n".join(lines) + "\n"


def dynamic_shared(names: Iterable[str]) -> str:
    """Assembly: one buffer under several names."""
    labels = "".join(
        f"\t.globl\t{n}\n\t.type\t{n}, %object\n\t.size\t{n}, {DYNAMIC_BYTES}\n{n}:\n" for n in dict.fromkeys(names)
    )
    note = '\t.section\t.note.GNU-stack,"",%progbits\n'
    return f'\t.section\t.tbss,"awT",%nobits\n\t.balign\t128\n{labels}\t.zero\t{DYNAMIC_BYTES}\n{GAP}\n{note}'


def runtime_objects(cache_dir: Path) -> list[Path]:
    """The runtime, compiled once."""
    key = digest(compiler(), *(f.read_text() for f in sorted(HERE.iterdir()) if f.suffix in (".h", ".cpp")))
    objects = []
    for name in RUNTIME:
        made = cache_dir / f"{key}-{name}.o"
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
                part = Path(scratch) / "part.o"
                flags = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE"]  # fortified longjmp knows no fibers
                run([compiler(), *flags, "-c", HERE / name, "-o", part])
                part.replace(made)
        objects.append(made)
    return objects


@cache
def known_flags(program: str) -> list[str]:
    def accepts(flags: list[str]) -> bool:
        command = [program, *flags, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return WHERE_KNOWN if accepts(WHERE_KNOWN) else [flag for flag in WHERE_KNOWN if accepts([flag])]


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def run(command: Sequence[str | Path], text: str = "") -> str:
    done = subprocess.run([str(c) for c in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stderr)
    return done.stdout
