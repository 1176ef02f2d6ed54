"""Every set of instructions the kernels are written for: what MINIRT_ISA asks for is used, no more, and is right.

Each set has a process of its own, which this file is also the script of: `python tests/test_isa.py check`.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from conftest import Cli, only_line, quiet_env

from minirt.errors import UsageError

# Instructions that must be there, and such that must not.
X86 = {
    "portable": ([r"pmaddwd"], r"[yz]mm|vcvt|pshufb|pmaddubsw|vfm|pdp"),
    "avx2": ([r"vpmaddubsw.*ymm"], r"zmm|pdp|%k[1-7]"),
    "avxvnni": ([r"vpdpbusd.*ymm", r"vpdpwssd.*ymm"], r"zmm|pmaddubsw|%k[1-7]"),
    "avx512": ([r"vpmaddubsw.*zmm"], r"pdp"),
    "avx512vnni": ([r"vpdpbusd.*zmm", r"vpdpwssd.*zmm"], r"pmaddubsw"),
}
ARM = {"portable": (["mul"], "dot|fcvtl"), "neon": (["fcvtl"], "dot"), "dotprod": ([r"udot\s+v\d+\.4s"], r"[yz]mm")}

# What compiled code may call: libraries of conversions and mathematics are not there in every process.
KNOWN = re.compile(r"_ZN|\.|NRT_|Py|_Py|numba_|task|mem(cpy|set|move)$|sched_yield$")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def script(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    return subprocess.run(
        [sys.executable, __file__, *args], env=quiet_env() | {"PYTHONPATH": paths} | env,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(not is_x86(), reason="another architecture")
@pytest.mark.parametrize("name", X86)
def test_a_set(name: str, tmp_path: Path) -> None:
    from kernels_cpu.isa import SETS, host_features

    if not host_features().issuperset(SETS[name][1]):
        pytest.skip(f"this CPU has no {name}")
    # What tests each array index is the slowest set, so that it is not another run.
    checks = {"NUMBA_BOUNDSCHECK": "1"} if name == "portable" else {}
    result = script("check", MINIRT_ISA=name, XDG_CACHE_HOME=str(tmp_path), **checks)
    assert (result.stdout.split(), result.stderr) == ([name, "right"], "")


@pytest.mark.parametrize("name", ARM)
def test_code_for_arm(name: str) -> None:
    """It cannot run here, but LLVM can say what it would be."""
    llvm.initialize_all_targets()
    try:
        llvm.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite compiles for no ARM")
    result = script("arm", MINIRT_ISA=name)
    assert result.stdout.split() == [name, "right"], result.stderr


def test_unknown_sets(cli: Cli, tiny: Path) -> None:
    from conftest import minirt

    for name, says in (("avx3", "MINIRT_ISA=avx3 is not one of: native, portable"), ("AVX2", "is not one of")):
        result = minirt("run", tiny, "-p", "x", env=quiet_env() | {"MINIRT_ISA": name})
        assert (result.returncode, result.stdout) == (2, b"")
        assert says in only_line(result.stderr)


def test_sets_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels_cpu import isa

    monkeypatch.setattr(isa, "host_features", lambda: frozenset({"sse2", "avx"}))
    for name in isa.SETS:
        monkeypatch.setenv("MINIRT_ISA", name)
        if name != "portable":
            with pytest.raises(UsageError, match=f"MINIRT_ISA={name}: this CPU has no "):
                isa._choose()


# -- in a process of its own -------------------------------------------------------------------------------------------


def check() -> None:
    """Products, decoding, layers, attention and the cache against the NumPy reference; then what they were made of."""
    import test_ops as t

    from kernels_cpu import CpuOps, compiled, isa
    from minirt.gguf_file import TENSOR_TYPES

    texts, save = [], compiled._Cache.save_overload

    def keep_text(self: Any, signature: Any, result: Any) -> None:
        texts.append(result.library.get_asm_str())
        save(self, signature, result)

    compiled._Cache.save_overload = keep_text
    ops = CpuOps(threads=2)
    own, host = os.environ["MINIRT_ISA"], isa.host_features()
    # The set that all other tests run with. Where there are tile registers they run with those, so with none of these.
    best = "" if "amx-tile" in host else [n for n, (_, features) in isa.SETS.items() if host.issuperset(features)][-1]
    rows, portable = np.arange(17, dtype=np.int32), own == "portable"
    # Of the set that others test it is enough to see what some products are made of.
    for name in TENSOR_TYPES if own != best else ("Q4_0", "Q6_K", "F16"):
        tensor = t.random_tensor(name, 17, 256)
        matrix, truth = ops.matrix(tensor), t.TRUTH.matrix(tensor)
        # Four rows at once of a large block take LLVM long where vectors are short.
        for n in (1, 5) if portable <= (tensor.type.block_size < 256) else (1,):
            x, ours, theirs = t.normal(n, 256), np.zeros((n, 17), np.float32), np.zeros((n, 17), np.float32)
            ops.add_linear(ours, x, matrix)
            t.TRUTH.add_linear(theirs, x, truth)
            t.assert_close(ours, theirs, t.allowed(ops, name, n))
        assert np.array_equal(ops.embed(ops.table(tensor), rows), truth.values), name
    for n in (1, 5, 20) if own != best else (20,):
        found, c = [], t.config(8, 2, 32)
        for device in (ops, t.TRUTH):
            w, grown = t.layer(device, "Q4_0", c, 256, 512, extras=True), t.normal(n, 256)
            qkv = device.qkv(grown, w, c, t.angles(device, n, 32, False))
            device.feed_forward(grown, w, c)
            found.append([a.copy() for a in (*qkv, grown)])
        for o, truth in zip(*found, strict=True):
            t.assert_close(o, truth, 2 * t.ROUNDED)
    if own not in ("avxvnni", "avx512", best):  # these two differ from others in products of integers only
        attention(ops)
    if own in ("portable", "avx2") and own != best:
        scores_of_policies(ops)
    judge("\n".join(texts), X86[own])


def attention(ops: Any) -> None:
    """Of a step and of a prompt, on all stores."""
    import test_ops as t

    q, stop = t.normal(2, 6, 64, seed=9), np.array([70, 100], np.int32)
    for store in t.NUMBERS:
        caches = [t.filled(device, store, 2, 2, 100, 64) for device in (ops, t.TRUTH)]
        for cache, values in zip(caches[0], caches[1], strict=True):
            assert np.array_equal(np.asarray(cache).view(np.uint8).ravel(), np.asarray(values).view(np.uint8).ravel())
        results = [
            (device.attend(q, kv, stop - 65, stop), device.attend_chunk(t.normal(40, 6, 64), kv, 1, 30, 20))
            for device, kv in zip((ops, t.TRUTH), caches, strict=True)
        ]
        for o, truth in zip(*results, strict=True):
            t.assert_close(o, truth)
    for store in ("q8_0", "q4_0"):
        outs = [device.attend(q, t.filled(device, store, 2, 2, 100, 64), 0 * stop, stop) for device in (ops, t.TRUTH)]
        t.assert_close(*outs, t.rounding(store))


def scores_of_policies(ops: Any) -> None:
    """What else they need: a case of each test of these ops."""
    import test_coded_index as c
    import test_eviction_ops as e
    import test_sparse_ops as s

    store, shape, rule = "f16", (6, 2, 64), e.RULES[0]
    s.test_means(ops, store, *shape)
    s.test_the_best(ops, store, *shape, stop=(1500, 2900, 64), k=130, local=33)
    s.test_attention_to_rows(ops, store, *shape, k=130)
    c.test_codes_are_those_of_the_rows(ops, store, *shape)
    c.test_probabilities_and_the_best(ops, store, *shape, 1024)
    e.test_attend_weights(ops, store, *shape, slots=100)
    e.test_column_sums(ops, store, *shape, start=5, n=70)
    e.test_overwrite(ops, store, *shape[1:])
    e.test_evict(ops, heads=2, n=65)
    e.test_merge(ops, rule, store, *shape[1:], slots=65)
    e.test_merge_evicted(ops, rule, store, *shape[1:], n=40, m=5, head=0)


def judge(code: str, expected: tuple[list[str], str]) -> None:
    """Says so if the code, assembly, has the instructions it should have, and none it should not."""
    there, missing = expected
    lines = [line.strip() for line in code.splitlines() if re.match(r"\s+[a-z{]", line)]
    for pattern in there:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert not (found := [line for line in lines if re.search(missing, line)]), found[:5]
    symbols = {s for line in lines for s in re.findall(r"(?:\$|^(?:callq?|jmp|bl?)\s+\*?)([_.A-Za-z][\w.]*)", line)}
    assert not (unknown := {s for s in symbols if not KNOWN.match(s)}), unknown
    print(os.environ["MINIRT_ISA"], "right")


def arm() -> None:
    """Dot products, decoding, and conversions, compiled for another architecture than this one."""
    import numba.core.codegen  # they look at the real machine  # noqa: F401
    import numpy.testing  # noqa: F401

    platform.machine = lambda: "aarch64"
    llvm.get_host_cpu_features = lambda: dict.fromkeys(("neon", "fp-armv8", "dotprod"), True)
    from llvmlite import ir
    from numba import types

    from kernels_cpu import crew, isa, panels, rows, softmax
    from kernels_cpu.blocks import FORMATS
    from kernels_cpu.ir_vectors import F32, I8, I64, at, float_to_half, load, store, vector

    class Context:
        def get_dummy_value(self) -> None: ...

    name = os.environ["MINIRT_ISA"]
    cpu, features = isa.SETS[name]
    assert set(features) == isa.FEATURES
    module, pointer = ir.Module(), I8.as_pointer()

    def function(label: str, kinds: list[Any]) -> tuple[Any, Any]:
        f = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), label)
        return ir.IRBuilder(f.append_basic_block()), list(f.args)

    for label in ("F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "Q6_K"):
        f = FORMATS[label]
        for n in (1, 4) if f.length < 256 else (1,):
            b, args = function(f"dot_{label}_{n}", [pointer, I64, pointer, I64, pointer, I64])
            literals = types.literal(label), types.literal(n)
            signature, codegen = panels._dot_panel._defn(None, *literals, *[None] * 6)
            codegen(Context(), b, signature, [None, None, *args])
            b.ret_void()
        b, (row, n, out) = function(f"decode_{label}", [pointer, I64, pointer])

        def use(group: Any, index: Any, lanes: int, b: Any = b, out: Any = out) -> None:
            store(b, rows.weights_of(b, group, lanes), at(b, out, b.mul(index, I64(4))))

        rows._for_groups(b, f, row, n, use)
        b.ret_void()
    b, (source, out) = function("convert", [pointer, pointer])
    store(b, float_to_half(b, softmax._exp(b, load(b, source, vector(F32)))), out)
    store(b, float_to_half(b, load(b, source, vector(F32, 1))), out)
    crew._pause(b)
    b.ret_void()

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(
        cpu=cpu, features=",".join(f"+{feature}" for feature in features), opt=2
    )
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(parsed, builder)
    judge(machine.emit_assembly(parsed), ARM[name])


if __name__ == "__main__":
    {"check": check, "arm": arm}[sys.argv[1]]()
