// Attention to rows on tensor cores, of at most 128 numbers: for groups of query heads, and for codes. A warp serves up to
// 8 query heads, the columns of its products; 16 rows at a time are scored, keys times queries, and then added up, values
// times weights. Rows go from memory to registers: which number of a row stands where in a tile does not matter, as long
// as queries and results agree, so that lanes read 8 neighbouring numbers each.
//
// Queries and weights are split into a half and what it leaves over. Codes are exact as halves; a key's scale multiplies
// the products of its block, a value's the codes, which rounds them to halves.
#pragma once
#include "cached.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP, BLOCKS = 3;  // blocks of a multiprocessor
constexpr int SETS = power_from((GROUP + 7) / 8), HEADS = (GROUP + SETS - 1) / SETS;  // sets of heads, heads of a warp
constexpr int BLOCK_SETS = SETS < WARPS ? SETS : WARPS, BLOCK_HEADS = BLOCK_SETS * HEADS;
constexpr bool SMALL = K_STORE == Q4_0 && V_STORE == Q4_0;
constexpr int TILES = (D <= 64 ? 2 : 1) * (SMALL ? 2 : 1);  // of 16 rows, on their way to a warp
constexpr int READ = WARPS / BLOCK_SETS * 16 * TILES;
constexpr int K_PARTS = (D + 31) / 32, V_PARTS = (D + 63) / 64;  // of a row, to which each lane of it has 8 numbers
constexpr float LIFT = 10.0f;  // weights reach to 2^10: small ones are farther from where halves end

// Which of eight numbers is the lower or upper half of a pair.
template <int STORE>
DEVICE constexpr int place(int pair, int half) {
    return STORE == Q4_0 ? pair + 4 * half : 2 * pair + half;
}

DEVICE u32 minus(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    asm("sub.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
#else
    return two_halves(low_half(a) - low_half(b), high_half(a) - high_half(b));
#endif
}

DEVICE u32 times(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    asm("mul.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
#else
    return two_halves(low_half(a) * low_half(b), high_half(a) * high_half(b));
#endif
}

// Eight numbers, or codes without their scale, as pairs of halves. 0x6400 + i is 1024 + i.
DEVICE void pairs_of(const Eight<F16>& from, u32 (&pairs)[4]) {
    pairs[0] = from.words.x, pairs[1] = from.words.y, pairs[2] = from.words.z, pairs[3] = from.words.w;
}

DEVICE void pairs_of(const Eight<Q8_0>& from, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 bytes = (i < 2 ? from.words.x : from.words.y) ^ 0x80808080;
        pairs[i] = minus(__byte_perm(bytes, 0x64646464, i % 2 ? 0x4342 : 0x4140), 0x64806480);
    }
}

DEVICE void pairs_of(const Eight<Q4_0>& from, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = minus((from.word >> 4 * i & 0x000f000f) | 0x64006400, 0x64086408);
}

DEVICE u16 scale_of(const Eight<F16>&) { return 0x3c00; }  // 1
DEVICE u16 scale_of(const Eight<Q8_0>& from) { return from.scale; }
DEVICE u16 scale_of(const Eight<Q4_0>& from) { return from.scale; }

// Of a matrix [8, 8] of which lane 4 g + t has (g, 2 t) and (g, 2 t + 1), those of its transpose.
DEVICE u32 transposed(u32 pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    u32 turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
#else
    const int g = lane_id() / 4, t = lane_id() % 4;
    const u32 low = __shfl_sync(ALL, pair, 8 * t + g / 2), high = __shfl_sync(ALL, pair, 8 * t + 4 + g / 2);
    return __byte_perm(low, high, g % 2 ? 0x7632 : 0x5410);
#endif
}

// What lane 4 g + t knows: queries of head g, and of heads 2 t and 2 t + 1 the softmax, over the rows that its warp has
// read, and sums of some numbers.
struct Reader {
    u32 q[K_PARTS][4], rest[K_PARTS][4];
    float factor[2], high[2], total[2], sum[V_PARTS][4][4];

    DEVICE static int set() { return threadIdx.x / WARP % BLOCK_SETS; }

    DEVICE void begin() {
        high[0] = high[1] = LOWEST, total[0] = total[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < 16 * V_PARTS; i++) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    // What is read from here on goes with these queries [BLOCK_HEADS, PADDED] in shared memory.
    DEVICE void ask(const float* queries) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const float* from = queries + (set() * HEADS + g) * PADDED;
        float x[K_PARTS][8], most = 0.0f;
#pragma unroll
        for (int part = 0; part < K_PARTS; part++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int chunk = 4 * part + t;
                x[part][j] = g < HEADS && chunk < CHUNKS ? from[8 * chunk + j] : 0.0f;
                most = fmaxf(most, fabsf(x[part][j]));
            }
        }
        most = max_over<4>(most);
        const float power = 1e-30f < most && most < INFINITE ? exp2f(floorf(log2f(most))) : 1.0f;
#pragma unroll
        for (int part = 0; part < K_PARTS; part++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float a = x[part][place<K_STORE>(i, 0)] / power, b = x[part][place<K_STORE>(i, 1)] / power;
                q[part][i] = two_halves(a, b);
                rest[part][i] = two_halves(a - low_half(q[part][i]), b - high_half(q[part][i]));
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) factor[i] = __shfl_sync(ALL, power, 4 * (2 * t + i));
    }

    // Rows begin ... end - 1. All threads of a block call.
    template <class Slots>
    DEVICE void read(const Cached& cached, const Slots& slots, int begin, int end) {
        const int g = lane_id() / 4, t = lane_id() % 4, own = threadIdx.x / WARP / BLOCK_SETS * 16 * TILES;
#pragma unroll 1
        for (int at = begin + own; at < end; at += READ) {
            Eight<K_STORE> keys[TILES][2][K_PARTS];
            Values values[TILES];
            int slot[TILES][2];
#pragma unroll
            for (int u = 0; u < TILES; u++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = at + 16 * u + g + 8 * i;
                    slot[u][i] = row < end ? slots.slot(row) : -1;
#pragma unroll
                    for (int part = 0; part < K_PARTS; part++) {
                        keys[u][i][part] = {};
                        if (slot[u][i] >= 0 && 4 * part + t < CHUNKS)
                            keys[u][i][part] = cached.key(slot[u][i], 4 * part + t);
                    }
                }
            }
            load(cached, slots, at, end, values);
            float score[TILES][4];  // of row g + 8 (i / 2) and head 2 t + i % 2
#pragma unroll
            for (int u = 0; u < TILES; u++) {
                scores_of(keys[u], score[u]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    score[u][i] = slot[u][i / 2] < 0 ? -INFINITE : score[u][i] * factor[i % 2];
                    const int head = set() * HEADS + 2 * t + i % 2;
                    if (SCORES && slot[u][i / 2] >= 0 && 2 * t + i % 2 < HEADS && head < cached.heads)
                        cached.scores[i64(head) * cached.slots + slot[u][i / 2]] = score[u][i];
                }
            }
            raise(score);
#pragma unroll
            for (int u = 0; u < TILES; u++) add(values[u], score[u]);
        }
    }

    // Sums of the heads of a block [WARPS / BLOCK_SETS, BLOCK_HEADS, PADDED], each with its highest score and the sum
    // of its weights.
    DEVICE void deposit(float* sums, float2* ends) {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = 2 * t + i, row = threadIdx.x / WARP * HEADS + head;
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) total[i] += __shfl_xor_sync(ALL, total[i], step);
            if (head >= HEADS) continue;
            if (g == 0) ends[row] = make_float2(high[i] - LIFT, total[i]);
