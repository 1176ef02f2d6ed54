// Attention of a decode step: a block of threads reads a part of the rows of a KV head, once for its whole group of
// query heads; the last block of a head to finish joins the parts (flash decoding), so that one launch does.
//
// Macros: HEAD_DIM (at most 256), GROUP (query heads of a KV head), K_STORE, V_STORE, K_ROTATED, V_ROTATED, SCORES
// (whether scores and totals are written), TENSOR_CORES. Grid (parts, H_kv SPLIT, B), THREADS threads.
#pragma once
#include "cached.cuh"
#include "mma.cuh"
#if TENSOR_CORES
#include "tensor_reader.cuh"
#else
#include "float_reader.cuh"
#endif

constexpr int SPLIT = SETS / BLOCK_SETS;  // blocks that share the query heads of a KV head
constexpr int LEAST_ROWS = 128;           // of a part, if there are several

// What a launch reads and writes.
struct Attention {
    Rows k, v;
    const float* q;    // [B, H_q, D]
    const float* far;  // the same, of rows that are far, if there are any
    float* out;        // [B, H_q, D]
    float* sums;       // scratch [B, H_kv SPLIT, parts, BLOCK_HEADS, PADDED]: values times weights
    float2* ends;      // scratch, of each sum: the highest score, and the sum of weights
    int* done;         // [B, H_kv SPLIT] parts; zeros, before and after
    float* scores;     // [B, H_q, slots], of slots that were read
    float2* totals;    // [B, H_q]: highest score, and the sum of 2^(score - highest)
    int slots;
};

// The arguments of a kernel that launches with them, and the same as an Attention.
#define ATTENTION                                                                                                    \
    u8 *k_codes, u16 *k_scales, i64 k_sequence, i64 k_head, u8 *v_codes, u16 *v_scales, i64 v_sequence, i64 v_head, \
        const float *q, const float *far, float *out, float *sums, float2 *ends, int *done, float *scores,          \
        float2 *totals, int slots
#define GIVEN                                                                                       \
    Attention {                                                                                     \
        {k_codes, k_scales, k_sequence, k_head}, {v_codes, v_scales, v_sequence, v_head}, q, far, \
            out, sums, ends, done, scores, totals, slots                                            \
    }

// What tells rows apart has `far` and `count`: rows 0 ... far - 1 go with the queries `far`, those up to count - 1 with
// q; HAS_FAR, whether there can be any; and slot(i), where row i lies. This one: slots from `first` on.
struct Range {
    static constexpr bool HAS_FAR = false;
    int far, count, first;

    DEVICE int slot(int i) const { return first + i; }
};

// The same after slots 0 ... far - 1.
struct FarRange {
    static constexpr bool HAS_FAR = true;
    int far, count, first;

    DEVICE int slot(int i) const { return i < far ? i : first + i - far; }
};

// What finishes sums has prepare(), which all threads of a block call that has some, and which may hold barriers; and
// number(): what becomes of number j of query head h of the group.
struct AsItIs {
    DEVICE void prepare() const {}
    DEVICE float number(int, int, float x) const { return x; }
};

// Queries of a block as they are multiplied with stored keys: [BLOCK_HEADS, PADDED], 0 of heads that are none.
DEVICE void load_queries(const float* q, int heads, float* to) {
    const float scale = rsqrtf(float(D)) * LOG2_E;
    for (int i = threadIdx.x; i < BLOCK_HEADS * PADDED; i += THREADS) {
        const int h = i / PADDED, j = i % PADDED;
        to[i] = h < heads && j < D ? q[h * D + j] * scale : 0.0f;
    }
    __syncthreads();
    if constexpr (K_ROTATED) rotate<D>(to, BLOCK_HEADS);
}

