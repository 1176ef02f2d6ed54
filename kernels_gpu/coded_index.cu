// SparQ's copy of the keys in 4 bits: see CodedIndex in minirt.ops; codes are those of the reference, bit for bit.
// Macros: HEAD_DIM, K_STORE, K_ROTATED.
#include "means.cuh"
#include "rows.cuh"

constexpr int D = HEAD_DIM, THREADS = 256;
constexpr int UNIT = 256;               // tokens that share a scale
constexpr int WORDS = 16, PARTS = 8;    // words of a run, and codes of a word: token 16 p + w is code p of word w
constexpr int RUNS = UNIT / (WORDS * PARTS);
constexpr int OWN = (D + THREADS / WORDS - 1) / (THREADS / WORDS);  // components of which a thread makes words

struct Coder {
    float rows[WORDS][D], least[D], inverse[D];
};

// Rows first ... first + WORDS - 1 as they were given. All threads of a block call; begins and ends with a barrier.
DEVICE void load_rows(const Rows& k, i64 first, Coder& c) {
    constexpr int CHUNKS = (D + 7) / 8;
    __syncthreads();
    for (int i = threadIdx.x; i < WORDS * CHUNKS; i += THREADS) {
        float x[8];
        load8<K_STORE, D>(k, first + i / CHUNKS, i % CHUNKS, x);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i % CHUNKS * 8 + j < D) c.rows[i / CHUNKS][i % CHUNKS * 8 + j] = x[j];
    }
    __syncthreads();
    if constexpr (K_ROTATED) rotate<D>(&c.rows[0][0], WORDS);
}

// The scale and the least number of each component of a unit, to scales [D, units of a block, 2] and, for all after the
// next barrier, to the coder.
DEVICE void find_scales(const Rows& k, i64 first, u16* scales, int span, Coder& c) {
    for (int begin = 0; begin < D; begin += THREADS) {
        const int j = begin + threadIdx.x;
        float low = INFINITE, high = -INFINITE;
        bool finite = true;  // fminf leaves NaN out
        for (int row = 0; row < UNIT; row += WORDS) {
            load_rows(k, first + row, c);
            for (int w = 0; w < WORDS && j < D; w++) {
                const float x = c.rows[w][j];
                low = fminf(low, x), high = fmaxf(high, x), finite = finite && x == x;
            }
        }
        if (j >= D) continue;
        const u16 least = to_half(finite ? low : NOT_A_NUMBER);
        const u16 scale = to_half(__fdiv_rn(__fsub_rn(high, to_float(least)), 15.0f));
        c.least[j] = to_float(least);
        c.inverse[j] = to_float(scale) == 0.0f ? 0.0f : __fdiv_rn(1.0f, to_float(scale));
        scales[2 * i64(j) * span] = scale, scales[2 * i64(j) * span + 1] = least;
    }
}

DEVICE u32 code_of(float x, float least, float inverse) {
    const float c = __fadd_rn(__fmul_rn(__fsub_rn(x, least), inverse), 0.5f);
    return c > 0.0f ? u32(fminf(c, 15.0f)) : 0;
}

// Rows of k are in the cache already: the unit that ends with slot[i] of sequence seq[i] is written; row i of v goes into
// the mean, if there is one. codes [B, H_kv, blocks, d, tokens / 8], scales [B, H_kv, blocks, d, tokens / UNIT, 2]. Grid
// (N, H_kv).
KERNEL __launch_bounds__(THREADS, 2) append_codes(
    u32* codes, u16* scales, int blocks, int tokens, u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, float* mean,
    const int* seq, const int* slot, const float* v
) {
    __shared__ Coder c;
    const int s = slot[blockIdx.x], b = seq[blockIdx.x], h = blockIdx.y, unit = s / UNIT;
    if (s % UNIT == UNIT - 1 && blocks > 0) {
        const Rows k{k_codes, k_scales, k_sequence, k_head};
        const i64 first = k.row(b, h, unit * UNIT);
        const int span = tokens / UNIT;
        const i64 block = ((i64(b) * gridDim.y + h) * blocks + unit / span) * D * span + unit % span;
        find_scales(k, first, scales + 2 * block, span, c);
        const int w = threadIdx.x % WORDS;
        for (int run = 0; run < RUNS; run++) {
            u32 word[OWN] = {};
            for (int p = 0; p < PARTS; p++) {
                load_rows(k, first + (run * PARTS + p) * WORDS, c);
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    const int j = threadIdx.x / WORDS + i * (THREADS / WORDS);
                    if (j < D) word[i] |= code_of(c.rows[w][j], c.least[j], c.inverse[j]) << 4 * p;
                }
            }
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int j = threadIdx.x / WORDS + i * (THREADS / WORDS);
                if (j < D) codes[(block + i64(j) * span) * (UNIT / PARTS) + run * WORDS + w] = word[i];
            }
        }
    }
    if (mean) take_up(mean, seq, slot, v);
}
