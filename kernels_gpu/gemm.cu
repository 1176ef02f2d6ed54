// Products of weights with many rows of activations: prompts. Weights are decoded to halves a tile at a time and
// multiplied, as halves (halves.cuh), on tensor cores.
#include "halves.cuh"
#include "mma.cuh"
#ifdef NUMBER
constexpr int GROUP = 32;
#endif

// A block of 4 warps makes TILE rows of activations times TILE rows of weights; a warp a quarter of it.
constexpr int TILE = 64, WARPS = 4, THREADS = WARPS * WARP;
constexpr int PITCH = GROUP / 2 + 4;  // words of a row of a tile: no two lanes of a load meet in a bank

#ifdef LOW_BITS
#define WEIGHTS const u8 *low, const u8 *high, const u8 *scales, const u32 *supers
#define GIVEN Weights{low, high, scales, supers}
// A thread decodes half a group: which of the two is known only when it runs, so words come by a select.
DEVICE void decode_half(const Weights& w, int rows, int n_in, int row, int column, int half, float factor, u32* to) {
    Group g = {};
    if (row < rows && column < n_in) g = load_group(w, (i64(row) * n_in + column) / GROUP);
    const Steps s = steps_of(g);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float first[4], second[4];
        weights_of(g, s, i, first);
        weights_of(g, s, i + 4, second);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float a = half ? second[2 * j] : first[2 * j], b = half ? second[2 * j + 1] : first[2 * j + 1];
            to[8 * half + 2 * i + j] = two_halves(a * factor, b * factor);
        }
    }
}
#else
#define WEIGHTS const Number* numbers
#define GIVEN numbers
DEVICE void decode_half(const Number* w, int rows, int n_in, int row, int column, int half, float factor, u32* to) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int at = column + 16 * half + 2 * i + j;
            x[j] = row < rows && at < n_in ? number(w[i64(row) * n_in + at]) * factor : 0.0f;
        }
        to[8 * half + i] = two_halves(x[0], x[1]);
    }
}
#endif

// out[n, row] = or += products of x, halves [N, n_in] with factors [N], and weights [rows, n_in]; `largest` [rows] is
// the bits of their largest magnitudes. Grid (N / TILE, rows / TILE), rounded up.
KERNEL gemm(
    const u16* x, const float* factors, int n, int n_in, int rows, const u32* largest, int add, i64 stride, float* out,
    WEIGHTS
) {
    __shared__ u32 activations[TILE * PITCH], weights[TILE * PITCH];
    const int first = blockIdx.x * TILE, first_row = blockIdx.y * TILE;
    const int warp = threadIdx.x / WARP, g = lane_id() / 4, t = lane_id() % 4;
    const int own = warp % 2 * 32, own_row = warp / 2 * 32;  // of the tile
    const int of = threadIdx.x / 2, half = threadIdx.x % 2;  // what a thread loads: a half of a row
    const float inverse = 1.0f / power_of(first_row + of < rows ? largest[first_row + of] : 0);
    float sums[2][4][4] = {};
    for (int column = 0; column < n_in; column += GROUP) {
        __syncthreads();
        decode_half(GIVEN, rows, n_in, first_row + of, column, half, inverse, weights + of * PITCH);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = column + 16 * half + 2 * i;
            const u16* from = x + i64(first + of) * n_in + at;
            const u32 a = first + of < n && at < n_in ? from[0] : 0, b = first + of < n && at + 1 < n_in ? from[1] : 0;
            activations[of * PITCH + 8 * half + i] = a | b << 16;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < GROUP / 2; k += 8) {
            u32 a[2][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32* from = activations + (own + 16 * i + g) * PITCH + k + t;
                a[i][0] = from[0], a[i][1] = from[8 * PITCH], a[i][2] = from[4], a[i][3] = from[8 * PITCH + 4];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32* from = weights + (own_row + 8 * j + g) * PITCH + k + t;
                b[j][0] = from[0], b[j][1] = from[4];
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) multiply_tiles(sums[i][j], a[i], b[j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int at = first + own + 16 * i + g + 8 * (c / 2), row = first_row + own_row + 8 * j + 2 * t + c % 2;
                if (at >= n || row >= rows) continue;
                float* to = out + at * stride + row;
                const float sum = sums[i][j][c] * factors[at] * power_of(largest[row]);
                *to = add ? *to + sum : sum;
            }
        }
    }
}