// Sums of all heads of a block, joined from n parts [n, BLOCK_HEADS, PADDED] that may lie in the same place.
DEVICE void join_parts(const float* sums, const float2* ends, int n, float* joined, float2* joined_ends) {
    for (int at = 4 * threadIdx.x; at < BLOCK_HEADS * PADDED; at += 4 * THREADS) {
        const int head = at / PADDED;
        float highest = LOWEST, total = 0.0f;
#pragma unroll 8
        for (int part = 0; part < n; part++) highest = fmaxf(highest, ends[part * BLOCK_HEADS + head].x);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int part = 0; part < n; part++) {
            const float2 its = ends[part * BLOCK_HEADS + head];
            const float4 y = *reinterpret_cast<const float4*>(sums + part * BLOCK_HEADS * PADDED + at);
            const float weight = power_of_2(its.x - highest);
            total += weight * its.y;
            x.x += weight * y.x, x.y += weight * y.y, x.z += weight * y.z, x.w += weight * y.w;
        }
        *reinterpret_cast<float4*>(joined + at) = x;
        if (at % PADDED == 0) joined_ends[head] = make_float2(highest, total);
    }
    __syncthreads();
}

template <class Slots, class Finish>
DEVICE void attend_part(const Attention& a, const Slots& slots, const Finish& finish) {
    __shared__ __align__(16) float sums[WARPS * HEADS * PADDED];
    __shared__ float2 ends[WARPS * HEADS], joined_ends[BLOCK_HEADS];
    const int b = blockIdx.z, kv_head = blockIdx.y / SPLIT, first = blockIdx.y % SPLIT * BLOCK_HEADS;
    const int heads = min(GROUP - first, BLOCK_HEADS), part = blockIdx.x;
    const int rows = ((slots.count + int(gridDim.x) - 1) / int(gridDim.x) + READ - 1) / READ * READ;
    const int step = max(LEAST_ROWS, rows), parts = (slots.count + step - 1) / step;
    const i64 block = i64(b) * gridDim.y + blockIdx.y, query = (i64(b) * (gridDim.y / SPLIT) + kv_head) * GROUP + first;
    float* out = a.out + query * D;
    if (part >= max(1, parts)) return;
    if (parts == 0) {
        for (int i = threadIdx.x; i < heads * D; i += THREADS) out[i] = 0.0f;
        if (SCORES && threadIdx.x < heads) a.totals[query + threadIdx.x] = make_float2(LOWEST, 0.0f);
        return;
    }

    const i64 k_first = a.k.row(b, kv_head, 0), v_first = a.v.row(b, kv_head, 0);
    const Cached cached{a.k, a.v, k_first, v_first, a.scores + query * a.slots, heads, a.slots};
    const int begin = part * step, end = min(slots.count, begin + step);
    Reader reader;
    reader.begin();
#pragma unroll 1
    for (int pass = Slots::HAS_FAR && begin < slots.far ? 0 : 1; pass < 2; pass++) {  // far rows, then the others
        load_queries((pass == 0 ? a.far : a.q) + query * D, heads, sums);
        reader.ask(sums);
        reader.read(cached, slots, pass == 0 ? begin : max(begin, slots.far), pass == 0 ? min(end, slots.far) : end);
        __syncthreads();
    }
    reader.deposit(sums, ends);
    __syncthreads();
    join_parts(sums, ends, WARPS / BLOCK_SETS, sums, joined_ends);

    if (parts > 1) {
        float* all = a.sums + block * gridDim.x * BLOCK_HEADS * PADDED;
        float2* all_ends = a.ends + block * gridDim.x * BLOCK_HEADS;
        float* own = all + part * BLOCK_HEADS * PADDED;
        for (int i = threadIdx.x; i < BLOCK_HEADS * PADDED; i += THREADS) own[i] = sums[i];
        if (threadIdx.x < BLOCK_HEADS) all_ends[part * BLOCK_HEADS + threadIdx.x] = joined_ends[threadIdx.x];
        if (!is_last(a.done + block, parts)) return;
        join_parts(all, all_ends, parts, sums, joined_ends);
    }
    for (int i = threadIdx.x; i < BLOCK_HEADS * PADDED; i += THREADS) sums[i] /= joined_ends[i / PADDED].y;
    __syncthreads();
    if constexpr (V_ROTATED) rotate<D>(sums, BLOCK_HEADS);
    finish.prepare();
    for (int i = threadIdx.x; i < heads * D; i += THREADS) {
        const int h = i / D, j = i % D;
        out[i] = finish.number(first + h, j, sums[h * PADDED + j]);
    }
    if (SCORES && threadIdx.x < heads) a.totals[query + threadIdx.x] = joined_ends[threadIdx.x];
}
