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
constexpr int INPUTS = 1;       // that hold them
constexpr int AHEAD = ROWS == 1 && HIGH_BITS == 0 ? 2 : 1;  // units on their way to a lane
#else
#include "numbers.cuh"
using Input = float;
struct Weights {
    const Number* numbers;
};
using Unit = uint4;
constexpr int COLUMNS = WIDE, INPUTS = WIDE;
constexpr int AHEAD = ROWS <= 2 ? 4 : 2;
#endif

constexpr int THREADS = 256, BLOCKS = ROWS == 1 ? 4 : 3;  // of a multiprocessor, at least

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
DEVICE Unit load_unit(const Weights& w, int unit) { return load_group(w, unit); }

DEVICE float dot(const Unit& g, const Steps& s, const Rounded& x) {
    int high[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 above = x.high[half], below = x.low[half];
        const u32 highs[4] = {above.x, above.y, above.z, above.w}, lows[4] = {below.x, below.y, below.z, below.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int word = int(codes_of(g, 4 * half + i));
            high[half] = __dp4a(word, int(highs[i]), high[half]);
            low[half] = __dp4a(word, int(lows[i]), low[half]);
        }
    }
    const int first = 128 * high[0] + low[0] - OFFSET * x.first, second = 128 * high[1] + low[1] - OFFSET * x.second;
    float total = s.scale[0] * float(BY_16 ? first : first + second);
    if constexpr (BY_16) total += s.scale[1] * float(second);
    if constexpr (HAS_MINIMUM && BY_16) total -= s.minimum[0] * float(x.first) + s.minimum[1] * float(x.second);
    if constexpr (HAS_MINIMUM && !BY_16) total -= s.minimum[0] * float(x.first + x.second);
    return x.scale * total;
}

DEVICE void add_products(const Unit& g, const Rounded* x, int n, int units, float (&total)[ROWS]) {
    const Steps s = steps_of(g);
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        if (ROWS == 1 || j < n) total[j] += dot(g, s, x[j * units]);
    }
}

DEVICE void make_input(const Source& source, Rounded* to) { round_row(source, to); }
#else
DEVICE Unit load_unit(const Weights& w, int unit) { return reinterpret_cast<const uint4*>(w.numbers)[unit]; }

DEVICE void add_products(const Unit& unit, const float* x, int n, int units, float (&total)[ROWS]) {
    // Of eight numbers every other four lanes take the second half first: eight lanes meet no bank twice.
    const int turn = WIDE == 8 ? lane_id() / 4 % 2 : 0;
    float w[WIDE];
    unpack(turn ? make_uint4(unit.z, unit.w, unit.x, unit.y) : unit, w);
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        if (ROWS > 1 && j >= n) continue;
#pragma unroll
        for (int i = 0; i < WIDE; i += 4) {
            const float4 y = four_of(x + j * units * WIDE + (i ^ 4 * turn));
            total[j] += w[i] * y.x + w[i + 1] * y.y + w[i + 2] * y.z + w[i + 3] * y.w;
        }
    }
}

// Rows that are not aligned to wide loads.
DEVICE void add_singly(const Number* w, const float* x, int n, int n_in, float (&total)[ROWS]) {
#pragma unroll 1
    for (int column = lane_id(); column < n_in; column += WARP) {
        const float weight = number(w[column]);
#pragma unroll
        for (int j = 0; j < ROWS; j++) total[j] += weight * x[min(j, n - 1) * n_in + column];
    }
}

DEVICE void make_input(const Source& source, float* to) {
    for (int i = threadIdx.x; i < source.n_in; i += blockDim.x) to[i] = source(i);
}
#endif

// A row of weights; below 0 there is none.
struct Row {
    Weights weights;
    int index;
};

// Rows of weights that a warp multiplies one after the other. Some units are always on their way from memory: those
// that come next in a row, or the first of the row after it.
struct Stream {
    Row row;
    Unit ahead[AHEAD];

    DEVICE void ask(int u, int begin, int units) {
        const int unit = begin + WARP * u + lane_id();
        if (row.index >= 0 && unit < units) ahead[u] = load_unit(row.weights, row.index * units + unit);
    }

