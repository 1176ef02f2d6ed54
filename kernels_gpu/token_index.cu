// SparQ's copy of the keys that has their components apart.
// Macros: HEAD_DIM, STORE (F32 or F16).
#include "means.cuh"
#include "rows.cuh"

// Row i of k [N, H_kv, d] goes to slot[i] of sequence seq[i] of index [B, H_kv, blocks, d, tokens], and that of v into the
// mean, if there is one. Grid (N, H_kv).
KERNEL append_index(
    u8* index, int blocks, int tokens, float* mean, const int* seq, const int* slot, const float* k, const float* v
) {
    const int i = blockIdx.x, s = slot[i];
    const i64 block = (i64(seq[i]) * gridDim.y + blockIdx.y) * blocks + s / tokens;
    for (int j = threadIdx.x; j < HEAD_DIM; j += blockDim.x) {
        const i64 at = (block * HEAD_DIM + j) * tokens + s % tokens;
        const float x = k[(i64(i) * gridDim.y + blockIdx.y) * HEAD_DIM + j];
        if constexpr (STORE == F32) reinterpret_cast<float*>(index)[at] = x;
        else reinterpret_cast<u16*>(index)[at] = to_half(x);
    }
    if (mean) take_up(mean, seq, slot, v);
}
