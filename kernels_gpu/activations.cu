// Rows of activations before and after products: norms, rounding, heads, rotary embedding.
#include "activations.cuh"

// x [N, n_in] -> what products read of it: rounded [N, n_in / 32], floats [N, n_in], or halves [N, n_in] with a factor
// [N] that was taken out; those that are null are not made. A block for each row.
KERNEL __launch_bounds__(1024) prepare(
    const float* x, i64 stride, int n_in, int kind, const float* norm, float eps, Rounded* rounded, float* floats,
    u16* halves, float* factors
) {
    __shared__ float shared[WARP];
    const i64 first = i64(blockIdx.x) * n_in;
    const Source value = source_of(x + blockIdx.x * stride, n_in, kind, norm, eps, shared);
    if (rounded) round_row(value, rounded + first / WARP);
    if (floats) {
        for (int i = threadIdx.x; i < n_in; i += blockDim.x) floats[first + i] = value(i);
    }
    if (!halves) return;
    float most = 0.0f;
    for (int i = threadIdx.x; i < n_in; i += blockDim.x) most = fmaxf(most, fabsf(value(i)));
    most = block_max(most, shared);
    // A power of two: nothing is rounded but by the half's own bits. What is not finite stays so.
    most = most > 0.0f && most < INFINITE ? exp2f(floorf(log2f(most)) - 7.0f) : 1.0f;
    if (threadIdx.x == 0) factors[blockIdx.x] = most;
    for (int i = threadIdx.x; i < n_in; i += blockDim.x) halves[first + i] = to_half(value(i) / most);
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
