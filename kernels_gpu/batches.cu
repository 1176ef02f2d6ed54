// Products of weights with up to SEQUENCES rows of activations: a decode step of many sequences. Each weight is read and
// decoded once: by the lane that multiplies it, as halves (halves.cuh), on tensor cores. Activations pass through shared
// memory.
//
// A block takes TILE rows of weights and a part of their columns, so that there are blocks for the whole card; the last
// of a tile to be done adds up the parts, in their order. BLOCKS of them run on a multiprocessor at a time.
#include "halves.cuh"
#include "instructions.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP, TILE = WARPS * 32;
constexpr int SETS = SEQUENCES / 8;  // of 8 sequences, which a product of tiles takes
// Of a row of weights a lane takes CHUNKS times 8 columns at a step, so that it has whole groups, and each of its loads
// 16 bytes. Of a product of tiles it has columns t, t + 4 ...: which these are does not matter, as long as both sides
// agree.
#ifdef LOW_BITS
constexpr int CHUNKS = 4;
struct Piece {
    Group group;
};

DEVICE int chunk_of(int c, int t) { return CHUNKS * t + c; }

DEVICE Piece load_piece(const Weights& w, int row, int n_in, int column, int t) {
    const int groups = n_in / GROUP, group = column / GROUP + t;
    return group < groups ? Piece{load_group(w, row * groups + group)} : Piece{};
}

// A piece as halves, once its steps are known. A scale that is a half stays one, whichever power of two is taken out of
// it, so that codes, which halves hold, are multiplied as halves: what comes is rounded as if it were made of floats.
struct Decoder {
    static constexpr bool AS_HALVES = SCALES == HALF;
    static constexpr float MOST = 65504.0f;  // that a half holds
    static constexpr int SIGN = LOW_BITS == 8 || LOOKED_UP ? 128 : 0;  // of codes that may be below 0
    Steps steps;
    u32 scales;

    DEVICE Decoder(const Piece& piece, float factor) : steps(steps_of(piece.group)) {
#pragma unroll
        for (int i = 0; i < 2; i++) steps.scale[i] *= factor, steps.minimum[i] *= factor;
        // Too large for a half is only what multiplies zeros.
        const float scale = fabsf(steps.scale[0]) < INFINITE ? fminf(fmaxf(steps.scale[0], -MOST), MOST) : steps.scale[0];
        scales = two_halves(scale, scale);
    }

    DEVICE void decode(const Piece& piece, int c, u32 (&pairs)[4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if constexpr (AS_HALVES) {
                const u32 codes = codes_of(piece.group, 2 * c + i) ^ SIGN * 0x01010101u;
                constexpr u32 ZERO = (0x6400 + SIGN + OFFSET) * 0x10001u;  // 0x6400 + i is 1024 + i
                pairs[2 * i] = times(minus(__byte_perm(codes, 0x64646464, 0x4140), ZERO), scales);
                pairs[2 * i + 1] = times(minus(__byte_perm(codes, 0x64646464, 0x4342), ZERO), scales);
            } else {
                float w[4];
                weights_of(piece.group, steps, 2 * c + i, w);
                pairs[2 * i] = two_halves(w[0], w[1]), pairs[2 * i + 1] = two_halves(w[2], w[3]);
            }
        }
    }
};
#else
constexpr int CHUNKS = NUMBER == KIND_F32 ? 1 : 2, LOADS = 8 / WIDE;
struct Piece {
    uint4 words[CHUNKS][LOADS];
};

DEVICE int chunk_of(int c, int t) { return 4 * c + t; }

DEVICE Piece load_piece(const Number* w, int row, int n_in, int column, int t) {
    const uint4* from = reinterpret_cast<const uint4*>(w);
    Piece piece = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int chunk = column / 8 + chunk_of(c, t);
        if (8 * chunk >= n_in) continue;
#pragma unroll
        for (int i = 0; i < LOADS; i++) piece.words[c][i] = from[(row * (n_in / 8) + chunk) * LOADS + i];
    }
    return piece;
}

struct Decoder {
    float factor;

    DEVICE Decoder(const Piece&, float factor) : factor(factor) {}

    DEVICE void decode(const Piece& piece, int c, u32 (&pairs)[4]) const {
        if constexpr (NUMBER == KIND_F16) {
            const uint4 words = piece.words[c][0];
            pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
        } else {
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                float w[WIDE];
                unpack(piece.words[c][i], w);
#pragma unroll
                for (int j = 0; j < WIDE; j += 2) {
                    pairs[(WIDE * i + j) / 2] = two_halves(w[j] * factor, w[j + 1] * factor);
                }
            }
        }
    }
};
#endif
constexpr int STEP = 4 * CHUNKS * 8;  // columns

// Up to three matrices that share their activations, as in products.cu.
struct Matrix {
    Given weights;
    const u32* largest;
    int rows;
    float* out;
};
#ifdef LOW_BITS
#define MATRIX(i)                                                                                        \
    const u8 *low##i, const u8 *high##i, const u8 *scales##i, const u32 *supers##i, const u32 *largest##i, \
        int rows##i, float *out##i
#define GIVEN(i) {{low##i, high##i, scales##i, supers##i}, largest##i, rows##i, out##i}
#else
#define MATRIX(i) const Number *numbers##i, const u32 *largest##i, int rows##i, float *out##i
#define GIVEN(i) {numbers##i, largest##i, rows##i, out##i}
#endif

// Where the activations of a lane's chunk are: eight lanes, of two sequences, meet no bank twice.
DEVICE int place(int sequence, int c, int t) {
    return sequence * 4 * CHUNKS + ((4 * c + t) ^ (CHUNKS > 1 ? sequence % 2 * 4 : 0));
}

