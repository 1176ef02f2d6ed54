"""CpuOps: the Ops protocol on the CPU. Shapes are checked here, then a few compiled kernels do the work."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minirt.checks import (
    check_chunk,
    check_far,
    check_feed_forward,
    check_product,
    check_qkv,
    check_ranges,
    check_slots,
    check_tokens,
)
from minirt.config import ModelConfig
from minirt.gguf_file import Tensor, release
from minirt.ops import KV, Array, Far, Ops
from minirt.rope import Angles, Rope, host_angles
from minirt.sampling import most_likely
from minirt.stores import STORES, Latents, LatentStore, Store

from . import attention, kernels
from .activations import BLOCK, BLOCK_BYTES
from .blocks import FORMATS
from .crew import Crew
from .eviction_ops import EvictionOps
from .gemm import packed_size
from .integer_products import HAS_WORDS, groups_of, pairs_function, tile_function
from .ir_vectors import LANES
from .latent_ops import LatentOps, Turns, allocate_latents
from .memory import Arena, zeros
from .panels import decode_function, layout, panel_function
from .prefill_attention import attend_chunk, attention_scratch, block_tokens
from .prefill_products import many_add_product, many_gated_products, many_norm_products, room_size
from .rotation import ROTATED, rotate_rows
from .shapes import check, check_float_rows, check_width, padded, rows_of, whole_vectors, without_padding
from .sparse_ops import SparseOps
from .tape import Tape

if TYPE_CHECKING:
    from minirt.weights import LayerWeights

FEW_ROWS = 8  # up to here weights are multiplied as they are; beyond, decoding them pays
MANY_PANELS = 4  # of a weight in a prefill task
PARTS = 8  # of weights in a decode step, at least, so that a thread that lost its core does not hold up the rest ...
PART_BYTES = 1 << 20  # ... and about this large if there are more: at its begin, memory is not yet asked for ahead
HELD_QUERIES, HELD_SUMS = 32, 16  # vectors of a few heads at hand while cached rows pass; queries may come from memory

_FORMAT_OF_STORE = {name: name.upper().replace("-", "_") for name in STORES}
_NOTHING, _NOTHING_KEPT = np.empty(0, np.float32), np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Table:
    """A weight as it lies in the file, to look up rows."""

    rows: np.ndarray  # records [n_out, blocks of a row]
    shape: tuple[int, int]  # n_out, n_in


@dataclass(frozen=True, eq=False)
class PanelMatrix:
    """A weight with the blocks of 16 rows interleaved, so that the lanes of a vector are rows."""

    name: str  # of its format
    panels: np.ndarray  # uint8 [n_out / 16 rounded up, bytes of a panel]
    shape: tuple[int, int]  # n_out, n_in
    nbytes: int  # of the rows alone, without those that fill up the last panel

    @property
    def columns(self) -> int:
        """Of a product with it, those of the rows that fill up the last panel included."""
        return LANES * len(self.panels)

    @property
    def has_blocks(self) -> bool:
        return FORMATS[self.name].length > 1

    def descriptor(self, rows: int, words: bool) -> list[int]:
        """What kernels know of it (see `kernels`), to multiply so many rows of activations; words: in 16 bits."""
        of_four = panel_function(self.name, 4).address if 4 <= rows <= FEW_ROWS else 0
        f, many = FORMATS[self.name], rows > FEW_ROWS
        decode = (pairs_function if words else decode_function)(self.name).address if many else 0
        multiply = tile_function(*groups_of(self.name)).address if words else 0
        blocks, quantized = self.shape[1] // f.length, int(self.has_blocks)
        where = self.panels.ctypes.data, self.panels.strides[0], blocks, len(self.panels)
        of_one = 0 if many else panel_function(self.name, 1).address
        return [of_one, of_four, *where, quantized, decode, f.length, multiply]


@dataclass(frozen=True)
class _Work:
    """How to multiply rows of activations by some matrices, side by side."""

    descriptors: np.ndarray  # int64 [matrices, 10], see `kernels`
    step: int  # panels in a task
    begins: list[int]  # columns of out where each product begins
    normed: np.ndarray  # scratch [N, n_in]
    codes: np.ndarray  # scratch of a few rows: activations as integers
    packed: np.ndarray  # scratch of many rows: activations in tiles
    out: np.ndarray  # scratch: all products [N, columns]


class CpuOps(EvictionOps, LatentOps, SparseOps):
    """The CPU.

    Kernels share their work out to a crew of threads. Up to FEW_ROWS rows of activations are multiplied with weights as
    they are stored, on integers; for more, weights are decoded a few panels at a time, to 16-bit integers or float32.
    """

    name, device_name = "cpu", ""

    def memory(self) -> None:
        return None

    def bandwidth(self) -> None:
        return None

    def __init__(self, threads: int):
        self.threads = threads
        self._crew, self._arena = Crew(threads), Arena()
        self._room = np.empty((threads, room_size(MANY_PANELS)), np.float32)  # of each thread in prefill
        self._known: dict[tuple[Any, ...], _Work] = {}
        self._scratch: dict[str, np.ndarray] = {}
        self._tape: Tape | None = None  # while a step is recorded
        self._turns: list[Turns] = []

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def table(self, tensor: Tensor) -> Table:
        return Table(tensor.data.view(FORMATS[tensor.type.name].dtype), (tensor.shape[0], tensor.shape[1]))

    def matrix(self, tensor: Tensor) -> PanelMatrix:
        name, (n_out, n_in) = tensor.type.name, tensor.shape
        f = FORMATS[name]
        blocks, size = n_in // f.length, f.dtype.itemsize
        panels = self._arena.array((whole_vectors(n_out) // LANES, blocks, LANES * size))
        rows = tensor.data.view(np.uint8).reshape(n_out, blocks, size)
        kernels.interleave(self._crew.call(), rows, *layout(f), panels)
        release(tensor)
        return PanelMatrix(name, panels.reshape(len(panels), -1), (n_out, n_in), tensor.data.nbytes)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def embed(self, table: Table, tokens: np.ndarray) -> np.ndarray:
        check_tokens(tokens, table.shape[0])
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        self._run(kernels.gather_rows, table.rows, tokens, out)
        return out

    def qkv(
        self, x: np.ndarray, layer: LayerWeights, config: ModelConfig, angles: Angles
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, d, n_head, n_head_kv = len(x), config.head_dim, config.n_head, config.n_head_kv
        check_qkv(x, layer, config, angles)
        w = self._norm_products(x, layer.attn_norm, config.rms_eps, layer.wq, layer.wk, layer.wv)
        cos, sin = angles.values
        if layer.k_factor is not None and layer.v_factor is not None:
            return self._q_and_latents(w.out, w.begins, layer, config, angles)
        optional = (layer.bq, layer.bk, layer.bv, layer.q_norm, layer.k_norm)
        self._run(
            kernels.finish_qkv,
            w.out, *w.begins, n_head, n_head_kv, d, *(_NOTHING if a is None else a for a in optional),
            np.float32(config.rms_eps), cos, sin, *((2, 1) if angles.interleaved else (1, cos.shape[1])),
        )  # fmt: skip
        parts = zip(("queries", "keys", "values"), w.begins, (n_head, n_head_kv, n_head_kv), strict=True)
        q, k, v = (self._columns(name, w.out, begin, (n, heads, d)) for name, begin, heads in parts)
        return q, k, v

    def _columns(self, name: str, x: np.ndarray, begin: int, shape: tuple[int, int, int]) -> np.ndarray:
        """Columns of x [N, ...] from `begin` on as heads [N, H, d] in order; of few rows in the buffer of that name."""
        n, heads, d = shape
        if 1 < n <= FEW_ROWS:
            out = self._buffer(f"projected {name}", shape)
            self._run(kernels.copy_columns, x, begin, out)
            return out
        return self._in_order(x[:, begin : begin + heads * d]).reshape(shape)

    def add_linear(self, x: np.ndarray, h: np.ndarray, matrix: PanelMatrix) -> None:
        check(x.shape == (len(h), matrix.shape[0]), "residual", x.shape, h.shape)
        check(h.shape[1] == matrix.shape[1], "activations", h.shape, matrix.shape)
        self._add_product(x, self._in_order(h), matrix)

    def feed_forward(self, x: np.ndarray, layer: LayerWeights, config: ModelConfig) -> None:
        gate, up = layer.w_gate, layer.w_up
        check_feed_forward(x, layer)
        check_float_rows(x, layer.ffn_norm)
        w, crew, eps = self._work(len(x), gate, up), self._crew.call(), np.float32(config.rms_eps)
        if len(x) <= FEW_ROWS:
            h = self._buffer("gated", (len(x), gate.columns))
            self._run(
                kernels.gated_products,
                crew, x, layer.ffn_norm, eps, w.descriptors, w.step, w.normed, w.codes, w.out, h,
            )  # fmt: skip
            h = self._without_padding(h, gate.shape[0])
        else:
            self._not_recorded()
            h = self._buffer("gated", (len(x), gate.shape[0]))
            ups = self._buffer("ups", (self.threads, len(x) * LANES * w.step))
            many_gated_products(
                crew, x, layer.ffn_norm, eps, w.descriptors, w.step, w.normed, w.packed, self._room, ups, h
            )
        self._add_product(x, h, layer.w_down)

    def logits(self, x: np.ndarray, norm: np.ndarray, eps: float, matrix: PanelMatrix) -> np.ndarray:
        check_product(x, norm, matrix)
        out = self._norm_products(x, norm, eps, matrix).out[:, : matrix.shape[0]]
        return np.array(out) if len(x) <= FEW_ROWS and self._tape is None else out

    def most_likely(self, logits: np.ndarray) -> np.ndarray:
        return most_likely(logits)

    def record(self, step: Callable[[Ops], Array]) -> tuple[Array, Callable[[], None] | None]:
        self._tape = tape = Tape()
        try:
            result = step(_Recorded(self))  # type: ignore[arg-type]
        finally:
            self._tape = None
        tape.end()
        return result, functools.partial(self._crew.play, tape.play) if tape.whole else None

    def angles(self, rope: Rope, pos: np.ndarray, out: Angles | None = None) -> Angles:
        return host_angles(rope, pos, out)

    def allocate(self, store: Store, shape: tuple[int, int, int, int], factor: Any = None) -> Any:
        if isinstance(store, LatentStore):
            return allocate_latents(store, shape, factor)
        f = FORMATS[_FORMAT_OF_STORE[store.name]]
        return zeros((*shape[:3], whole_vectors(shape[3]) // f.length), f.dtype)

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        if isinstance(kv.k, Latents):
            self._write(kv, seq, slot[:, None], k, v)
            return
        check(k.shape == v.shape == (len(seq), kv.k.shape[1], k.shape[2]), "keys and values", k.shape, v.shape)
        self._run(attention.append, kv.k, kv.v, seq, slot, *self._rows(kv, k, v))

    def _rows(self, kv: KV, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [N, H_kv, d] as they will be stored in kv."""
        check_width(kv.k, k.shape[2])
        check_width(kv.v, k.shape[2])
        k, v = self._in_order(k), self._in_order(v)
        return self._like("keys", kv.k, k), self._like("values", kv.v, v)

    def _like(self, name: str, cache: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Heads of x as a cache has its rows: rotated in the buffer of that name, or as they are."""
        if cache.dtype.names[0] not in ROTATED:
            return x
        out = self._buffer(f"rotated {name}", x.shape)
        self._run(rotate_rows, x, out, (0,) * (x.shape[-1] // LANES))
        return out

    def _back(self, cache: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Sums of a cache's rows as sums of what was stored; in place."""
        if cache.dtype.names[0] in ROTATED:
            self._run(rotate_rows, out, out, (0,) * (out.shape[-1] // LANES))
        return out

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray, far: Far | None = None) -> np.ndarray:
        return self._attend("attended", q, kv, first, stop, far, _NOTHING_KEPT)

    def attend_chunk(
        self,
        q: np.ndarray,
        kv: KV,
        seq: int,
        start: int,
        window: int = 0,
        stop: int | None = None,
        lse: np.ndarray | None = None,
    ) -> np.ndarray:
        stop = start + len(q) if stop is None else stop
        if isinstance(kv.k, Latents):
            check_chunk(q, kv, seq, start, window, stop, lse)
            kv, seq = self._rebuilt(kv, seq, stop), 0
        d, q = q.shape[2], np.ascontiguousarray(padded(q), np.float32)
        check_chunk(q, kv, seq, start, window, stop, lse)
        out = self._buffer("chunk", q.shape)
        group = q.shape[1] // kv.k.shape[1]
        block = block_tokens(group)
        scratch = self._buffer("attention", (self.threads, attention_scratch(block, group, q.shape[2])))
        kept = _NOTHING_KEPT
        if lse is not None:
            check_float_rows(lse)
            kept = self._buffer("denominators", (len(q), 2 * q.shape[1]))
        crew, rows, scale = self._crew.call(), rows_of(kv, seq), 1.0 / math.sqrt(d)
        q = self._like("queries", kv.k, q)
        attend_chunk(crew, q, *rows, group, start, window, stop, scale, block, scratch, out, kept)
        if lse is not None:
            highs, sums = np.split(kept, 2, axis=1)
            with np.errstate(divide="ignore"):  # of rows that saw nothing
                np.add(highs, np.log(sums), out=lse)
        return without_padding(self._back(kv.v, out), d)

    def _attend(
        self, name: str, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray, far: Far | None, kept: np.ndarray
    ) -> np.ndarray:
        """Attention of a decode step in the buffer of that name; kept [B H_q, columns]: see `attention.attend`."""
        if isinstance(kv.k, Latents):
            return self._attend_latents(name, q, kv, first, stop, far, kept)
        d, q = q.shape[2], self._padded(q)
        check_ranges(q, kv, first, stop)
        shape, queries, until = q.shape, q, first
        if far is not None:
            far = Far(self._padded(far.q), far.stop)
            check_far(q, far, first)
            queries, until = self._buffer("near and far", (shape[0], 2 * shape[1], shape[2])), far.stop
            self._run(kernels.side_by_side, self._in_order(q), self._in_order(far.q), queries)
        group, n_vectors = shape[1] // kv.k.shape[1], shape[2] // LANES
        scored, summed = (_together(group, n_vectors, most) for most in (HELD_QUERIES, HELD_SUMS))
        out = self._buffer(name, shape)
        queries = self._like("queries", kv.k, self._in_order(queries))
        self._run(
            attention.attend, self._crew.call(), queries, kv.k, kv.v, first, stop, until,
            np.float32(1.0 / math.sqrt(d)), (0,) * n_vectors, (0,) * scored, (0,) * summed, out, kept,
        )  # fmt: skip
        return self._without_padding(self._back(kv.v, out), d)

    def _norm_products(self, x: np.ndarray, norm: np.ndarray, eps: float, *matrices: PanelMatrix) -> _Work:
        """RMSNorm(x) times each matrix, side by side in the result's `out`."""
        check_float_rows(x, norm)
        w, crew = self._work(len(x), *matrices), self._crew.call()
        if len(x) <= FEW_ROWS:
            self._run(
                kernels.norm_products,
                crew, x, norm, np.float32(eps), w.descriptors, w.step, w.normed, w.codes, w.out,
            )  # fmt: skip
        else:
            self._not_recorded()
            many_norm_products(
                crew, x, norm, np.float32(eps), w.descriptors, w.step, w.normed, w.packed, self._room, w.out
            )
        return w

    def _add_product(self, x: np.ndarray, h: np.ndarray, matrix: PanelMatrix) -> None:
        """x += h times the matrix."""
        check_float_rows(x, h)
        w, crew = self._work(len(h), matrix), self._crew.call()
        if len(h) <= FEW_ROWS:
            self._run(kernels.add_product, crew, h, w.descriptors, w.step, w.codes, w.out, x)
        else:
            self._not_recorded()
            many_add_product(crew, h, w.descriptors, w.step, w.packed, self._room, x)

    def _work(self, n: int, *matrices: PanelMatrix) -> _Work:
        """How to multiply n rows by these matrices; kept for a few rows, because a decode step has no time for it."""
        few = n <= FEW_ROWS
        key = (n if few else 0, *matrices)
        if few and key in self._known:
            return self._known[key]
        n_in, panels = matrices[0].shape[1], [len(m.panels) for m in matrices]
        total, nbytes = sum(panels), sum(m.nbytes for m in matrices)
        shares = -(-max(PARTS, nbytes // PART_BYTES) // self.threads)  # of each thread
        begins, shape = itertools.accumulate((LANES * p for p in panels), initial=0), (n, LANES * total)
        words = HAS_WORDS and not few and all(m.has_blocks for m in matrices)
        work = _Work(
            descriptors=np.array([m.descriptor(n, words) for m in matrices], np.int64),
            step=-(-total // (self.threads * shares)) if few else MANY_PANELS,
            begins=list(begins)[:-1],
            normed=self._buffer("normed", (n, n_in)),
            codes=self._buffer("codes", (n if few else 0, n_in // BLOCK * BLOCK_BYTES), np.uint8),
            packed=self._buffer("packed", (0 if few else packed_size(n, n_in),)),
            out=self._buffer(f"product of {len(matrices)}", shape)
            if few or len(matrices) > 1
            else np.empty(shape, np.float32),
        )
        if few:
            self._known[key] = work
        return work

    def _run(self, kernel: Any, *args: Any) -> Any:
        """A kernel call of a decode step."""
        if self._tape is not None:
            self._tape.note(kernel, args)
        return kernel(*args)

    def _not_recorded(self) -> None:
        """What follows is computed otherwise than by `_run`."""
        if self._tape is not None:
            self._tape.whole = False

    def _in_order(self, x: np.ndarray) -> np.ndarray:
        """x as float32 in C order."""
        y = np.ascontiguousarray(x, np.float32)
        if y is not x:
            self._not_recorded()
        return y

    def _padded(self, x: np.ndarray) -> np.ndarray:
        if x.shape[-1] % LANES:
            self._not_recorded()
        return padded(x)

    def _without_padding(self, x: np.ndarray, n: int) -> np.ndarray:
        if x.shape[-1] != n:
            self._not_recorded()
        return without_padding(x, n)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """Scratch of an op: the same memory at each call, unless more is asked for than before."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = zeros((size,), dtype)
        return self._scratch[name][:size].reshape(shape)


class _Recorded:
    """The ops as a step that is recorded sees them: a tape is not whole after an op that is not one of these."""

    OPS = frozenset((
        "embed", "qkv", "add_linear", "feed_forward", "logits", "append", "attend", "attend_weights", "overwrite",
        "evict", "merge", "rotate", "angles", "append_index", "approximate_top_k", "exact_top_k", "attend_rows",
        "add_rows",
    ))  # fmt: skip

    def __init__(self, ops: CpuOps):
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        if name not in self.OPS:
            self._ops._not_recorded()
        return getattr(self._ops, name)


@functools.cache
def _together(group: int, n_vectors: int, most: int) -> int:
    """How many of the query heads that share a KV head go together."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * n_vectors <= most))
