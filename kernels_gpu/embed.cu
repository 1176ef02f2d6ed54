// Rows of a table of weights.
#ifdef LOW_BITS
#include "formats.cuh"

// out [N, n_in] = rows tokens [N]; a thread for each group of 32. Grid (N, groups / threads).
KERNEL embed(
    const u8* low, const u8* high, const u8* scales, const u32* supers, int groups, const int* tokens, float* out
) {
    const int group = blockIdx.y * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const Group g = load_group({low, high, scales, supers}, i64(tokens[blockIdx.x]) * groups + group);
    const Steps steps = steps_of(g);
    float* to = out + (i64(blockIdx.x) * groups + group) * GROUP;
#pragma unroll
    for (int i = 0; i < GROUP / 4; i++) {
        float w[4];
        weights_of(g, steps, i, w);
        for (int j = 0; j < 4; j++) to[4 * i + j] = w[j];
    }
}
#else
#include "numbers.cuh"

KERNEL embed(const Number* rows, int n_in, const int* tokens, float* out) {
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i < n_in) out[i64(blockIdx.x) * n_in + i] = number(rows[i64(tokens[blockIdx.x]) * n_in + i]);
}
#endif
