// Causal attention of a prompt's chunk in floats: exact for stores of floats, and for cards without tensor cores.
//
// A block has 32 rows and passes a few keys at a time, then their values, through shared memory. A thread has two rows:
// their scores of every 8th key, and of their sums four numbers in 32.
#include "chunk.cuh"

constexpr int WIDTH = (D + 7) / 8 * 8, PITCH = WIDTH + 4;  // floats; no two threads of a load meet in a bank
constexpr int LANES = 8, ROWS = 32, THREADS = ROWS / 2 * LANES;
constexpr int KEYS = D <= 128 ? 32 : 8;
constexpr int QUADS = (WIDTH + 4 * LANES - 1) / (4 * LANES);  // that a thread adds up in each of its rows

template <int STORE>
DEVICE void load_rows(const Rows& rows, i64 first, int begin, int end, float* to) {
    for (int i = threadIdx.x; i < KEYS * (WIDTH / 8); i += THREADS) {
        const int row = i / (WIDTH / 8), chunk = i % (WIDTH / 8);
        float x[8] = {};
        if (begin + row < end) load8<STORE, D>(rows, first + begin + row, chunk, x);
        float4* at = reinterpret_cast<float4*>(to + row * PITCH + 8 * chunk);
        at[0] = make_float4(x[0], x[1], x[2], x[3]), at[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
}

DEVICE float4 four(const float* at) { return *reinterpret_cast<const float4*>(at); }

// Grid (rows / ROWS rounded up, H_kv).
KERNEL __launch_bounds__(THREADS) attend_chunk(
    const float* q, u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence,
    i64 v_head, int seq, int n, int start, int window, int stop, float* out, float* lse
) {
    __shared__ __align__(16) float queries[ROWS * PITCH];
    __shared__ __align__(16) float cached[KEYS * PITCH];
    __shared__ float weights[ROWS][KEYS + 1];
    const Rows k{k_codes, k_scales, k_sequence, k_head}, v{v_codes, v_scales, v_sequence, v_head};
    const Chunk chunk{n, start, window, stop};
    const int block = gridDim.x - 1 - blockIdx.x;  // those that see most come first
    const int low = block * ROWS, high_row = min(low + ROWS, n * GROUP) - 1;
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES * 2;
    for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
        const int row = i / WIDTH, j = i % WIDTH;
        const bool is = low + row <= high_row && j < D;
        queries[row * PITCH + j] = is ? q[chunk.query(low + row) * D + j] * (rsqrtf(float(D)) * LOG2_E) : 0.0f;
    }
    float high[2] = {LOWEST, LOWEST}, total[2] = {}, sum[2][QUADS][4] = {};
    const int end = chunk.end(high_row);
    for (int at = chunk.begin(low); at < end; at += KEYS) {
        __syncthreads();
        load_rows<K_STORE>(k, k.row(seq, blockIdx.y, 0), at, end, cached);
        __syncthreads();
        float score[2][KEYS / LANES] = {};
#pragma unroll 4
        for (int j = 0; j < WIDTH; j += 4) {
            const float4 a = four(queries + own * PITCH + j), b = four(queries + (own + 1) * PITCH + j);
#pragma unroll
            for (int i = 0; i < KEYS / LANES; i++) {
                const float4 x = four(cached + (LANES * i + lane) * PITCH + j);
                score[0][i] += a.x * x.x + a.y * x.y + a.z * x.z + a.w * x.w;
                score[1][i] += b.x * x.x + b.y * x.y + b.z * x.z + b.w * x.w;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float highest = high[r];
#pragma unroll
            for (int i = 0; i < KEYS / LANES; i++) {
                if (!chunk.sees(low + own + r, at + LANES * i + lane)) score[r][i] = -INFINITE;
                highest = fmaxf(highest, score[r][i]);
            }
            highest = max_over<LANES>(highest);
            const float less = power_of_2(high[r] - highest);
            high[r] = highest, total[r] *= less;
#pragma unroll
            for (int i = 0; i < KEYS / LANES; i++) {
                const float weight = power_of_2(score[r][i] - highest);
                total[r] += weight;
                weights[own + r][LANES * i + lane] = weight;
            }
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[r][i][j] *= less;
            }
        }
        __syncthreads();
        load_rows<V_STORE>(v, v.row(seq, blockIdx.y, 0), at, end, cached);
        __syncthreads();
#pragma unroll 2
        for (int key = 0; key < KEYS; key++) {
            const float a = weights[own][key], b = weights[own + 1][key];
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                if (4 * (LANES * i + lane) >= WIDTH) continue;
                const float4 x = four(cached + key * PITCH + 4 * (LANES * i + lane));
                sum[0][i][0] += a * x.x, sum[0][i][1] += a * x.y, sum[0][i][2] += a * x.z, sum[0][i][3] += a * x.w;
                sum[1][i][0] += b * x.x, sum[1][i][1] += b * x.y, sum[1][i][2] += b * x.z, sum[1][i][3] += b * x.w;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = low + own + r;
        total[r] = sum_over<LANES>(total[r]);
        if (row > high_row) continue;
        const i64 query = chunk.query(row);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = 4 * (LANES * i + lane) + j;
                if (column < D) out[query * D + column] = total[r] == 0.0f ? 0.0f : sum[r][i][j] / total[r];
            }
        }
        if (lse && lane == 0) lse[query] = logarithm(high[r], total[r]);
    }
}