// Asks for activations of the columns of a step; what is beyond them is 0.
DEVICE void ask(const u16* x, int n, int n_in, int column, uint4* to) {
    constexpr int AT_ONCE = THREADS / (4 * CHUNKS);
    const int t = threadIdx.x % 4, c = threadIdx.x / 4 % CHUNKS, first = column + 8 * chunk_of(c, t);
#pragma unroll
    for (int i = 0; i < SEQUENCES; i += AT_ONCE) {
        const int sequence = i + threadIdx.x / (4 * CHUNKS);
        if (SEQUENCES < AT_ONCE && sequence >= SEQUENCES) break;
        const bool is = sequence < n && first < n_in;
        const u16* from = x + (is ? i64(sequence) * n_in + first : 0);
        copy_ahead(to + place(sequence, c, t), reinterpret_cast<const uint4*>(from), is);
    }
    end_copies();
}

// Waits, with all threads of the block, for what was asked for.
DEVICE void arrived() {
    await_copies<0>();
    __syncthreads();
}

// out[sequence, row] = or += products of x, halves [n, n_in] with factors [n], and weights. Grid (tiles of all matrices,
// parts); parts [tiles, parts, 2 SETS, THREADS, 4] and done [tiles], zeros, are needed only where there are several.
KERNEL __launch_bounds__(THREADS, BLOCKS) batch_products(
    const u16* x, const float* factors, int n, int n_in, int add, i64 stride, float4* parts, int* done,
    MATRIX(0), MATRIX(1), MATRIX(2)
) {
    __shared__ uint4 stages[2][SEQUENCES * 4 * CHUNKS];
    const Matrix first GIVEN(0), second GIVEN(1), third GIVEN(2);
    Matrix m = first;  // copied, because parameters have no address
    int tile = blockIdx.x;
    const int tiles0 = (rows0 + TILE - 1) / TILE, tiles1 = (rows1 + TILE - 1) / TILE;
    if (tile >= tiles0 + tiles1) m = third, tile -= tiles0 + tiles1;
    else if (tile >= tiles0) m = second, tile -= tiles0;
    const int g = lane_id() / 4, t = lane_id() % 4, own = tile * TILE + threadIdx.x / WARP * 32;
    const int steps = (n_in + STEP - 1) / STEP;
    const int begin = int(i64(steps) * blockIdx.y / gridDim.y), end = int(i64(steps) * (blockIdx.y + 1) / gridDim.y);

    // Row r of a lane is row 8 r + g of its warp.
    float powers[4];
    Piece ahead[4];
    const auto load = [&](int step) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = own + 8 * r + g;
            ahead[r] = row < m.rows ? load_piece(m.weights, row, n_in, step * STEP, t) : Piece{};
        }
    };
    ask(x, n, n_in, begin * STEP, stages[begin % 2]);
    load(begin);
#pragma unroll
    for (int r = 0; r < 4; r++) powers[r] = power_of(own + 8 * r + g < m.rows ? m.largest[own + 8 * r + g] : 0);

    float sums[2][SETS][4] = {};
#pragma unroll 1
    for (int step = begin; step < end; step++) {
        arrived();
        Piece pieces[4];
#pragma unroll
        for (int r = 0; r < 4; r++) pieces[r] = ahead[r];
        if (step + 1 < end) {
            ask(x, n, n_in, (step + 1) * STEP, stages[(step + 1) % 2]);
            load(step + 1);
        }
        if (own >= m.rows) continue;
        const uint4* stage = stages[step % 2];
        const Decoder decoders[4] = {
            {pieces[0], 1.0f / powers[0]}, {pieces[1], 1.0f / powers[1]}, {pieces[2], 1.0f / powers[2]},
            {pieces[3], 1.0f / powers[3]}};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            u32 w[4][4];
#pragma unroll
            for (int r = 0; r < 4; r++) decoders[r].decode(pieces[r], c, w[r]);
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                const uint4 b = stage[place(8 * set + g, c, t)];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u32(&low)[4] = w[2 * i], (&high)[4] = w[2 * i + 1];
                    multiply_tiles(sums[i][set], {low[0], high[0], low[1], high[1]}, {b.x, b.y});
                    multiply_tiles(sums[i][set], {low[2], high[2], low[3], high[3]}, {b.z, b.w});
                }
            }
        }
    }

    if (gridDim.y > 1) {
        float4* mine = parts + i64(blockIdx.x) * gridDim.y * (2 * SETS * THREADS) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < 2 * SETS; i++) {
            const float(&sum)[4] = sums[i / SETS][i % SETS];
            mine[(blockIdx.y * 2 * SETS + i) * THREADS] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
        if (!is_last(done + blockIdx.x, gridDim.y)) return;
#pragma unroll
        for (int i = 0; i < 8 * SETS; i++) sums[i / 4 / SETS][i / 4 % SETS][i % 4] = 0.0f;
#pragma unroll 1
        for (int part = 0; part < int(gridDim.y); part++) {
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) {
                const float4 a = mine[(part * 2 * SETS + i) * THREADS];
                float(&sum)[4] = sums[i / SETS][i % SETS];
                sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8 * SETS; i++) {
        const int r = i / SETS / 4 * 2 + i % 4 / 2, set = i / 4 % SETS;
        const int row = own + 8 * r + g, sequence = 8 * set + 2 * t + i % 2;
        if (row >= m.rows || sequence >= n) continue;
        float* to = m.out + sequence * stride + row;
        const float sum = sums[r / 2][set][i % 4] * factors[sequence] * powers[r];
        *to = add ? *to + sum : sum;
    }
}
