"""The Ops protocol: everything a device computes, in one contract.

`minirt.reference` (NumPy, the truth), `kernels_cpu` (Numba) and `kernels_gpu` (CUDA) each hold one class of this shape.
The decoder and the policies are written in these calls only. Arrays are float32 unless said otherwise and belong to
the device (NumPy arrays on the CPU); index arrays are host NumPy int32. Symbols are those of `minirt.config`.

Two rules let a device be fast:
  - an array returned by an op may be the device's own scratch: it is valid until the same op is called again;
  - a call is asynchronous until `to_host`.
An index that a device computes (which slot is overwritten, which rows are read) is the device's array and stays there.
Every op validates shapes and indices before a kernel sees them and raises ValueError: a kernel trusts its caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .gguf_file import Tensor
from .rope import Angles, Rope
from .stores import Store

if TYPE_CHECKING:
    from .config import ModelConfig
    from .weights import LayerWeights

Array = Any  # the device's array: numpy.ndarray, cupy.ndarray
Factor = Any  # the device's second factor of low-rank keys or values, with .head_dim, .rank and .nbytes; see `factor`
Matrix = Any  # the device's weight [n_out, n_in], in its own layout, with .shape and .nbytes, the bytes of reading it
IntArray = np.ndarray  # host, int32

NO_POSITION = 2**31 - 1  # of an empty slot: later than any token
INDEX_BLOCK, INDEX_UNIT = 2048, 512  # tokens of a component that lie together in SparQ's index: at most, a multiple of
CODED_BLOCK, CODED_UNIT = 8192, 256  # the same of a coded one, where a unit shares a scale


class KV(NamedTuple):
    """Keys and values of one layer: device arrays [B, H_kv, slots, d] in the layout of their stores.

    Or Latents [B, G, slots, r] (minirt.stores): what an op says of KV heads that rows are written to, scored or evicted
    for holds for their G groups then, of keys and values for latents; attention is to the keys and values they rebuild.
    """

    k: Array
    v: Array


class CodedIndex(NamedTuple):
    """SparQ's copy of the keys in 4 bits: codes c of each component and each whole unit of CODED_UNIT tokens stand for
    least + scale c. The tokens after the last whole unit have none, and are read as rows of the cache. So codes depend
    on the rows of their unit alone, and after a rewind nothing needs to be made again. Without blocks there is no copy:
    all tokens are read as rows.

    A run of 16 words holds 128 tokens: bits 4 p ... 4 p + 3 of word w belong to token 16 p + w.
    """

    codes: Array  # uint32 [B, H_kv, blocks, d, tokens / 8]
    scales: Array  # float16 [B, H_kv, blocks, d, tokens / CODED_UNIT, 2]: scale and least
    k: Array  # keys of the layer, as in KV


class Far(NamedTuple):
    """Slots that are attended with other queries than the rest, in the same softmax: attention sinks at a distance
    that is not their true one. Slots 0 ... stop[b] - 1 of sequence b."""

    q: Array  # [B, H_q, d]
    stop: IntArray  # [B]


class MergeRule(NamedTuple):
    """How D2O (arXiv 2406.13035, section 3.3) merges an evicted token into the kept one most like it."""

    beta: float  # of the moving threshold
    e: float  # weight of the kept token itself
    normalised: bool  # weights e and exp(u), divided by their sum, as in the paper; else 1 and u, divided by 1 + n
    shared: bool  # the threshold is met by the mean u of all KV heads, as in the paper's code, not by each head's


class Ops(Protocol):
    name: str

    @property
    def device_name(self) -> str:
        """What the device calls itself; empty of the CPU."""

    def memory(self) -> tuple[int, int] | None:
        """Bytes of the device's own memory: what is free, and all. None if it computes in the host's."""

    def bandwidth(self) -> float | None:
        """Bytes that the device's own memory moves per second, measured; None if that is the host's."""

    # -- weights and arrays --------------------------------------------------------------------------------------------
    def vector(self, values: np.ndarray) -> Array:
        """Brings a float32 vector (norm weight, bias) to the device."""

    def matrix(self, tensor: Tensor) -> Matrix:
        """Brings a 2-D GGUF tensor [n_out, n_in] to the device, in whatever layout its products want."""

    def table(self, tensor: Tensor) -> Matrix:
        """The same for a tensor whose rows are looked up, not multiplied."""

    def factor(
        self,
        tensor: Tensor,
        config: ModelConfig,
        bias: Array | None,
        norm: Array | None = None,
        rope: Rope | None = None,
    ) -> Factor:
        """Brings the second factor [H_kv d, r] of a layer's values, or of its keys with the rope, to the device.

        A value is factor . latent + bias; a key is normed after that (if there is a norm) and turned at its position.
        """

    def to_host(self, array: Array) -> np.ndarray:
        """The array as NumPy, after everything before it has run. A copy unless the device is the host."""

    def record(self, step: Callable[[Ops], Array]) -> tuple[Array, Callable[[], None] | None]:
        """Runs step(ops), which makes calls of these ops; returns its result, and what makes the calls again.

        Again means: on the same arrays, whatever lies in them by then, and with the same other arguments; so what was
        given to the step, and index arrays, are renewed in place. None instead if this device, or one of the calls,
        cannot be recorded. A device records what its kernels do, not what the step does with arrays beside them.
        """

    # -- rows: x is the residual stream [N, n_embd] --------------------------------------------------------------------
    def embed(self, table: Matrix, tokens: IntArray) -> Array:
        """Rows `tokens` [N] of the table: [N, n_embd], owned by the caller. Raises ValueError on an id outside it."""

    def qkv(self, x: Array, layer: LayerWeights, config: ModelConfig, angles: Angles) -> tuple[Array, Array, Array]:
        """Queries [N, H_q, d], keys and values [N, H_kv, d] of a layer: RMSNorm of x, three projections and their
        biases, norms of the heads (qwen3), rotary embedding of queries and keys (RoFormer, arXiv 2104.09864).

        Of a layer with factors latents: of keys [N, G, r + 1], the last number of which is the true position, and of
        values [N, G, r]."""

    def add_linear(self, x: Array, h: Array, matrix: Matrix) -> None:
        """x += h @ matrix.T, in place; h [N, n_in], x [N, n_out]."""

    def feed_forward(self, x: Array, layer: LayerWeights, config: ModelConfig) -> None:
        """x += down(silu(gate(n)) * up(n)) with n = RMSNorm(x), in place: SwiGLU (arXiv 2002.05202)."""

    def logits(self, x: Array, norm: Array, eps: float, matrix: Matrix) -> Array:
        """RMSNorm of x, then the output projection: [N, n_vocab], owned by the caller unless it is recorded."""

    def most_likely(self, logits: Array) -> Array:
        """The token of the largest of each row of logits [N, n_vocab], of equal ones the first; -1 if one of them is
        not finite: int32 [N]."""

    def angles(self, rope: Rope, pos: IntArray, out: Angles | None = None) -> Angles:
        """What `qkv` needs for the true positions `pos` [N]; made once per forward pass. out: those of as many other
        positions, which become these, in the same memory."""

    # -- cache ---------------------------------------------------------------------------------------------------------
    def allocate(self, store: Store, shape: tuple[int, int, int, int], factor: Factor | None = None) -> Array:
        """An empty K or V of logical shape [B, H_kv, slots, d] in the store's layout; memory is touched as it fills.

        With a factor: Latents, [B, G, slots, numbers of a row]."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A policy's own array; memory is touched as it fills."""

    def indices(self, values: IntArray) -> Array:
        """Brings int32 numbers to the device."""

    def append(self, kv: KV, seq: IntArray, slot: IntArray, k: Array, v: Array) -> None:
        """Writes row i of k and v [N, H_kv, d] to slot[i] of sequence seq[i]."""

    def attend(self, q: Array, kv: KV, first: IntArray, stop: IntArray, far: Far | None = None) -> Array:
        """One decode step: row b of q [B, H_q, d] attends slots first[b] <= s < stop[b] of sequence b: [B, H_q, d].

        softmax(q.K^T / sqrt(d)) V, float32 accumulation. An empty range gives zeros. far: more slots, which must lie
        before first[b].
        """

    def attend_chunk(
        self,
        q: Array,
        kv: KV,
        seq: int,
        start: int,
        window: int = 0,
        stop: int | None = None,
        lse: Array | None = None,
    ) -> Array:
        """Causal prefill: row t of q [T, H_q, d] sees slots s <= start + t of one sequence, the last `window` of them
        if window > 0, none from `stop` on (None: start + T): [T, H_q, d]. A row that sees nothing becomes zeros.

        start may be negative. lse [T, H_q]: receives the logarithm of the softmax's denominator, -inf for nothing.
        """

    def join_attention(self, out: Array, lse: Array, other: Array, other_lse: Array) -> None:
        """out [T, H_q, d] becomes the attention to the slots of both, by their denominators; in place."""

    def rotate(self, x: Array, angles: Angles) -> Array:
        """Heads x [N, H, d] turned by `angles` of N positions; new."""

    def concatenate(self, parts: Sequence[Array]) -> Array:
        """Arrays one after the other along their first axis."""

    # -- scores that decide what is kept -------------------------------------------------------------------------------
    # H is H_kv where each KV head decides for itself, 1 where a layer does.
    def attend_weights(self, q: Array, kv: KV, stop: IntArray, weights: Array, accumulate: bool) -> Array:
        """`attend` to slots 0 ... stop[b] - 1, and its probabilities: each slot's, averaged over the query heads of a
        KV head (weights [B, H_kv, slots]) or of the layer ([B, 1, slots]), written to weights or added to them."""

    def add_column_sums(self, q: Array, kv: KV, seq: int, start: int, lse: Array, sums: Array) -> None:
        """sums [H_kv, start + T] += probabilities that the rows of a chunk gave each slot, averaged over the query
        heads of a KV head: exp(q.k / sqrt(d) - lse), a second pass over what `attend_chunk` saw (window 0)."""

    def overwrite(self, kv: KV, slot: Array, k: Array, v: Array, positions: Array, pos: IntArray) -> None:
        """Writes head h of row b of k and v [B, H_kv, d] to slot[b, h] of sequence b; its position becomes pos[b].

        slot int32 [B, H], positions int32 [B, H, slots]; H = 1 serves all heads.
        """

    def evict(
        self,
        scores: Array,
        positions: Array,
        stop: IntArray,
        room: IntArray,
        head: IntArray,
        before: IntArray,
        slot: Array,
    ) -> None:
        """Finds the slot that the next token will overwrite: slot [B, H] int32.

        While stop[b] < room[b] it is stop[b], which is free. Else the lowest of scores [B, H, slots] among slots
        head[b] <= s < stop[b] with positions below before[b]; of equal ones the first; NaN is never lowest; slot
        head[b] if there is none. Its score becomes 0, its position NO_POSITION.
        """

    def top_k(self, ranks: Array, stop: IntArray, k: int, head: int = 0, tail: int = 0) -> Array:
        """The k best of slots 0 ... stop[b] - 1 by ranks [B, H, slots], ascending: int32 [B, H, k].

        The first `head` and the last `tail` of them are always among them, head + tail <= k. Of equal ones the first;
        NaN comes last. If stop[b] <= k it is all of them, and what follows in the row has no meaning.
        """

    def argsort(self, values: Array) -> Array:
        """Order of each row of int32 values [H, n], ascending: int32 [H, n]."""

    def take(self, values: Array, rows: Array) -> Array:
        """values[h, rows[h, i]] of values [H, n], rows int32 [H, m]: [H, m]."""

    def copy_rows(self, source: KV, rows: Array, target: KV, start: int) -> None:
        """Copies slots rows [H, n] of the one sequence of source to start ... of the one of target, as they are.

        Caches are [1, H_kv, slots, d]; rows int32, H = 1 serves all heads. Both may be the same memory if rows ascend
        and start is 0.
        """

    def merge(
        self, kv: KV, slot: Array, stop: IntArray, head: IntArray, active: IntArray, threshold: Array, rule: MergeRule
    ) -> None:
        """D2O, one decode step: for each sequence with active[b] and each KV head, the row in slot[b, h], about to be
        overwritten, is merged into the one of head[b] <= s < stop[b] whose key is most like it (cosine u), if u is at
        least threshold [B, H_kv]; then the threshold moves: beta u + (1 - beta) threshold."""

    def merge_evicted(self, kv: KV, kept: Array, head: int, threshold: Array, rule: MergeRule) -> None:
        """D2O after a prompt: every slot of kv [1, H_kv, n, d] that is not in kept [H_kv, m] (ascending) is merged into
        the kept one most like it, if their cosine is at least the mean over all evicted, which threshold [H_kv] then
        holds. Kept slots below `head` receive nothing."""

    # -- reading few of the cached tokens ------------------------------------------------------------------------------
    # SparQ's copy of the keys has the components apart: index [B, H_kv, blocks, d, tokens], blocks of tokens; or coded.
    def append_index(
        self, index: Array | CodedIndex, mean: Array | None, seq: IntArray, slot: IntArray, k: Array, v: Array
    ) -> None:
        """Writes row i of k [N, H_kv, d] to the index of sequence seq[i], slot[i]. A mean [B, H_kv, d] of the values in
        slots 0 ... slot[i] - 1 takes up row i of v: mean += (v - mean) / (slot[i] + 1).

        In a coded index a unit is written with its last slot, from the rows of the cache, where k and all of the unit
        before it lie already. With low and high its least and largest number: least = low, scale = (high - least) / 15,
        each rounded to float16; c = (x - least) / scale, rounded to the nearest in 0 ... 15.
        """

    def mean_rows(self, v: Array, seq: int, n: int, mean: Array) -> None:
        """mean [B, H_kv, d] of one sequence becomes that of the first n rows of v [B, H_kv, slots, d]; 0 for n = 0."""

    def approximate_top_k(
        self,
        q: Array,
        index: Array | CodedIndex,
        stop: IntArray,
        r: int,
        k: int,
        local: int,
        sum_logits: bool,
        least: float = 0.0,
        counts: Array | None = None,
    ) -> tuple[Array, Array]:
        """SparQ, step 1: the k of slots 0 ... stop[b] - 1 that seem to weigh most, and what each seems to weigh.

        The r components of largest sum |q| over the query heads of a KV head are read; a head's logits q.k / tau, with
        tau = sqrt(d |q_r|_1 / |q|_1), become probabilities. Rows [B, H_kv, k] are as in `top_k`, by the sum of the
        probabilities over the group, or of the logits if sum_logits, the last `local` always among them; weights
        [B, H_q, k] are the probabilities there. NaN in logits counts as -inf.

        With counts int32 [B, H_kv, 3], if stop[b] > k, only the last `local` >= 1 of these k stay, and those whose
        share of the k is at least `least`. A share is of weights, summed over the group, to the power of
        |q_r|_1 / |q|_1 of the group, rounded to 1, 2, 3 or 4 quarters: the less was seen, the less do weights differ.
        What stays moves to the front of its row, in order, and so do its weights; what follows has no meaning.
        counts[b, h] becomes how many stay; then, of all calls with stop[b] > k, the sum of that, and how many they are.
        Where stop[b] = 0 nothing changes.
        """

    def exact_top_k(self, q: Array, kv: KV, stop: IntArray, k: int) -> tuple[Array, Array]:
        """FlexGen, step 1: the same with all components and sqrt(d): true probabilities. local = 0."""

    def attend_rows(
        self,
        q: Array,
        kv: KV,
        rows: Array,
        stop: IntArray,
        weights: Array | None,
        mean: Array | None,
        counts: Array | None = None,
    ) -> Array:
        """SparQ, steps 2 and 3: attention of q [B, H_q, d] to slots rows [B, H_kv, k]: y. If stop[b] < k, the first
        stop[b] of them count; with counts [B, H_kv, 3] no more than the first counts[b, h, 0]. With a mean [B, H_kv, d]
        of all values: alpha y + (1 - alpha) mean, where alpha is the sum of the rows' weights [B, H_q, k]."""

    def add_rows(self, kv: KV, rows: Array, stop: IntArray, weights: Array, d: int) -> Array:
        """FlexGen, step 2: the values of rows [B, H_kv, k] (as in `attend_rows`) times their weights: [B, H_q, d]."""
