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

from .elf import TLS, Elf

HERE = Path(__file__).parent
RUNTIME = ("copies.cpp", "fibers.cpp", "meetings.cpp", "memory.cpp", "undefined.cpp")
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
    "-fno-var-tracking",  # messages tell lines, not variables; finding where these are takes a third of the time
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
KERNEL = "__attribute__((__used__, noinline))"  # what __global__ becomes; after it the kernel's type and name
NAME = re.compile(r"[^;{}()]*?\b(\w+)\s*\(")


class BuildError(RuntimeError):
    """The compiler's messages."""


def missing_compiler() -> str:
    """Why nothing can be built on this machine, or nothing."""
    return "" if shutil.which(compiler()) else f"no {compiler()} to build kernels for the CPU"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def build(source: str, name: str, expressions: tuple[str, ...], options: tuple[str, ...], cache_dir: Path) -> Path:
    """The library, which exports kernels as cuda_host_kernel_<i> and their names, a line each, as cuda_host_names."""
    given = [o for o in options if re.match(r"-[DUI]|--(define-macro|undefine-macro|include-path)=", o)]
    flags = [*FLAGS, *known_flags(compiler())]
    folders = [Path(o.partition("=")[2] or o[2:]) for o in given if re.match(r"-I|--include-path", o)]
    library = cache_dir / f"{digest(source, name, *expressions, *given, *flags, *texts_of(HERE, *folders))}.so"
    if not library.exists():
        text = run(
            [compiler(), *flags, "-E", "-x", "c++", f"-I{HERE}", *given, "-include", HERE / "cuda_host.h", "-"],
            f'#line 1 "{name}"\n{source}',
        )
        text += f'\n# 1 "exports of {name}"\n{exports(text, expressions)}'
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            link(text, flags, runtime_objects(cache_dir), Path(scratch)).replace(library)
    return library


def exports(text: str, expressions: Sequence[str]) -> str:
    """Descriptions of the name expressions and of all kernels in the preprocessed text that are no templates.

    The latter have a space before their names: Module looks whether they are extern "C".
    """
    names = list(expressions)
    for mark in re.finditer(re.escape(KERNEL), text):
        declared_from = max(text.rfind(end, 0, mark.start()) for end in ";{}")
        if "template" not in text[declared_from : mark.start()] and (found := NAME.match(text, mark.end())):
            names.append(f" {found[1]}")
    lines = "\n".join(names)
    described = [
        f'extern "C" const ::cuda_host::Kernel cuda_host_kernel_{i} = ::cuda_host::Described<&{n.strip()}>::value;\n'
        for i, n in enumerate(names)
    ]
    return "".join(described) + f'extern "C" const char cuda_host_names[] = R"({lines})";\n'


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
    key = digest(compiler(), *texts_of(HERE))
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


@cache
def texts_of(*folders: Path) -> list[str]:
    """What the sources in these folders say."""
    sources = (".cpp", ".cu", ".cuh", ".h", ".py")
    return [f.read_text() for folder in folders for f in sorted(folder.iterdir()) if f.suffix in sources]


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def run(command: Sequence[str | Path], text: str = "") -> str:
    done = subprocess.run([str(c) for c in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stderr)
    return done.stdout
