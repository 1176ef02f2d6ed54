// Causal attention of a prompt's chunk on tensor cores: halves, added up as floats. Heads of a multiple of 16 numbers.
//
// A block of 4 warps has 64 rows, a warp 16 of them: scores, weights and sums stay in its registers, as in
// FlashAttention-2 (arXiv 2307.08691); keys and values pass through shared memory.
#include "chunk.cuh"
#include "instructions.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP, ROWS = 16 * WARPS;
constexpr int KEYS = D <= 128 ? 64 : 16;  // in shared memory at a time
constexpr int PITCH = D + 8;              // halves from one key to the next: no two lanes of a load meet in a bank
constexpr float LIFT = 10.0f;             // weights reach to 2^10: small ones are farther from where halves end

// Eight numbers of a row as halves.
template <int STORE>
DEVICE uint4 as_halves(const Eight<STORE>& from) {
    if constexpr (STORE == F16) return from.words;
    else {
        float x[8];
        unpack(from, x);
        const u32 low = two_halves(x[0], x[1]), next = two_halves(x[2], x[3]);
        return make_uint4(low, next, two_halves(x[4], x[5]), two_halves(x[6], x[7]));
    }
}

// Asks for slots begin ... begin + KEYS - 1 as halves, those from `end` on as 0; they are there after `arrived`.
template <int STORE>
DEVICE void ask(const Rows& rows, i64 first, int begin, int end, u16* to) {
#pragma unroll 4
    for (int n = 0; n < (KEYS * (D / 8) + THREADS - 1) / THREADS; n++) {
        const int i = n * THREADS + threadIdx.x, row = i / (D / 8), chunk = i % (D / 8);
        if (KEYS * (D / 8) % THREADS && row >= KEYS) break;
        u16* at = to + row * PITCH + 8 * chunk;
        const i64 from = first + min(begin + row, end - 1);
        if constexpr (STORE == F16) {
            const u8* its = rows.codes + from * ROW_BYTES<STORE, D> + 16 * chunk;
            copy_ahead(reinterpret_cast<uint4*>(at), reinterpret_cast<const uint4*>(its), begin + row < end);
            continue;
        }
        uint4 x = make_uint4(0, 0, 0, 0);
        if (begin + row < end) x = as_halves(fetch<STORE, D>(rows, from, chunk));
        *reinterpret_cast<uint4*>(at) = x;
    }
    end_copies();
}

// Waits, with all threads of the block, for all that was asked for but the last.
DEVICE void arrived() {
    await_copies<1>();
    __syncthreads();
}

// Two b of multiply_tiles at once from rows in shared memory. Keys: 16 numbers of 16 keys, b[2 i], b[2 i + 1] of keys
// 8 i ...; values: 16 keys of 16 numbers, b[2 i], b[2 i + 1] of numbers 8 i ...
template <bool VALUES>
DEVICE void load_tiles(const u16* rows, u32 (&b)[4]) {
    const int lane = lane_id(), own = lane / 8;
    const int row = lane % 8 + 8 * (VALUES ? own % 2 : own / 2), column = 8 * (VALUES ? own / 2 : own % 2);
    load_matrices<VALUES>(rows + row * PITCH + column, b);
}

// The 16 rows of a warp, of which a lane has `first` and first + 8.
struct Tile {
    u32 q[D / 16][4];
    float factor[2];  // of products with q, to scores
    float high[2], total[2], sum[D / 8][4];

    // Queries as halves, the largest of a row below 2: their range is theirs alone.
    DEVICE void begin(const float* from, const Chunk& chunk, int first) {
        const int t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + 8 * i;
            const bool is = row < chunk.n * GROUP;
            const float2* x = reinterpret_cast<const float2*>(from + chunk.query(is ? row : 0) * D) + t;
            float most = 0.0f;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const float2 pair = x[4 * j];
                most = fmaxf(most, fmaxf(fabsf(pair.x), fabsf(pair.y)));
            }
            most = max_over<4>(most);
            const float power = 1e-30f < most && most < INFINITE ? exp2f(floorf(log2f(most))) : 1.0f;
            const float inverse = 1.0f / power;
            factor[i] = power * rsqrtf(float(D)) * LOG2_E;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const float2 pair = x[4 * j];
                q[j / 2][j % 2 * 2 + i] = is ? two_halves(pair.x * inverse, pair.y * inverse) : 0;
            }
            high[i] = LOWEST, total[i] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sum[j][i] = 0.0f;
        }
    }

    // Products with KEYS keys: with `factor`, scores.
    DEVICE void multiply(const u16* keys, float (&product)[KEYS / 8][4]) const {
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) product[2 * j][i] = product[2 * j + 1][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                u32 b[4];
                load_tiles<false>(keys + 16 * j * PITCH + 16 * k, b);
                multiply_tiles(product[2 * j], q[k], {b[0], b[1]});
                multiply_tiles(product[2 * j + 1], q[k], {b[2], b[3]});
            }
        }
    }

    // Those with slots begin ... that their rows do not see become weightless.
    DEVICE static void hide(float (&product)[KEYS / 8][4], const Chunk& chunk, int first, int begin) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + 8 * i, least = chunk.begin(row), end = chunk.end(row);
