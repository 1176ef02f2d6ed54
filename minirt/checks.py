"""Shapes and indices, checked at the seam before a kernel sees them: Numba and CUDA kernels trust their callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .config import ModelConfig
from .ops import CODED_UNIT, INDEX_UNIT, KV, CodedIndex, Far
from .rope import Angles
from .stores import MAX_POSITION, row_numbers

if TYPE_CHECKING:
    from .weights import LayerWeights


def check_tokens(tokens: np.ndarray, n_vocab: int) -> None:
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab):
        raise ValueError(f"token ids must be a list of numbers from 0 to {n_vocab - 1}")


def check_product(x: np.ndarray, norm: np.ndarray, *matrices: Any) -> None:
    for matrix in matrices:
        if x.shape[1] != matrix.shape[1] or norm.shape != x.shape[1:]:
            raise ValueError(f"activations {x.shape} and norm {norm.shape} do not fit a weight {matrix.shape}")


def check_qkv(x: np.ndarray, layer: LayerWeights, config: ModelConfig, angles: Angles) -> None:
    check_product(x, layer.attn_norm, layer.wq, layer.wk, layer.wv)
    d, (_, rows, pairs) = config.head_dim, angles.values.shape
    if rows != len(x) or 2 * pairs > d:
        raise ValueError(f"angles {angles.values.shape} do not fit activations {x.shape}, heads of {d}")
    q, kv = config.n_head * d, config.n_head_kv * d
    vectors = ((layer.bq, q), (layer.bk, kv), (layer.bv, kv), (layer.q_norm, d), (layer.k_norm, d))
    if any(v is not None and v.shape != (n,) for v, n in vectors):
        raise ValueError(f"biases or norms of heads do not fit heads of {d}")
    if layer.k_factor is not None:
        both = ((layer.k_factor, layer.wk), (layer.v_factor, layer.wv))
        if angles.pos is None or not all(_are_factors(matrix, factor, d) for factor, matrix in both):
            raise ValueError(f"projections to {layer.wk.shape[0]} and {layer.wv.shape[0]} do not fit their factors")
    elif layer.wk.shape[0] != kv or layer.wv.shape[0] != kv:
        raise ValueError(f"projections to {layer.wk.shape[0]} and {layer.wv.shape[0]} do not fit heads of {d}")
    if layer.wq.shape[0] != q:
        raise ValueError(f"a projection to {layer.wq.shape[0]} does not fit heads of {d}")


def _are_factors(first: Any, second: Any, d: int) -> bool:
    """Whether a matrix [G r, n_embd] is the first factor of a low-rank projection."""
    return second is not None and first.shape[0] % second.rank == 0 and second.head_dim == d


def check_feed_forward(x: np.ndarray, layer: LayerWeights) -> None:
    check_product(x, layer.ffn_norm, layer.w_gate)
    if not layer.w_gate.shape == layer.w_up.shape == layer.w_down.shape[::-1]:
        raise ValueError(f"gate {layer.w_gate.shape}, up {layer.w_up.shape}, down {layer.w_down.shape} do not fit")


def check_slots(kv: KV, seq: np.ndarray, slot: np.ndarray) -> None:
    n_seq, _, n_slot, _ = kv.k.shape
    if len(seq) != len(slot) or kv.v.shape[:3] != kv.k.shape[:3]:
        raise ValueError(f"{len(seq)} sequences and {len(slot)} slots do not fit caches {kv.k.shape}, {kv.v.shape}")
    (least_seq, most_seq), (least, most) = _bounds(seq), _bounds(slot)
    if least_seq < 0 or most_seq >= n_seq or least < 0 or most >= n_slot:
        raise ValueError(f"cache of {n_seq} sequences x {n_slot} slots cannot take slots {least}..{most}")


def check_positions(pos: np.ndarray) -> None:
    """Of tokens whose keys are latents, which carry them as float32."""
    if pos.size and not 0 <= pos.min() <= pos.max() <= MAX_POSITION:
        raise ValueError(f"positions {pos.min()}..{pos.max()} lie outside a text of up to {MAX_POSITION} tokens")


def check_ranges(q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray) -> None:
    n_seq, n_head_kv, n_slot, _ = kv.k.shape
    if (
        q.shape[0] != n_seq
        or q.shape[1] % n_head_kv
        or q.shape[2] != row_numbers(kv.k)
        or kv.v.shape[:3] != kv.k.shape[:3]
    ):
        raise ValueError(f"queries {q.shape} do not fit a cache {kv.k.shape}")
    if len(first) != n_seq or len(stop) != n_seq or _bounds(first)[0] < 0 or _bounds(stop)[1] > n_slot:
        raise ValueError(f"slot ranges {first}..{stop} lie outside a cache of {n_slot} slots")


def check_far(q: np.ndarray, far: Far, first: np.ndarray) -> None:
    if far.q.shape != q.shape or len(far.stop) != len(q):
        raise ValueError(f"far queries {far.q.shape} of {len(far.stop)} sequences do not fit {q.shape}")
    if not all(0 <= stop <= begin for stop, begin in zip(far.stop.tolist(), first.tolist(), strict=True)):
        raise ValueError(f"far slots up to {far.stop} do not lie before the others, from {first} on")


def check_chunk(q: np.ndarray, kv: KV, seq: int, start: int, window: int, stop: int, lse: np.ndarray | None) -> None:
    n_seq, n_head_kv, n_slot, _ = kv.k.shape
    if q.shape[1] % n_head_kv or q.shape[2] != row_numbers(kv.k) or kv.v.shape[:3] != kv.k.shape[:3]:
        raise ValueError(f"queries {q.shape} do not fit a cache {kv.k.shape}")
    if not 0 <= seq < n_seq or not 0 <= stop <= n_slot or window < 0:
        raise ValueError(f"chunk {start}..{start + len(q)} of sequence {seq} lies outside a cache {kv.k.shape}")
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(f"denominators {lse.shape} do not fit queries {q.shape}")


def check_scores(scores: np.ndarray, kv: KV, stop: np.ndarray) -> None:
    (n_seq, n_head_kv, n_slot, _), (least, most) = kv.k.shape, _bounds(stop)
    if (
        len(scores) != n_seq
        or scores.shape[1] not in (1, n_head_kv)
        or not 0 <= least <= most <= scores.shape[2] <= n_slot
    ):
        raise ValueError(f"scores {scores.shape} of slots up to {stop} do not fit a cache {kv.k.shape}")


def check_columns(q: np.ndarray, kv: KV, seq: int, start: int, lse: np.ndarray, sums: np.ndarray) -> None:
    check_chunk(q, kv, seq, start, 0, start + len(q), lse)
    if start < 0 or sums.shape != (kv.k.shape[1], start + len(q)):
        raise ValueError(f"sums {sums.shape} do not fit queries {q.shape} from slot {start} on, a cache {kv.k.shape}")


def check_overwrite(
    kv: KV, slot: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, pos: np.ndarray
) -> None:
    n_seq, n_head_kv, n_slot, _ = kv.k.shape
    if not k.shape[:2] == v.shape[:2] == (n_seq, n_head_kv) or kv.v.shape[:3] != kv.k.shape[:3]:
        raise ValueError(f"keys {k.shape} and values {v.shape} do not fit caches {kv.k.shape}, {kv.v.shape}")
    if len(slot) != n_seq or slot.shape[1] not in (1, n_head_kv) or len(pos) != n_seq:
        raise ValueError(f"slots {slot.shape} and positions of {len(pos)} tokens do not fit a cache {kv.k.shape}")
    if positions.shape[:2] != slot.shape or positions.shape[2] > n_slot:
        raise ValueError(f"positions {positions.shape} do not fit slots {slot.shape}, a cache {kv.k.shape}")


def check_eviction(
    scores: np.ndarray,
    positions: np.ndarray,
    stop: np.ndarray,
    room: np.ndarray,
    head: np.ndarray,
    before: np.ndarray,
    slot: np.ndarray,
) -> None:
    """The numbers of each sequence are checked where they are used: a device may know them better than the host."""
    if scores.shape != positions.shape or scores.shape[:2] != slot.shape:
        raise ValueError(f"scores {scores.shape}, positions {positions.shape} and slots {slot.shape} do not fit")
    if not len(stop) == len(room) == len(head) == len(before) == len(slot):
        raise ValueError(f"numbers of {len(stop)} to {len(before)} sequences do not fit slots {slot.shape}")


def check_merge(
    kv: KV, slot: np.ndarray, stop: np.ndarray, head: np.ndarray, active: np.ndarray, threshold: np.ndarray
) -> None:
    n_seq = len(slot)
    if kv.v.shape[:3] != kv.k.shape[:3] or not slot.shape == threshold.shape == kv.k.shape[:2]:
        raise ValueError(f"slots {slot.shape} and thresholds {threshold.shape} do not fit a cache {kv.k.shape}")
    if not len(stop) == len(head) == len(active) == n_seq:
        raise ValueError(f"numbers of {len(stop)}, {len(head)} and {len(active)} sequences do not fit {n_seq}")


def check_merge_evicted(kv: KV, kept: np.ndarray, head: int, threshold: np.ndarray) -> None:
    """Kept slots are distinct and in order, and some of them may receive."""
    n_seq, n_head_kv, n_slot, _ = kv.k.shape
    if n_seq != 1 or kv.v.shape[:3] != kv.k.shape[:3] or len(kept) != n_head_kv or threshold.shape != (n_head_kv,):
        raise ValueError(f"kept slots {kept.shape}, thresholds {threshold.shape} do not fit a cache {kv.k.shape}")
    if not kept.shape[1] or kept[:, 0].min() < 0 or kept[:, -1].max() >= n_slot or (np.diff(kept) <= 0).any():
        raise ValueError(f"kept slots are not ascending numbers from 0 to {n_slot - 1}")
    if kept[:, -1].min() < head:
        raise ValueError(f"all kept slots of a head lie before {head}: none may receive")


def check_copy(source: KV, rows: np.ndarray, target: KV, start: int) -> None:
    (n_seq, n_head_kv, *_), end = source.k.shape, start + rows.shape[1]
    if n_seq != 1 or len(rows) not in (1, n_head_kv) or not 0 <= start <= end <= target.k.shape[2]:
        raise ValueError(f"rows {rows.shape} of {source.k.shape} do not fit slots {start}..{end} of {target.k.shape}")
    for a, b in zip(source, target, strict=True):
        if a.shape[:2] != b.shape[:2] or a.shape[3] != b.shape[3] or a.dtype != b.dtype:
            raise ValueError(f"rows of {a.shape}, {a.dtype} do not fit {b.shape}, {b.dtype}")


def check_indices(indices: np.ndarray, n: int) -> None:
    """Of an array on the host."""
    if indices.size and not 0 <= indices.min() <= indices.max() < n:
        raise ValueError(f"slots {indices.min()}..{indices.max()} lie outside 0..{n - 1}")


def check_rotation(x: np.ndarray, angles: Angles) -> None:
    _, n, pairs = angles.values.shape
    if len(x) != n or 2 * pairs > x.shape[2]:
        raise ValueError(f"angles {angles.values.shape} do not fit heads {x.shape}")


def check_join(out: np.ndarray, lse: np.ndarray, other: np.ndarray, other_lse: np.ndarray) -> None:
    if out.shape != other.shape or not lse.shape == other_lse.shape == out.shape[:2]:
        raise ValueError(f"attention {other.shape}, {other_lse.shape} does not fit {out.shape}, {lse.shape}")


def check_rows(ranks: np.ndarray, stop: np.ndarray, k: int, head: int, tail: int) -> None:
    check_choice(len(ranks), ranks.shape[2], stop, k, head, tail)


def check_choice(n_seq: int, slots: int, stop: np.ndarray, k: int, head: int = 0, tail: int = 0) -> None:
    if len(stop) != n_seq or _bounds(stop)[0] < 0 or _bounds(stop)[1] > slots:
        raise ValueError(f"{n_seq} sequences of {slots} slots have none up to {stop}")
    if k < 1 or head < 0 or tail < 0 or head + tail > k:
        raise ValueError(f"the first {head} and the last {tail} do not fit into the {k} best")


def check_counts(counts: Any, n_seq: int, n_head_kv: int, local: int = 1) -> None:
    if local < 1:
        raise ValueError("none may be left of the rows if the last is not always among them")
    if counts.shape != (n_seq, n_head_kv, 3) or counts.dtype != np.int32 or not counts.flags.c_contiguous:
        raise ValueError(f"counts {counts.shape} of {counts.dtype} do not fit {n_seq} sequences of {n_head_kv} heads")


def check_components(q: np.ndarray, index: np.ndarray | CodedIndex, r: int) -> None:
    n_seq, n_head_kv, _, d, tokens = _index_shape(index)
    if len(q) != n_seq or q.shape[2] != d or q.shape[1] % n_head_kv or r < 1 or tokens % INDEX_UNIT:
        raise ValueError(f"{r} components of queries {q.shape} do not fit an index of {tokens} tokens x {d}")


def index_slots(index: np.ndarray | CodedIndex) -> int:
    """Tokens of which an index can tell the keys."""
    _, _, blocks, _, tokens = _index_shape(index)
    return int(index.k.shape[2]) if isinstance(index, CodedIndex) else blocks * tokens


def _index_shape(index: np.ndarray | CodedIndex) -> tuple[int, ...]:
    """[B, H_kv, blocks, d, tokens]."""
    if not isinstance(index, CodedIndex):
        return index.shape
    *shape, words = index.codes.shape
    tokens, (n_seq, n_head_kv, slots, _) = 8 * words, index.k.shape
    if index.scales.shape != (*shape, tokens // CODED_UNIT, 2) or shape[:2] != [n_seq, n_head_kv]:
        raise ValueError(f"codes {index.codes.shape}, scales {index.scales.shape}, keys {index.k.shape} do not fit")
    if tokens % INDEX_UNIT or (shape[2] and slots // CODED_UNIT * CODED_UNIT > shape[2] * tokens):
        raise ValueError(f"codes {index.codes.shape} do not hold the units of keys {index.k.shape}")
    return (*shape, tokens)


def check_index(
    index: np.ndarray | CodedIndex,
    mean: np.ndarray | None,
    seq: np.ndarray,
    slot: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
) -> None:
    n_seq, n_head_kv, _, d, _ = shape = _index_shape(index)
    if k.shape != (len(seq), n_head_kv, d) or v.shape != k.shape or len(slot) != len(seq):
        raise ValueError(f"keys {k.shape} and values {v.shape} do not fit an index {shape}")
    if mean is not None and mean.shape != (n_seq, n_head_kv, d):
        raise ValueError(f"means {mean.shape} do not fit an index {shape}")
    (least_seq, most_seq), (least, most) = _bounds(seq), _bounds(slot)
    if least_seq < 0 or most_seq >= n_seq or least < 0 or most >= index_slots(index):
        raise ValueError(f"index {shape} cannot take slots {least}..{most} of sequences {least_seq}..{most_seq}")


def _bounds(indices: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest: for a few numbers Python is quicker than a NumPy reduction."""
    if len(indices) > 16:
        return int(indices.min()), int(indices.max())
    values = indices.tolist()
    return min(values), max(values)
