// Rows of activations before and after products: norms, rounding, heads, rotary embedding.
#include "activations.cuh"

enum Input { PLAIN, NORMED, GATED };

// x [N, n_in] -> what products read of it: rounded codes [N, n_in / 32] and their sums, floats [N, n_in], or halves
// [N, n_in] with a factor [N] that was taken out; those that are null are not made. A block for each row.
//   NORMED  RMSNorm of x with these weights (arXiv 1910.07467)
//   GATED   silu(x) times up, which follow each other in a row [N, 2 n_in] (arXiv 2002.05202)
KERNEL prepare(
    const float* x, i64 stride, int n_in, int input, const float* norm, float eps, Codes* codes, Sums* sums,
    float* floats, u16* halves, float* factors
) {
    __shared__ float shared[WARP];
    const float* row = x + blockIdx.x * stride;
    const i64 first = i64(blockIdx.x) * n_in;
    float factor = 1.0f;
    if (input == NORMED) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < n_in; i += blockDim.x) squares += row[i] * row[i];
        factor = 1.0f / sqrtf(block_sum(squares, shared) / float(n_in) + eps);
    }
    const auto value = [&](int i) {
        if (input == NORMED) return row[i] * factor * norm[i];
        if (input == GATED) return row[i] / (1.0f + expf(-row[i])) * row[n_in + i];
        return row[i];
    };
    float most = 0.0f;
    if (halves) {
        for (int i = threadIdx.x; i < n_in; i += blockDim.x) most = fmaxf(most, fabsf(value(i)));
        most = block_max(most, shared);
        // A power of two: nothing is rounded but by the half's own bits. What is not finite stays so.
        most = most > 0.0f && most < INFINITE ? exp2f(floorf(log2f(most)) - 7.0f) : 1.0f;
        if (threadIdx.x == 0) factors[blockIdx.x] = most;
    }
    const int lane = lane_id();
    for (int group = threadIdx.x / WARP; group * WARP < n_in; group += blockDim.x / WARP) {
        const int i = group * WARP + lane;
        const float v = i < n_in ? value(i) : 0.0f;
        if (i < n_in && floats) floats[first + i] = v;
        if (i < n_in && halves) halves[first + i] = to_half(v / most);
        if (!codes) continue;
        // max_over leaves NaN out; a scale that is NaN tells of it.
        const float scale = __any_sync(ALL, v != v) ? NOT_A_NUMBER : max_over(fabsf(v)) / float(LARGEST);
        const float rounded = rintf(v * (scale == 0.0f ? 0.0f : 1.0f / scale));
        const int q = fabsf(rounded) <= float(LARGEST) ? int(rounded) : 0, high = (q + 64) >> 7;
        const int sum = sum_over<16>(q), other = __shfl_xor_sync(ALL, sum, 16);
        Codes& to = codes[first / WARP + group];
        reinterpret_cast<i8*>(to.high)[lane] = i8(high);
        reinterpret_cast<i8*>(to.low)[lane] = i8(q - 128 * high);
        if (lane == 0) sums[first / WARP + group] = Sums{scale, sum, other, 0};
    }
}

// Heads of products [N, stride] -> q [N, H_q, d], k and v [N, H_kv, d]: biases, norms of heads (qwen3), rotation of
// queries and keys by cos and sin [N, pairs] (arXiv 2104.09864). Grid (N, H_q + 2 H_kv); null is absent. A pair is
// components (2 i, 2 i + 1) if interleaved, else (i, i + pairs).
KERNEL finish_qkv(
    const float* products, i64 stride, int n_head, int n_head_kv, int d, const float* q_bias, const float* k_bias,
    const float* v_bias, const float* q_norm, const float* k_norm, float eps, const float* cosines, const float* sines,
    int pairs, int interleaved, float* q, float* k, float* v
) {
    extern __shared__ float x[];  // [d + 32]
    const int n = blockIdx.x, of_q = int(blockIdx.y) < n_head, of_k = !of_q && int(blockIdx.y) < n_head + n_head_kv;
    const int h = of_q ? blockIdx.y : (blockIdx.y - n_head) % n_head_kv, heads = of_q ? n_head : n_head_kv;
    const float* bias = of_q ? q_bias : of_k ? k_bias : v_bias;
    const float* norm = of_q ? q_norm : of_k ? k_norm : nullptr;
    const float* from = products + n * stride + i64(blockIdx.y) * d;
    float* to = (of_q ? q : of_k ? k : v) + (i64(n) * heads + h) * d;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        x[i] = from[i] + (bias ? bias[h * d + i] : 0.0f);
        squares += x[i] * x[i];
    }
    if (norm) {
        const float factor = 1.0f / sqrtf(block_sum(squares, x + d) / float(d) + eps);
        for (int i = threadIdx.x; i < d; i += blockDim.x) x[i] *= factor * norm[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        const int pair = interleaved ? i / 2 : i % pairs, second = interleaved ? i % 2 : i / pairs;
        float value = x[i];
        if ((of_q || of_k) && i < 2 * pairs) {
            const float c = cosines[i64(n) * pairs + pair], s = sines[i64(n) * pairs + pair];
            const int partner = interleaved ? i ^ 1 : second ? i - pairs : i + pairs;
            value = second ? x[partner] * s + value * c : value * c - x[partner] * s;
        }
        to[i] = value;
    }
}