#pragma unroll
            for (int part = 0; part < V_PARTS; part++) {
                if (8 * part + g >= CHUNKS) continue;
                float* to = sums + row * PADDED + 8 * (8 * part + g);
#pragma unroll
                for (int j = 0; j < 8; j++) to[place<V_STORE>(j / 2, j % 2)] = sum[part][j / 2][2 * (j % 2) + i];
            }
        }
    }

  private:
    using Values = Eight<V_STORE>[4][V_PARTS];  // of 16 rows

    template <class Slots>
    DEVICE static void load(const Cached& cached, const Slots& slots, int at, int end, Values (&values)[TILES]) {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) {
            const int row = at + 16 * (i / 4) + 2 * t + i % 2 + i / 2 % 2 * 8, slot = row < end ? slots.slot(row) : -1;
#pragma unroll
            for (int part = 0; part < V_PARTS; part++) {
                Eight<V_STORE>& value = values[i / 4][i % 4][part];
                value = {};
                if (slot >= 0 && 8 * part + g < CHUNKS) value = cached.value(slot, 8 * part + g);
            }
        }
    }

    DEVICE void scores_of(const Eight<K_STORE> (&keys)[2][K_PARTS], float (&score)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) score[i] = 0.0f;
#pragma unroll
        for (int part = 0; part < K_PARTS; part++) {
            u32 a[4], b[4];
            pairs_of(keys[0][part], a), pairs_of(keys[1][part], b);
            float product[4] = {};  // of few numbers: long sums of tensor cores drift
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                multiply_tiles(product, {a[i], b[i], a[i + 1], b[i + 1]}, {q[part][i], q[part][i + 1]});
                multiply_tiles(product, {a[i], b[i], a[i + 1], b[i + 1]}, {rest[part][i], rest[part][i + 1]});
            }
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] += to_float(scale_of(keys[i / 2][part])) * product[i];
        }
    }

    // Weights are relative to the highest of all scores from here on.
    DEVICE void raise(const float (&score)[TILES][4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float highest = high[i];
#pragma unroll
            for (int u = 0; u < TILES; u++) highest = fmaxf(highest, fmaxf(score[u][i], score[u][2 + i]));
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, step));
            const float less = power_of_2(high[i] - highest);
            high[i] = highest, total[i] *= less;
#pragma unroll
            for (int j = 0; j < 8 * V_PARTS; j++) sum[j / 8][j / 2 % 4][2 * (j % 2) + i] *= less;
        }
    }

    DEVICE void add(const Values& values, const float (&score)[4]) {
        u32 weights[2], left[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float a = power_of_2(score[2 * i] - high[0] + LIFT), b = power_of_2(score[2 * i + 1] - high[1] + LIFT);
            total[0] += a, total[1] += b;
            const u32 halves = two_halves(a, b);
            weights[i] = transposed(halves);
            left[i] = transposed(two_halves(a - low_half(halves), b - high_half(halves)));
        }
#pragma unroll
        for (int part = 0; part < V_PARTS; part++) {
            u32 x[4][4];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                pairs_of(values[row][part], x[row]);
                if constexpr (V_STORE != F16) {
#pragma unroll
                    for (int i = 0; i < 4; i++) x[row][i] = times(x[row][i], scale_of(values[row][part]) * 0x10001u);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 a[4] = {
                    __byte_perm(x[0][i], x[1][i], 0x5410), __byte_perm(x[0][i], x[1][i], 0x7632),
                    __byte_perm(x[2][i], x[3][i], 0x5410), __byte_perm(x[2][i], x[3][i], 0x7632)};
                multiply_tiles(sum[part][i], a, weights);
                multiply_tiles(sum[part][i], a, left);
            }
        }
    }
};
