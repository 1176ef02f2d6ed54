// Evicted rows merged into a kept one: D2O (arXiv 2406.13035, section 3.3). Macros: HEAD_DIM, K_STORE, V_STORE.
#pragma once
#include "rows.cuh"

static_assert(HEAD_DIM <= 256, "a warp holds a row");

// So many lanes hold a row, 8 numbers each; those beyond its end zeros.
constexpr int LANES = power_from((HEAD_DIM + 7) / 8);
constexpr int THREADS = 128, ROWS = THREADS / LANES;  // rows that a block holds

template <int STORE>
DEVICE void load_piece(const Rows& rows, i64 row, float (&x)[8]) {
    const int piece = threadIdx.x % LANES;
    if (8 * piece < HEAD_DIM) load8<STORE, HEAD_DIM>(rows, row, piece, x);
}

DEVICE float dot(const float (&x)[8], const float (&y)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j] * y[j];
    return sum;
}

// See minirt.ops.MergeRule.
struct Rule {
    float e;
    int normalised;

    DEVICE float own() const { return normalised ? e : 1.0f; }
    DEVICE float weight(float u) const { return normalised ? expf(u) : u; }
    DEVICE float share(float u) const { return normalised ? expf(u) : 1.0f; }  // of what all is divided by
};

struct Evicted {
    int slot;
    float u;  // cosine with the kept row
};

// Slot `into` of head h becomes (own times itself + the sum of weights times evicted(0) ... evicted(n - 1)) / total. A
// rotation of rows does not matter. All threads of a block of THREADS call.
template <int STORE, class List>
DEVICE void merge_rows(const Rows& rows, int b, int h, int into, int n, const List& evicted, const Rule& rule) {
    __shared__ float sums[ROWS][8 * LANES], totals[ROWS], row[HEAD_DIM];
    const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float sum[8] = {}, total = 0.0f;
#pragma unroll 4
    for (int i = group; i < n; i += ROWS) {
        const Evicted it = evicted(i);
        const float weight = rule.weight(it.u);
        float x[8] = {};
        load_piece<STORE>(rows, rows.row(b, h, it.slot), x);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += weight * x[j];
        total += rule.share(it.u);
    }
    if (group == 0) {
        float x[8] = {};
        load_piece<STORE>(rows, rows.row(b, h, into), x);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += rule.own() * x[j];
        total += rule.own();
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sums[group][8 * lane + j] = sum[j];
    if (lane == 0) totals[group] = total;
    __syncthreads();
    for (int j = threadIdx.x; j < HEAD_DIM; j += THREADS) {
        float x = 0.0f, all = 0.0f;
#pragma unroll
        for (int i = 0; i < ROWS; i++) x += sums[i][j], all += totals[i];
        row[j] = x / all;
    }
    __syncthreads();  // what is shared may be written again, too: a call may follow
    store_row<STORE, HEAD_DIM>(rows, rows.row(b, h, into), row);
}