#pragma unroll
            for (int j = 0; j < KEYS / 4; j++) {
                const int slot = begin + 8 * (j / 2) + 2 * (lane_id() % 4) + j % 2;
                if (slot < least || slot >= end) product[j / 2][2 * i + j % 2] = -INFINITE;
            }
        }
    }

    // Weights of row `first` + 8 i are relative to the highest of all its scores from here on.
    DEVICE void raise(const float (&product)[KEYS / 8][4], int i) {
        float most = -INFINITE;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) most = fmaxf(most, fmaxf(product[j][2 * i], product[j][2 * i + 1]));
        const float highest = fmaxf(high[i], max_over<4>(most) * factor[i]), less = power_of_2(high[i] - highest);
        high[i] = highest;
        if (!__any_sync(ALL, less != 1.0f)) return;
        total[i] *= less;
#pragma unroll
        for (int j = 0; j < D / 8; j++) sum[j][2 * i] *= less, sum[j][2 * i + 1] *= less;
    }

    DEVICE void add(const u16* values, const float (&product)[KEYS / 8][4]) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            u32 weights[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&two)[4] = product[2 * j + i / 2];
                const int row = i % 2;
                const float a = power_of_2(two[2 * row] * factor[row] - (high[row] - LIFT));
                const float b = power_of_2(two[2 * row + 1] * factor[row] - (high[row] - LIFT));
                total[row] += a + b;
                weights[i] = two_halves(a, b);
            }
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                u32 b[4];
                load_tiles<true>(values + 16 * j * PITCH + 16 * k, b);
                multiply_tiles(sum[2 * k], weights, {b[0], b[1]});
                multiply_tiles(sum[2 * k + 1], weights, {b[2], b[3]});
            }
        }
    }

    DEVICE void end(const Chunk& chunk, int first, float* out, float* lse) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + 8 * i, t = lane_id() % 4;
            total[i] = sum_over<4>(total[i]);
            if (row >= chunk.n * GROUP) continue;
            const i64 at = chunk.query(row);
            const float part = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
            float2* to = reinterpret_cast<float2*>(out + at * D) + t;
#pragma unroll
            for (int j = 0; j < D / 8; j++) to[4 * j] = make_float2(sum[j][2 * i] * part, sum[j][2 * i + 1] * part);
            if (lse && t == 0) lse[at] = logarithm(high[i] - LIFT, total[i]);
        }
    }
};

// Grid (rows / ROWS rounded up, H_kv).
KERNEL __launch_bounds__(THREADS, 2) attend_chunk(
    const float* q, u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence,
    i64 v_head, int seq, int n, int start, int window, int stop, float* out, float* lse
) {
    __shared__ __align__(16) u16 keys[KEYS * PITCH];
    __shared__ __align__(16) u16 values[KEYS * PITCH];
    const Rows k{k_codes, k_scales, k_sequence, k_head}, v{v_codes, v_scales, v_sequence, v_head};
    const Chunk chunk{n, start, window, stop};
    const int block = gridDim.x - 1 - blockIdx.x;  // those that see most come first
    const int low = block * ROWS, high = min(low + ROWS, n * GROUP) - 1;
    const int first = low + threadIdx.x / WARP * 16 + lane_id() / 4;
    Tile tile;
    tile.begin(q, chunk, first);
    const i64 k_first = k.row(seq, blockIdx.y, 0), v_first = v.row(seq, blockIdx.y, 0);
    const int end = chunk.end(high), begin = chunk.begin(low) / KEYS * KEYS;
    if (begin < end) {
        ask<K_STORE>(k, k_first, begin, end, keys);
        ask<V_STORE>(v, v_first, begin, end, values);
    }
    // Keys of the next tile are on their way while values of this one are added up, and the other way round; the last
    // tile asks for a row that nobody reads.
    for (int at = begin; at < end; at += KEYS) {
        float product[KEYS / 8][4];
        const int next = min(at + KEYS, end - 1);
        arrived();
        tile.multiply(keys, product);
        __syncthreads();
        ask<K_STORE>(k, k_first, next, end, keys);
        if (at < chunk.begin(high) || at + KEYS > chunk.end(low)) tile.hide(product, chunk, first, at);
        tile.raise(product, 0), tile.raise(product, 1);
        arrived();
        tile.add(values, product);
        __syncthreads();
        ask<V_STORE>(v, v_first, next, end, values);
    }
    tile.end(chunk, first, out, lse);
}
