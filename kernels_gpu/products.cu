// Products of weights with a few rows of activations: a decode step. A warp multiplies whole rows of weights, so each
// weight is read once, for all rows of activations; how many of these there are at most is the macro ROWS.
#include "activations.cuh"
#ifdef LOW_BITS
#include "formats.cuh"
#else
#include "numbers.cuh"
#endif

// out[n, row] = or += sums, of N rows of activations.
DEVICE void write(float (&sums)[ROWS], float* out, i64 stride, int row, int n, int add) {
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const float sum = sum_over(sums[j]);
        if (lane_id() == 0 && j < n) {
            float* to = out + j * stride + row;
            *to = add ? *to + sum : sum;
        }
    }
}

#ifdef LOW_BITS
DEVICE float dot(const Group& g, const Steps& s, const Codes& x, const Sums& sums) {
    int high[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int word = int(codes_of(g, i));
        high[i / 4] = __dp4a(word, int(x.high[i]), high[i / 4]);
        low[i / 4] = __dp4a(word, int(x.low[i]), low[i / 4]);
    }
    const int first = 128 * high[0] + low[0] - OFFSET * sums.first;
    const int second = 128 * high[1] + low[1] - OFFSET * sums.second;
    if constexpr (!BY_16) {
        float total = s.scale[0] * float(first + second);
        if constexpr (HAS_MINIMUM) total -= s.minimum[0] * float(sums.first + sums.second);
        return sums.scale * total;
    } else {
        float total = s.scale[0] * float(first) + s.scale[1] * float(second);
        if constexpr (HAS_MINIMUM) total -= s.minimum[0] * float(sums.first) + s.minimum[1] * float(sums.second);
        return sums.scale * total;
    }
}

// Up to three matrices of a format that share their activations, one after the other; absent ones have no rows.
// Grid: warps for all rows of all matrices. x: rounded activations of n rows, `groups` of 32 columns each.
KERNEL products(
    const Codes* codes, const Sums* sums, int n, int groups, int add, i64 stride,
    const u8* low0, const u8* high0, const u8* scales0, const u32* supers0, int rows0, float* out0,
    const u8* low1, const u8* high1, const u8* scales1, const u32* supers1, int rows1, float* out1,
    const u8* low2, const u8* high2, const u8* scales2, const u32* supers2, int rows2, float* out2
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    Weights w{low0, high0, scales0, supers0};
    float* out = out0;
    if (row >= rows0) {
        row -= rows0;
        w = {low1, high1, scales1, supers1}, out = out1;
        if (row >= rows1) {
            row -= rows1;
            w = {low2, high2, scales2, supers2}, out = out2;
            if (row >= rows2) return;
        }
    }
    float total[ROWS] = {};
    const i64 begin = i64(row) * groups;
#pragma unroll 2
    for (int group = lane_id(); group < groups; group += WARP) {
        const Group g = load_group(w, begin + group);
        const Steps s = steps_of(g);
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const i64 at = i64(min(j, n - 1)) * groups + group;
            total[j] += dot(g, s, codes[at], sums[at]);
        }
    }
    write(total, out, stride, row, n, add);
}
#else
// The same of numbers; x: float activations [n, n_in]. Wide loads if rows are aligned to them.
KERNEL products(
    const float* x, int n, int n_in, int add, i64 stride,
    const Number* w0, int rows0, float* out0, const Number* w1, int rows1, float* out1,
    const Number* w2, int rows2, float* out2
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const Number* w = w0;
    float* out = out0;
    if (row >= rows0) {
        row -= rows0, w = w1, out = out1;
        if (row >= rows1) {
            row -= rows1, w = w2, out = out2;
            if (row >= rows2) return;
        }
    }
    float total[ROWS] = {};
    w += i64(row) * n_in;
    if (n_in % WIDE == 0) {
#pragma unroll 4
        for (int i = WIDE * lane_id(); i < n_in; i += WIDE * WARP) {
            float a[WIDE];
            load_wide(w + i, a);
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                const float* b = x + i64(min(j, n - 1)) * n_in + i;
#pragma unroll
                for (int c = 0; c < WIDE; c++) total[j] += a[c] * b[c];
            }
        }
    } else {
        for (int i = lane_id(); i < n_in; i += WARP) {
            for (int j = 0; j < ROWS; j++) total[j] += number(w[i]) * x[i64(min(j, n - 1)) * n_in + i];
        }
    }
    write(total, out, stride, row, n, add);
}
#endif
