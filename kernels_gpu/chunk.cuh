// Causal attention of a prompt's chunk: which slots its rows see, and where its queries lie.
//
// Query heads of a KV head are rows of one matrix: row r is head r % GROUP of token r / GROUP.
#pragma once
#include "rows.cuh"

constexpr int D = HEAD_DIM;
constexpr float LN_2 = 0.693147181f;
constexpr float LOWEST = -1e30f;  // score of nothing: below all others, and finite, so that differences are numbers

struct Chunk {
    int n, start, window, stop;  // tokens; the first one's slot; as in `attend_chunk` of minirt/ops.py

    DEVICE int begin(int row) const { return window ? max(0, start + row / GROUP - window + 1) : 0; }
    DEVICE int end(int row) const { return min(stop, start + row / GROUP + 1); }
    DEVICE bool sees(int row, int slot) const { return begin(row) <= slot && slot < end(row); }
    DEVICE i64 query(int row) const {  // of q and out [T, H_q, d], and of lse
        return (i64(row / GROUP) * gridDim.y + blockIdx.y) * GROUP + row % GROUP;
    }
};

// Row r of a chunk is done: what it has added up, its highest score and the sum of its weights 2^(score - highest).
DEVICE float logarithm(float high, float total) { return total > 0.0f ? LN_2 * (high + log2f(total)) : -INFINITE; }
