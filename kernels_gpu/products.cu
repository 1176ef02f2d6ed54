// Products of weights with a few rows of activations: a decode step. A warp multiplies whole rows of weights, so each
// weight is read once, for all rows of activations; how many of these there are at most is the macro ROWS.
//
// Of one row (ROWS 1) a block makes its input itself, in shared memory: a launch of its own for a norm would leave the
// card idle for as long as some products take.
#include "activations.cuh"
#ifdef LOW_BITS
#include "formats.cuh"
using Input = Rounded;
using Unit = Group;  // what a lane loads at a time, of a row of weights ...
constexpr int COLUMNS = GROUP;  // ... for so many columns of activations
#else
#include "numbers.cuh"
using Input = float;
struct Weights {
    const Number* numbers;
};
struct Unit {
    float x[WIDE];
};
constexpr int COLUMNS = WIDE;
#endif

// Up to three matrices that share their activations, one after the other; absent ones have no rows.
struct Matrix {
    Weights weights;
    int rows;
    float* out;
};
#ifdef LOW_BITS
#define MATRIX(i) const u8 *low##i, const u8 *high##i, const u8 *scales##i, const u32 *supers##i, int rows##i, float *out##i
#define GIVEN(i) {{low##i, high##i, scales##i, supers##i}, rows##i, out##i}
#else
#define MATRIX(i) const Number *numbers##i, int rows##i, float *out##i
#define GIVEN(i) {{numbers##i}, rows##i, out##i}
#endif

#ifdef LOW_BITS
DEVICE Unit load_unit(const Weights& w, i64 row, int n_in, int column) {
    return load_group(w, (row * n_in + column) / GROUP);
}

DEVICE float dot(const Unit& g, const Steps& s, const Rounded& x) {
    int high[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int word = int(codes_of(g, i));
        high[i / 4] = __dp4a(word, int(x.high[i]), high[i / 4]);
        low[i / 4] = __dp4a(word, int(x.low[i]), low[i / 4]);
    }
    const int first = 128 * high[0] + low[0] - OFFSET * x.first, second = 128 * high[1] + low[1] - OFFSET * x.second;
    float total = s.scale[0] * float(BY_16 ? first : first + second);
    if constexpr (BY_16) total += s.scale[1] * float(second);
    if constexpr (HAS_MINIMUM && BY_16) total -= s.minimum[0] * float(x.first) + s.minimum[1] * float(x.second);
    if constexpr (HAS_MINIMUM && !BY_16) total -= s.minimum[0] * float(x.first + x.second);
    return x.scale * total;
}

DEVICE void add_products(const Unit& g, const Rounded* x, int n, int n_in, int column, float (&total)[ROWS]) {
    const Steps s = steps_of(g);
#pragma unroll
    for (int j = 0; j < ROWS; j++) total[j] += dot(g, s, x[(i64(min(j, n - 1)) * n_in + column) / GROUP]);
}

DEVICE void make_input(const Source& source, Rounded* to) { round_row(source, to); }
#else
// Rows that are not aligned to wide loads come number by number; beyond a row is 0.
DEVICE Unit load_unit(const Weights& w, i64 row, int n_in, int column) {
    const Number* from = w.numbers + row * n_in + column;
    Unit unit;
    if (n_in % WIDE == 0) load_wide(from, unit.x);
    else {
#pragma unroll
        for (int i = 0; i < WIDE; i++) unit.x[i] = column + i < n_in ? number(from[i]) : 0.0f;
    }
    return unit;
}

DEVICE void add_products(const Unit& w, const float* x, int n, int n_in, int column, float (&total)[ROWS]) {
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const float* from = x + i64(min(j, n - 1)) * n_in + column;
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            if (n_in % WIDE == 0 || column + i < n_in) total[j] += w.x[i] * from[i];
        }
    }
}

