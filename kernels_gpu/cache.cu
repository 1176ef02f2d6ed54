// Writing rows of a cache: a block of threads for each token and KV head.
#include "rows.cuh"

// Row i of x [N, H_kv, d] goes to slot[i] of sequence seq[i], keys and values alike. Grid (N, H_kv, 2).
KERNEL append(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head,
    const int* seq, const int* slot, const float* k, const float* v
) {
    __shared__ float x[HEAD_DIM];
    const int i = blockIdx.x, h = blockIdx.y;
    const float* from = (blockIdx.z ? v : k) + (i64(i) * gridDim.y + h) * HEAD_DIM;
    for (int j = threadIdx.x; j < HEAD_DIM; j += blockDim.x) x[j] = from[j];
    __syncthreads();
    if (blockIdx.z == 0) {
        const Rows rows{k_codes, k_scales, k_sequence, k_head};
        if constexpr (K_ROTATED) rotate<HEAD_DIM>(x);
        store_row<K_STORE, HEAD_DIM>(rows, rows.row(seq[i], h, slot[i]), x);
    } else {
        const Rows rows{v_codes, v_scales, v_sequence, v_head};
        if constexpr (V_ROTATED) rotate<HEAD_DIM>(x);
        store_row<V_STORE, HEAD_DIM>(rows, rows.row(seq[i], h, slot[i]), x);
    }
}
