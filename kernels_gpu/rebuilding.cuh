// Keys and values rebuilt from tiles of latents, on tensor cores: numbers [slots, d] = latents [slots, r] times a
// factor [r, d] of halves, a bias and a norm after it; keys turned by their positions.
//
// Numbers of a head lie so that pairs which turn together are neighbours: number 2 i and 2 i + 1 are pair i, as
// `place_of` tells. Eight of them, filled up with 0, are the columns that lane 4 g + t has two of: 2 t and 2 t + 1.
#pragma once
#include "latents.cuh"
#include "mma.cuh"

constexpr int D = HEAD_DIM;
constexpr int COLUMNS = (D + 7) / 8;  // of eight numbers, in a head
constexpr int WARPS = 8, THREADS = WARPS * WARP;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
constexpr int AT_ONCE = 2;  // columns of a warp: what stands for tensor cores needs registers of its own
#else
constexpr int AT_ONCE = 8;
#endif
constexpr float RADIANS = 1.46291808e-9f;  // pi / 2^31

// See factors.py.
struct Factor {
    const uint4* values;     // [H_kv, COLUMNS, blocks, lanes]
    float power;             // times which they count
    const float *bias, *norm;  // [H_kv, 8 COLUMNS], [8 COLUMNS], or null
    float eps;
    const u64* frequencies;  // [pairs]: turns of a position, 2^64 being a whole one
    int pairs, interleaved;
    float magnitude;
};

#define FACTOR                                                                                          \
    const uint4 *factor_values, float factor_power, const float *factor_bias, const float *factor_norm, \
        float factor_eps, const u64 *factor_frequencies, int factor_pairs, int factor_interleaved,      \
        float factor_magnitude
#define GIVEN_FACTOR                                                                                         \
    Factor {                                                                                                 \
        factor_values, factor_power, factor_bias, factor_norm, factor_eps, factor_frequencies, factor_pairs, \
            factor_interleaved, factor_magnitude                                                             \
    }

// Where number j of a rebuilt head lies in the model's.
DEVICE int place_of(const Factor& f, int j) {
    return f.interleaved || j >= 2 * f.pairs ? j : j / 2 + j % 2 * f.pairs;
}

// Numbers from one slot's turns to the next: no two lanes of a load meet in a bank.
DEVICE int turns_pitch(int pairs) { return (pairs + 15) / 16 * 16 + 4; }

// Cosines and sines [SLOTS, pitch] of the first n rows of a tile of keys; 0 of the others.
template <class Keys>
DEVICE void find_turns(const Keys& tile, const Factor& f, int slots, int n, float2* turns) {
    const int pitch = turns_pitch(f.pairs);
    for (int i = threadIdx.x; i < slots * f.pairs; i += blockDim.x) {
        const int row = i / f.pairs, pair = i % f.pairs;
        float2 turn = make_float2(0.0f, 0.0f);
        if (row < n) {
            // What is left of whole turns is exact at any position, and small enough for the fast sine.
            const float angle = float(int(u32(u64(tile.position(row)) * f.frequencies[pair] >> 32))) * RADIANS;
            turn = make_float2(f.magnitude * __cosf(angle), f.magnitude * __sinf(angle));
        }
        turns[row * pitch + pair] = turn;
    }
}

// 16 x 16 halves in shared memory: an a of multiply_tiles, or, TURNED, two b of it after each other, whose rows are rows
// here.
template <bool TURNED>
DEVICE void load_square(const u16* from, int pitch, u32 (&x)[4]) {
    load_matrices<TURNED>(from + lane_id() % 16 * pitch + lane_id() / 16 * 8, x);
}

// A warp's numbers: 16 M rows of a tile, 8 N columns of a head. A lane has rows g + 8 i, i < 2 M.
template <int M, int N>
struct Rebuilt {
    float x[M][N][4];

    // latents: those of the first row; values: of the first column. Of n columns, which may be fewer than N.
    DEVICE void multiply(const u16* latents, int pitch, const uint4* values, int blocks, int n) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int j = 0; j < N; j++) x[m][j][0] = x[m][j][1] = x[m][j][2] = x[m][j][3] = 0.0f;
        }
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            u32 a[M][2][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                load_square<false>(latents + 16 * m * pitch + UNIT * block, pitch, a[m][0]);
                load_square<false>(latents + 16 * m * pitch + UNIT * block + 16, pitch, a[m][1]);
            }
            uint4 b[N];
#pragma unroll
            for (int j = 0; j < N; j++) {
                b[j] = make_uint4(0, 0, 0, 0);
                if (j < n) b[j] = values[(j * blocks + block) * WARP + lane_id()];
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                if (j >= n) continue;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    multiply_tiles(x[m][j], a[m][0], {b[j].x, b[j].y});
                    multiply_tiles(x[m][j], a[m][1], {b[j].z, b[j].w});
                }
            }
        }
    }

    // What comes after the product, but for the norm's division: squares [2 M] grow by those it needs. column: the
    // first; turns: those of the first row, or null.
    DEVICE void finish(const Factor& f, int head, int column, int n, const float2* turns, float (&squares)[2 * M]) {
        const int t = lane_id() % 4, pitch = turns_pitch(f.pairs);
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (j >= n) continue;
            const int first = 8 * (column + j) + 2 * t, pair = first / 2;
            float2 bias = make_float2(0.0f, 0.0f), norm = make_float2(1.0f, 1.0f);
            if (f.bias) bias = *reinterpret_cast<const float2*>(f.bias + head * 8 * COLUMNS + first);
            if (f.norm) norm = *reinterpret_cast<const float2*>(f.norm + first);
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
                float &a = x[i / 2][j][i % 2 * 2], &b = x[i / 2][j][i % 2 * 2 + 1];
                a = a * f.power + bias.x, b = b * f.power + bias.y;
                squares[i] += a * a + b * b;
                a *= norm.x, b *= norm.y;
                if (turns && pair < f.pairs) {
                    const float2 turn = turns[(lane_id() / 4 + 8 * i) * pitch + pair];
                    const float turned = a * turn.x - b * turn.y;
                    b = a * turn.y + b * turn.x, a = turned;
                }
            }
        }
    }

    // Lane by lane products with a query [8 N] in shared memory are added to sums [2 M].
    DEVICE void score(const float* query, int n, float (&sums)[2 * M]) const {
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (j >= n) continue;
            const float2 q = *reinterpret_cast<const float2*>(query + 8 * j + 2 * (lane_id() % 4));
#pragma unroll
            for (int i = 0; i < 2 * M; i++)
                sums[i] += x[i / 2][j][i % 2 * 2] * q.x + x[i / 2][j][i % 2 * 2 + 1] * q.y;
        }
    }

    // Times `less`, as rows of halves [D], of which there are `rows`.
    DEVICE void store(const Factor& f, int column, int n, const float (&less)[2 * M], int rows, u16* to) const {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int first = 8 * (column + j) + 2 * (lane_id() % 4);
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
                const int row = lane_id() / 4 + 8 * i;
                if (j >= n || row >= rows) continue;
                u16* at = to + i64(row) * D;
                if (first < D) at[place_of(f, first)] = to_half(x[i / 2][j][i % 2 * 2] * less[i]);
                if (first + 1 < D) at[place_of(f, first + 1)] = to_half(x[i / 2][j][i % 2 * 2 + 1] * less[i]);
            }
        }
    }
};
