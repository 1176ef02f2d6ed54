"""The Ops protocol: everything a device computes, in one contract.

`minirt.reference` (NumPy, the truth), `kernels_cpu` (Numba) and `kernels_gpu` (CUDA) each hold one class of this shape.
The decoder and the policies are written in these calls only. Arrays are float32 unless said otherwise and belong to
the device (NumPy arrays on the CPU); index arrays are host NumPy int32. Symbols are those of `minirt.config`.

Two rules let a device be fast:
  - an array returned by an op may be the device's own scratch: it is valid until the same op is called again;
  - a call is asynchronous until `to_host`.
Every op validates shapes and indices before a kernel sees them and raises ValueError: a kernel trusts its caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .gguf_file import Tensor
from .rope import Angles, Rope
from .stores import Store

if TYPE_CHECKING:
    from .config import ModelConfig
    from .weights import LayerWeights

Array = Any  # the device's array: numpy.ndarray, cupy.ndarray
Matrix = Any  # the device's weight [n_out, n_in], in its own layout, with .shape and .nbytes, the bytes of reading it
IntArray = np.ndarray  # host, int32


class KV(NamedTuple):
    """Keys and values of one layer: device arrays [B, H_kv, slots, d] in the layout of their stores."""

    k: Array
    v: Array


class Ops(Protocol):
    name: str

    # -- weights and arrays --------------------------------------------------------------------------------------------
    def vector(self, values: np.ndarray) -> Array:
        """Brings a float32 vector (norm weight, bias) to the device."""

    def matrix(self, tensor: Tensor) -> Matrix:
        """Brings a 2-D GGUF tensor [n_out, n_in] to the device, in whatever layout its products want."""

    def table(self, tensor: Tensor) -> Matrix:
        """The same for a tensor whose rows are looked up, not multiplied."""

    def to_host(self, array: Array) -> np.ndarray:
        """The array as NumPy, after everything before it has run. A copy unless the device is the host."""

    # -- rows: x is the residual stream [N, n_embd] --------------------------------------------------------------------
    def embed(self, table: Matrix, tokens: IntArray) -> Array:
        """Rows `tokens` [N] of the table: [N, n_embd], owned by the caller. Raises ValueError on an id outside it."""

    def qkv(self, x: Array, layer: LayerWeights, config: ModelConfig, angles: Angles) -> tuple[Array, Array, Array]:
        """Queries [N, H_q, d], keys and values [N, H_kv, d] of a layer: RMSNorm of x, three projections and their
        biases, norms of the heads (qwen3), rotary embedding of queries and keys (RoFormer, arXiv 2104.09864)."""

    def add_linear(self, x: Array, h: Array, matrix: Matrix) -> None:
        """x += h @ matrix.T, in place; h [N, n_in], x [N, n_out]."""

    def feed_forward(self, x: Array, layer: LayerWeights, config: ModelConfig) -> None:
        """x += down(silu(gate(n)) * up(n)) with n = RMSNorm(x), in place: SwiGLU (arXiv 2002.05202)."""

    def logits(self, x: Array, norm: Array, eps: float, matrix: Matrix) -> Array:
        """RMSNorm of x, then the output projection: [N, n_vocab], owned by the caller."""

    def angles(self, rope: Rope, pos: IntArray) -> Angles:
        """What `qkv` needs for the true positions `pos` [N]; made once per forward pass."""

    # -- cache ---------------------------------------------------------------------------------------------------------
    def allocate(self, store: Store, shape: tuple[int, int, int, int]) -> Array:
        """An empty K or V of logical shape [B, H_kv, slots, d] in the store's layout; memory is touched as it fills."""

    def append(self, kv: KV, seq: IntArray, slot: IntArray, k: Array, v: Array) -> None:
        """Writes row i of k and v [N, H_kv, d] to slot[i] of sequence seq[i]."""

    def attend(self, q: Array, kv: KV, first: IntArray, stop: IntArray) -> Array:
        """One decode step: row b of q [B, H_q, d] attends slots first[b] <= s < stop[b] of sequence b: [B, H_q, d].

        softmax(q.K^T / sqrt(d)) V, float32 accumulation. An empty range gives zeros.
        """

    def attend_chunk(self, q: Array, kv: KV, seq: int, start: int, window: int) -> Array:
        """Causal prefill: row t of q [T, H_q, d] stands in slot start + t of one sequence and attends the slots up to
        its own, the last `window` of them if window > 0: [T, H_q, d]. The chunk's K and V are already appended."""