    DEVICE void begin(const Row& first, int n_in) {
        row = first;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) ask(u, 0, n_in % COLUMNS ? 0 : n_in / COLUMNS);
    }

    // Multiplies what was asked for, units `at` ..., while those from `then` on of `row` are asked for.
    DEVICE void round(const Input* x, int n, int units, int at, int then, float (&total)[ROWS]) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const Unit unit = ahead[u];
            ask(u, then, units);
            const int own = at + WARP * u + lane_id();
            if (own < units) add_products(unit, x + own * INPUTS, n, units, total);
        }
    }

    // The row times n rows of input, the sums in every lane; the next row is begun.
    template <class Next>
    DEVICE void multiply(const Input* x, int n, int n_in, const Next& next, float (&total)[ROWS]) {
        const int units = n_in % COLUMNS ? 0 : n_in / COLUMNS;
#ifdef NUMBER
        if (n_in % COLUMNS) add_singly(row.weights.numbers + i64(row.index) * n_in, x, n, n_in, total);
#endif
        int at = 0;
#pragma unroll 1
        for (; at + AHEAD * WARP < units; at += AHEAD * WARP) round(x, n, units, at, at + AHEAD * WARP, total);
        row = next();
        round(x, n, units, at, 0, total);
#pragma unroll
        for (int j = 0; j < ROWS; j++) total[j] = sum_over(total[j]);
    }
};

// out[n, row] = or += products. Any number of blocks share the rows of all matrices. The input of n rows is given, or
// made of one row of float activations in dynamic shared memory.
KERNEL __launch_bounds__(THREADS, BLOCKS) products(
    const Input* given, const float* x, int n, int n_in, int kind, const float* norm, float eps, int add, i64 stride,
    MATRIX(0), MATRIX(1), MATRIX(2)
) {
    const Matrix first GIVEN(0), second GIVEN(1), third GIVEN(2);
    const int warps = gridDim.x * blockDim.x / WARP, own = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int all = rows0 + rows1 + rows2;
    const auto row_of = [=](int i) {
        Row row{first.weights, i < all ? i : -1};  // copied, because parameters have no address
        if (i >= rows0 && i < all) row = {second.weights, i - rows0};
        if (i >= rows0 + rows1 && i < all) row = {third.weights, i - rows0 - rows1};
        return row;
    };
    Stream stream;
    stream.begin(row_of(own), n_in);
    const auto multiply = [&](const Input* input) {
#pragma unroll 1
        for (int i = own; i < all; i += warps) {
            float total[ROWS] = {};
            stream.multiply(input, n, n_in, [&] { return row_of(i + warps); }, total);
            float* out = first.out + i;
            if (i >= rows0) out = second.out + (i - rows0);
            if (i >= rows0 + rows1) out = third.out + (i - rows0 - rows1);
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                if (lane_id() != j || j >= n) continue;
                float* to = out + j * stride;
                *to = add ? *to + total[j] : total[j];
            }
        }
    };
#if ROWS == 1
    if (!given) {
        extern __shared__ uint4 room[];
        __shared__ float shared[WARP];
        Input* made = reinterpret_cast<Input*>(room);
        make_input(source_of(x, n_in, kind, norm, eps, shared), made);
        __syncthreads();
        return multiply(made);  // apart from what is given, so that loads from shared memory are known to be
    }
#endif
    multiply(given);
}

#if ROWS == 1
// silu(gate x) times up x (arXiv 2002.05202), as input of the next products: `rounded` or floats [rows], whichever is
// not null. x becomes input as in `products`. A block of 8 warps makes 32 numbers.
KERNEL __launch_bounds__(THREADS, BLOCKS) gated_products(
    const float* x, int n_in, int kind, const float* norm, float eps, Rounded* rounded, float* floats,
    MATRIX(0), MATRIX(1)
) {
    extern __shared__ uint4 room[];
    __shared__ float shared[WARP];
    __shared__ __align__(16) float made[WARP];
    const Matrix gate GIVEN(0), up GIVEN(1);
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const auto row_of = [=](int i, const Weights& weights) {
        const int row = blockIdx.x * WARP + i;
        return Row{weights, i < WARP && row < rows0 ? row : -1};
    };
    Stream stream;
    stream.begin(row_of(warp, gate.weights), n_in);
    Input* input = reinterpret_cast<Input*>(room);
    make_input(source_of(x, n_in, kind, norm, eps, shared), input);
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < WARP; i += warps) {
        float a[1] = {}, b[1] = {};
        if (blockIdx.x * WARP + i < rows0) {
            stream.multiply(input, 1, n_in, [&] { return row_of(i, up.weights); }, a);
            stream.multiply(input, 1, n_in, [&] { return row_of(i + warps, gate.weights); }, b);
        }
        if (lane_id() == 0) made[i] = a[0] / (1.0f + expf(-a[0])) * b[0];
    }
    __syncthreads();
    const int own = blockIdx.x * WARP + lane_id();
    if (warp > 0) return;
    if (rounded) round_group(four_of(made + 4 * (lane_id() % 8)), lane_id() < 8 ? rounded + blockIdx.x : nullptr);
    if (floats && own < rows0) floats[own] = made[lane_id()];
}
#endif
