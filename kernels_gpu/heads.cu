// Heads one by one: turned by their positions, rotated as a store has them, attention to two sets of slots joined.
#include "rows.cuh"

// out [N, H, d] = x, of which the first 2 pairs numbers of each head are turned by cos and sin [N, pairs]. Grid (N, H).
KERNEL turn(const float* x, int d, const float* cos, const float* sin, int pairs, int interleaved, float* out) {
    const i64 row = (i64(blockIdx.x) * gridDim.y + blockIdx.y) * d;
    for (int j = threadIdx.x; j < d; j += blockDim.x) {
        if (j >= 2 * pairs) {
            out[row + j] = x[row + j];
        } else if (j < pairs) {
            const int first = interleaved ? 2 * j : j, second = interleaved ? first + 1 : j + pairs;
            const float a = x[row + first], b = x[row + second];
            const float c = cos[i64(blockIdx.x) * pairs + j], s = sin[i64(blockIdx.x) * pairs + j];
            out[row + first] = a * c - b * s;
            out[row + second] = a * s + b * c;
        }
    }
}

#ifdef HEAD_DIM
// out [N, d] = x, each row rotated as stores rotate; out may be x. Grid N.
KERNEL rotate_heads(const float* x, float* out) {
    __shared__ float head[HEAD_DIM];
    const i64 row = i64(blockIdx.x) * HEAD_DIM;
    for (int j = threadIdx.x; j < HEAD_DIM; j += blockDim.x) head[j] = x[row + j];
    rotate<HEAD_DIM>(head);  // begins with what the same thread has written
    for (int j = threadIdx.x; j < HEAD_DIM; j += blockDim.x) out[row + j] = head[j];
}
#endif

// out [T, H, d], attention to some slots, and other, to others, by the logarithms of their denominators [T, H]. Grid
// (T, H).
KERNEL join_attention(float* out, const float* lse, const float* other, const float* other_lse, int d) {
    const i64 row = i64(blockIdx.x) * gridDim.y + blockIdx.y;
    const float high = fmaxf(lse[row], other_lse[row]);
    const float first = expf(lse[row] - high), second = expf(other_lse[row] - high);
    const float ratio = second / (first + second), share = ratio == ratio ? ratio : 0.0f;  // of nothing and nothing, 0
    for (int j = threadIdx.x; j < d; j += blockDim.x) {
        out[row * d + j] = out[row * d + j] * (1.0f - share) + other[row * d + j] * share;
    }
}