DEVICE void make_input(const Source& source, float* to) {
    for (int i = threadIdx.x; i < source.n_in; i += blockDim.x) to[i] = source(i);
}
#endif

// A row of weights times n rows of input, the sums in every lane. The next unit is on its way while one is multiplied.
DEVICE void multiply_row(const Weights& w, i64 row, const Input* x, int n, int n_in, float (&total)[ROWS]) {
    int column = COLUMNS * lane_id();
    if (column < n_in) {
        Unit next = load_unit(w, row, n_in, column);
        for (; column < n_in; column += COLUMNS * WARP) {
            const Unit unit = next;
            if (column + COLUMNS * WARP < n_in) next = load_unit(w, row, n_in, column + COLUMNS * WARP);
            add_products(unit, x, n, n_in, column, total);
        }
    }
#pragma unroll
    for (int j = 0; j < ROWS; j++) total[j] = sum_over(total[j]);
}

// The input of n rows: as it was given, or made of one row of float activations in shared memory.
DEVICE const Input* input_of(
    const Input* given, const float* x, int n_in, int kind, const float* norm, float eps, float* shared, Input* room
) {
    if (given) return given;
    make_input(source_of(x, n_in, kind, norm, eps, shared), room);
    __syncthreads();
    return room;
}

// out[n, row] = or += products. Any number of blocks share the rows of all matrices. Dynamic shared memory: the input
// of one row, if it is not given.
KERNEL products(
    const Input* given, const float* x, int n, int n_in, int kind, const float* norm, float eps, int add, i64 stride,
    MATRIX(0), MATRIX(1), MATRIX(2)
) {
    extern __shared__ uint4 room[];
    __shared__ float shared[WARP];
    const Input* input = input_of(given, x, n_in, kind, norm, eps, shared, reinterpret_cast<Input*>(room));
    const Matrix first GIVEN(0), second GIVEN(1), third GIVEN(2);
    const int warps = gridDim.x * blockDim.x / WARP, all = rows0 + rows1 + rows2;
    for (int i = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; i < all; i += warps) {
        Matrix m = first;  // copied, because parameters have no address
        int row = i;
        if (i >= rows0) m = second, row = i - rows0;
        if (i >= rows0 + rows1) m = third, row = i - rows0 - rows1;
        float total[ROWS] = {};
        multiply_row(m.weights, row, input, n, n_in, total);
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            if (lane_id() != j || j >= n) continue;
            float* to = m.out + j * stride + row;
            *to = add ? *to + total[j] : total[j];
        }
    }
}

#if ROWS == 1
// silu(gate x) times up x (arXiv 2002.05202), as input of the next products: `rounded` or floats [rows], whichever is
// not null. x becomes input as in `products`. A block of 8 warps makes 32 numbers.
KERNEL gated_products(
    const float* x, int n_in, int kind, const float* norm, float eps, Rounded* rounded, float* floats,
    MATRIX(0), MATRIX(1)
) {
    extern __shared__ uint4 room[];
    __shared__ float shared[WARP], made[WARP];
    const Input* input = input_of(nullptr, x, n_in, kind, norm, eps, shared, reinterpret_cast<Input*>(room));
    const Matrix gate GIVEN(0), up GIVEN(1);
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int i = warp; i < WARP; i += warps) {
        const int row = blockIdx.x * WARP + i;
        float a[1] = {}, b[1] = {};
        if (row < rows0) {
            multiply_row(gate.weights, row, input, 1, n_in, a);
            multiply_row(up.weights, row, input, 1, n_in, b);
        }
        if (lane_id() == 0) made[i] = a[0] / (1.0f + expf(-a[0])) * b[0];
    }
    __syncthreads();
    const int own = blockIdx.x * WARP + lane_id();
    if (warp > 0) return;
    if (rounded) round_group(made[lane_id()], rounded[blockIdx.x]);
    if (floats && own < rows0) floats[own] = made[lane_id()];
}
#endif
