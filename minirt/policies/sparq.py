"""SparQ Attention (arXiv 2312.04985): every token kept, few read.

A decode step (algorithm 1), for a KV head and its query heads:
 1. the r components where |q| summed over the heads is largest; logits with these alone, divided by
    tau = sqrt(d |q_r|_1 / |q|_1), in float32; their softmax s estimates what each token will weigh (equation 7);
 2. exact attention to the k tokens of largest s, the last `local` among them;
 3. y = alpha y + (1 - alpha) v_bar: alpha is what these k tokens weigh in s, v_bar the mean of all values (equation 8).
The prompt is attended densely, and so are texts of up to k tokens: nothing could be saved.

With k = auto a head reads as many as it has use for: of the `most` tokens of largest s the newest, and those whose s^b
is at least eps times the average of these `most`, s summed over the heads that share keys. The exponent b is the share
|q_r|_1 / |q|_1 of their queries that s was made of: what few components tell of a token is half noise, and without it
heads that only seem to need few rows would lose those they need. To cover a share 1 - eps of the weight in each head
does worse at equal bytes: most rows go to heads that are so flat that any of them stand for the rest
(tools/results/adaptive_k.json). Texts of up to `most` tokens are attended densely: so much may be read anyway, and in
short texts a model misses what is left out most. What was read is counted, for `bytes_touched`.

K lies twice in memory: as rows for step 2, and component by component (the `index`) for step 1; that is 1.5 times the
dense cache. Beside rows that are quantised the index is float16. It is made of the keys as they were given, and so is
v_bar, a running mean in float32, of the values.

With k_index = q4 a number of the index takes 4 bits, and the index is made of the cached rows: a component of 256
tokens shares a scale and a least number, both float16, which adds 12.9 % to a float16 cache. The tokens after the last
whole 256, whose least number is not known yet, are scored in step 1 by their rows: exactly, and without an index that a
rewind would have to repair.

With k_index = none K lies in memory once, as rows, of which step 1 wants r components: these are in all lines of a row,
so all keys are read, and no more memory is taken than by dense attention.

Where the paper leaves a choice:
  - Heads that share keys: the paper's text and its algorithm sum the probabilities s over the group (sum-prob), its
    published code the logits (sum-logit). The first maximises the estimated weight of what is read.
  - Step 3 is on for models with as many KV heads as query heads and off for grouped ones, as in the paper's results;
    --reallocate says otherwise.
  - local is k / 4 inside the k, as in the paper's experiments; its algorithm has none (--local 0). With auto it is 16:
    more did worse than the same bytes spent by weight.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..cache import Cache, CachePlan, SideArray
from ..config import ModelConfig
from ..errors import UsageError
from ..ops import CODED_BLOCK, CODED_UNIT, INDEX_BLOCK, INDEX_UNIT, Array, CodedIndex, Ops
from ..stores import Store
from .base import BasePolicy, parameter

_FLOAT16, _FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
_INT32, _UINT32 = np.dtype(np.int32), np.dtype(np.uint32)
EPS, MOST, NEWEST = 0.75, 512, 16  # of auto


@dataclass(frozen=True)
class SparQ(BasePolicy):
    name: ClassVar[str] = "sparq"
    needs_rows: ClassVar[str] = "reads components of keys"
    r: int = parameter(32, "Components of a query that choose what is read.", least=1)
    k: int | str = parameter(128, "Tokens that are read, or auto: by their weight.", least=1, of=("auto",))
    eps: float | None = parameter(
        None, f"With --k auto: what a token must weigh to be read, in averages of --most.  [default: {EPS}]", float,
        least=0,
    )  # fmt: skip
    most: int | None = parameter(None, f"... and no more than so many.  [default: {MOST}]", least=1)
    local: int | None = parameter(
        None, f"... of which the newest are always read.  [default: k / 4; auto: {NEWEST}]", least=0
    )
    dense_until: int | None = parameter(
        None, "Tokens up to which a text is attended densely.  [default: as many as are read]", least=0
    )
    reallocate: str = parameter(
        "auto", "Give what was not read the mean value; auto: unless query heads share keys.", str,
        of=("auto", "on", "off"),
    )  # fmt: skip
    gqa: str = parameter(
        "sum-prob", "How query heads that share keys choose together.", str, of=("sum-prob", "sum-logit")
    )
    k_index: str = parameter(
        "f16", "How the second copy of the keys is kept; none: all keys are read.", str, of=("f16", "q4", "none")
    )  # fmt: skip

    @property
    def adaptive(self) -> bool:
        return self.k == "auto"

    @property
    def rows(self) -> int:
        """Tokens that are read at most."""
        return int(self.k) if not self.adaptive else MOST if self.most is None else self.most

    @property
    def until(self) -> int:
        """Tokens up to which a text is attended densely."""
        return max(self.rows, self.dense_until or 0)

    @property
    def newest(self) -> int:
        if self.local is not None:
            return self.local
        return min(NEWEST, self.rows) if self.adaptive else self.rows // 4

    @property
    def least(self) -> float:
        """Share of all `rows` that a token must have to be read."""
        return (EPS if self.eps is None else self.eps) / self.rows

    def reallocates(self, config: ModelConfig) -> bool:
        return self.reallocate == "on" or (self.reallocate == "auto" and config.n_head == config.n_head_kv)

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super().check(config, n_ctx, k_store, v_store)
        if self.r > config.head_dim:
            raise UsageError(f"--r {self.r} is out of range (1 to {config.head_dim}, the size of a head)")
        if not self.adaptive:
            check_k(self.rows, n_ctx)
            for name in ("eps", "most"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} goes with --k auto, not with --k {self.k}")
        elif self.most is not None and self.most > n_ctx:
            raise UsageError(f"--most {self.most} is out of range (1 to {n_ctx}, the context)")
        fewest = int(self.adaptive)  # a head whose tokens all weigh too little reads these
        if not fewest <= self.newest <= self.rows:
            range_ = f"{fewest} to {self.rows}, the tokens that are read"
            raise UsageError(f"--local {self.local} is out of range ({range_})")

    def small(self) -> SparQ:
        return dataclasses.replace(self, most=4, local=1) if self.adaptive else dataclasses.replace(self, k=4, local=1)

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        heads, d, coded = config.n_head_kv, config.head_dim, self.k_index != "f16"
        most = max(1, n_ctx // CODED_UNIT * CODED_UNIT if coded else n_ctx)  # tokens that the index holds
        blocks = -(-most // (CODED_BLOCK if coded else INDEX_BLOCK))
        tokens = -(-most // (blocks * INDEX_UNIT)) * INDEX_UNIT
        if self.k_index == "none":
            blocks = tokens = 0
        shape = (heads, blocks, d)
        if coded:
            side = {
                "codes": SideArray((*shape, tokens // 8), _UINT32, tokens),
                "scales": SideArray((*shape, tokens // CODED_UNIT, 2), _FLOAT16, tokens),
            }
        else:
            dtype = _FLOAT32 if k_store.dtype == _FLOAT32 else _FLOAT16
            side = {"index": SideArray((*shape, tokens), dtype, tokens)}
        if self.reallocates(config):
            side["mean"] = SideArray((heads, d), _FLOAT32)
        if self.adaptive:
            side["counts"] = SideArray((heads, 3), _INT32)
        layers = config.n_layer
        arrays = {name: (array,) * layers for name, array in side.items()}
        return CachePlan((n_ctx,) * layers, k_store, v_store, n_ctx, d, side=arrays)

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        start, n = int(cache.n_seen[seq]), len(k)
        slots = np.arange(start, start + n, dtype=np.int32)
        self._append(ops, cache, layer, np.full(n, seq, np.int32), slots, k, v)
        return ops.attend_chunk(q, cache.layers[layer], seq, start)

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        n_head = q.shape[1]
        every, first, whole, stop, joined = cache.once(lambda own: self._ranges(ops, own, n_head))
        kv = cache.layers[layer]
        self._append(ops, cache, layer, every, cache.n_seen, k, v)
        if stop is None:
            return ops.attend(q, kv, first, whole)
        index, sum_logits = _index(cache, layer), self.gqa == "sum-logit"
        counts = cache.side["counts"][layer] if self.adaptive else None
        how = self.r, self.rows, self.newest, sum_logits, self.least, counts
        rows, weights = ops.approximate_top_k(q, index, stop, *how)
        sparse = ops.attend_rows(q, kv, rows, stop, weights, _mean(cache, layer), counts)
        if whole is None:
            return sparse
        out = ops.attend(q, kv, first, whole)
        ops.join_attention(out, joined[0], sparse, joined[1])
        return out

    def _ranges(self, ops: Ops, cache: Cache, n_head: int) -> tuple[Any, ...]:
        """The sequences, where they begin, and where those end that are attended densely, and the others: 0 in the one
        if it is in the other, None for none at all. If there are both, what joins them, each empty where the other is
        not: the logarithms of their denominators [B, H_q], and which are dense, for a step that was recorded fills
        these as it did then."""
        every, first, stop, few = every_token(cache, self.until)
        if few:
            return every, first, stop, None, None
        dense = stop <= self.until
        if self.until == self.rows or not dense.any():  # of so few, those that are read are all
            return every, first, None, stop, None
        which = dense.tolist()
        lse = [ops.zeros((len(stop), n_head), _FLOAT32) for _ in range(2)]
        for seq, whole in enumerate(which):
            lse[int(whole)][seq] = -np.inf
        return every, first, np.where(dense, stop, np.int32(0)), np.where(dense, np.int32(0), stop), (*lse, which)

    def _append(self, ops: Ops, cache: Cache, layer: int, seq: Any, slot: Any, k: Array, v: Array) -> None:
        ops.append(cache.layers[layer], seq, slot, k, v)
        ops.append_index(_index(cache, layer), _mean(cache, layer), seq, slot, k, v)

    def rewind(self, ops: Ops, cache: Cache, seq: int, n: int) -> int:
        if n != cache.n_seen[seq] or cache.torn[seq]:
            for kv, mean in zip(cache.layers, cache.side.get("mean", ()), strict=False):  # of all layers, or of none
                ops.mean_rows(kv.v, seq, n, mean)
            for counts in cache.side.get("counts", ()):
                counts[seq] = 0
        return super().rewind(ops, cache, seq, n)

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        """S r of the index, 2 k d of rows, d of v_bar (section 4.2, appendix F; what a step writes is not counted)."""
        rows = plan.rows_bytes(config, (n if n <= self.until else self.rows,) * config.n_layer)
        return rows if n <= self.until else rows + self._beside_rows(config, plan, n)

    def bytes_touched(self, ops: Ops, config: ModelConfig, cache: Cache, seq: int, n: int) -> float:
        found = [ops.to_host(counts)[seq, :, 1:].sum(axis=0) for counts in cache.side.get("counts", ())]
        if n <= self.until or not found or not found[0][1]:
            return super().bytes_touched(ops, config, cache, seq, n)
        rows = sum(cache.plan.slot_bytes(config, layer) * read / calls for layer, (read, calls) in enumerate(found))
        return float(rows) + self._beside_rows(config, cache.plan, n)

    def _beside_rows(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        mean = 4 * config.head_dim if "mean" in plan.side else 0
        return config.n_layer * config.n_head_kv * (self._index_bytes(plan, n) + mean)

    def _index_bytes(self, plan: CachePlan, n: int) -> int:
        """Of a KV head, in step 1: r components; where they have no codes, rows."""
        if "index" in plan.side:
            return n * self.r * plan.side["index"][0].dtype.itemsize
        units, rest = divmod(n, CODED_UNIT) if plan.side["codes"][0].block else (0, n)
        return units * self.r * (CODED_UNIT // 2 + 4) + rest * plan.k_store.row_bytes(plan.head_dim)


def _index(cache: Cache, layer: int) -> Array | CodedIndex:
    if "index" in cache.side:
        return cache.side["index"][layer]
    return CodedIndex(cache.side["codes"][layer], cache.side["scales"][layer], cache.layers[layer].k)


def check_k(k: int, n_ctx: int) -> None:
    if k > n_ctx:
        raise UsageError(f"--k {k} is out of range (1 to {n_ctx}, the context)")


def every_token(cache: Cache, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """The sequences, where each begins and ends with the token of this step, and whether none has more than k."""
    stop = cache.n_seen + np.int32(1)
    return np.arange(len(stop), dtype=np.int32), np.zeros_like(stop), stop, max(stop.tolist()) <= k


def _mean(cache: Cache, layer: int) -> Array | None:
    return cache.side["mean"][layer] if "mean" in cache.side else None
