// Products of two long lists of rows of which only little is wanted: one state for each row that stays, from its
// products with all rows that pass. Those that stay lie in registers, those that pass go through shared memory in
// tiles, and each tile of products is used up where it was made, so that no matrix of products ever exists.
//
// Products are of halves on tensor cores. Where that is not exact enough, a number is split into the sum of two halves,
// and the product of the lower ones left out, which is below 2^-21 of the whole.
//
// Macros: HEAD_DIM, K_STORE. What includes this has said before whether numbers are SPLIT.
#pragma once
#include "mma.cuh"
#include "rows.cuh"

constexpr int D = HEAD_DIM;
constexpr int RUNS = (D + 31) / 32;  // of 32 numbers, which two products of tiles take
constexpr int WARPS = 8, THREADS = WARPS * WARP;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750  // products without tensor cores need more registers
constexpr int BLOCKS = 1;
#else
constexpr int BLOCKS = RUNS <= 4 ? 2 : 1;  // of a multiprocessor
#endif
constexpr int TILES = RUNS * (SPLIT ? 2 : 1) <= 4 ? 2 : 1;  // of 16 rows that stay with a warp
constexpr int STAYING = WARPS * TILES * 16;                 // rows of a block
constexpr int PASSING = 32;                                 // rows in shared memory
constexpr int PITCH = 4 * (RUNS | 1);                       // 16-byte words of one: eight lanes meet no bank twice

// Eight numbers as sums of two halves; the second are not looked at if nothing is split.
struct Halves {
    uint4 high, low;
};

DEVICE Halves split(const float (&x)[8]) {
    u32 high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        high[i] = two_halves(x[2 * i], x[2 * i + 1]);
        low[i] = two_halves(x[2 * i] - low_half(high[i]), x[2 * i + 1] - high_half(high[i]));
    }
    return {make_uint4(high[0], high[1], high[2], high[3]), make_uint4(low[0], low[1], low[2], low[3])};
}

// The keys of one head.
struct Keys {
    const u8* codes;
    const u16* scales;

    DEVICE Keys(const u8* codes, const u16* scales, i64 first)
        : codes(codes + first * ROW_BYTES<K_STORE, D>),
          scales(K_STORE < Q8_0 ? nullptr : scales + first * (D / BLOCK)) {}

    DEVICE Rows rows() const { return {const_cast<u8*>(codes), const_cast<u16*>(scales), 0, 0}; }

    // Numbers 8 piece ... of a row; times a factor, unless they are halves.
    DEVICE Halves halves(int slot, int piece, float factor) const {
        if constexpr (K_STORE == F16) {
            return {fetch<F16, D>(rows(), slot, piece).words, {}};
        } else {
            float x[8];
            load8<K_STORE, D>(rows(), slot, piece, x);
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] *= factor;
            return split(x);
        }
    }
};

// Rows from ... to - 1 pass by rows first ... first + STAYING - 1. The job has
//   State                of a row that stays; states[m][r] of lanes 4 g ... 4 g + 3: row 16 m + 8 r + g of their warp,
//                        each from a quarter of the products
//   rows                 that stay, of all blocks
//   staying(i, piece)    numbers 8 piece ... of a row
//   passing(i, piece)
//   factor(i), mark(i)   what else it wants to know of a row that passes
//   idle(first, i)       whether rows from `first` on want nothing of rows i ... i + PASSING - 1
//   meet(state, row, product, factor, mark)
// All threads of the block call. A number k of a run of 32 stands in another place of a product than k, but both rows'
// do: so a lane's numbers are 16 bytes that lie together.
template <class Job>
DEVICE void pass_by(const Job& job, int first, int from, int to, typename Job::State (&states)[TILES][2]) {
    constexpr int PARTS = SPLIT ? 2 : 1;
    __shared__ uint4 high[PASSING * PITCH], low[SPLIT ? PASSING * PITCH : 1];
    __shared__ float factors[PASSING];
    __shared__ int marks[PASSING];
    const int g = lane_id() / 4, t = lane_id() % 4, own = first + threadIdx.x / WARP * TILES * 16;

    u32 a[PARTS][TILES][RUNS][2][4];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = own + 16 * m + 8 * r + g, piece = 4 * run + t;
                Halves x = {};
                if (row < job.rows && 8 * piece < D) x = job.staying(row, piece);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    const uint4 words = part ? x.low : x.high;
                    a[part][m][run][0][r] = words.x, a[part][m][run][0][2 + r] = words.y;
                    a[part][m][run][1][r] = words.z, a[part][m][run][1][2 + r] = words.w;
                }
            }
        }
    }

    for (int begin = from; begin < to; begin += PASSING) {
        __syncthreads();
#pragma unroll 2
        for (int i = threadIdx.x; i < PASSING * 4 * RUNS; i += THREADS) {
            const int row = i / (4 * RUNS), piece = i % (4 * RUNS);
            Halves x = {};
            if (begin + row < to && 8 * piece < D) x = job.passing(begin + row, piece);
            high[row * PITCH + piece] = x.high;
            if constexpr (SPLIT) low[row * PITCH + piece] = x.low;
        }
        if (threadIdx.x < PASSING) {
            const int i = begin + threadIdx.x;
            factors[threadIdx.x] = i < to ? job.factor(i) : NOT_A_NUMBER;
            marks[threadIdx.x] = i < to ? job.mark(i) : -1;
        }
        __syncthreads();
        if (own >= job.rows || job.idle(own, begin)) continue;
#pragma unroll 1
        for (int n = 0; n < PASSING; n += 8) {
            float sums[TILES][4] = {}, corrections[TILES][4] = {};
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                const uint4 x = high[(n + g) * PITCH + 4 * run + t];
                const u32 b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
                for (int k = 0; k < 2; k++) {
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        multiply_tiles(sums[m], a[0][m][run][k], b[k]);
                        if constexpr (SPLIT) multiply_tiles(corrections[m], a[1][m][run][k], b[k]);
                    }
                }
                if constexpr (SPLIT) {
                    const uint4 y = low[(n + g) * PITCH + 4 * run + t];
                    const u32 c[2][2] = {{y.x, y.y}, {y.z, y.w}};
#pragma unroll
                    for (int k = 0; k < 2; k++) {
#pragma unroll
                        for (int m = 0; m < TILES; m++) multiply_tiles(corrections[m], a[0][m][run][k], c[k]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float factor = factors[n + 2 * t + i];
                const int mark = marks[n + 2 * t + i];
#pragma unroll
                for (int m = 0; m < TILES; m++) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const float product = sums[m][2 * r + i] + corrections[m][2 * r + i];
                        job.meet(states[m][r], own + 16 * m + 8 * r + g, product, factor, mark);
                    }
                }
            }
        }
    }
}

// The row of states[m][r].
DEVICE int row_that_stays(int first, int m, int r) {
    return first + (threadIdx.x / WARP * TILES + m) * 16 + 8 * r + lane_id() / 4;
}
