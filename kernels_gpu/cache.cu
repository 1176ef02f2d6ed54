// Writing rows of a cache: a block of threads for each token and KV head.
#include "rows.cuh"

// Writes the head at x [d] as a row; `shared` [d] is scratch. All threads of a block of whole warps call.
template <int STORE, bool ROTATED>
DEVICE void write_head(const Rows& rows, i64 row, const float* x, float* shared) {
    for (int j = threadIdx.x; j < HEAD_DIM; j += blockDim.x) shared[j] = x[j];
    __syncthreads();
    if constexpr (ROTATED) rotate<HEAD_DIM>(shared);
    store_row<STORE, HEAD_DIM>(rows, row, shared);
}

// Row i of x [N, H_kv, d] goes to slot[i] of sequence seq[i], keys and values alike. Grid (N, H_kv, 2).
KERNEL append(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head,
    const int* seq, const int* slot, const float* k, const float* v
) {
    __shared__ float x[HEAD_DIM];
    const int i = blockIdx.x, h = blockIdx.y;
    const i64 from = (i64(i) * gridDim.y + h) * HEAD_DIM;
    if (blockIdx.z == 0) {
        const Rows rows{k_codes, k_scales, k_sequence, k_head};
        write_head<K_STORE, K_ROTATED>(rows, rows.row(seq[i], h, slot[i]), k + from, x);
    } else {
        const Rows rows{v_codes, v_scales, v_sequence, v_head};
        write_head<V_STORE, V_ROTATED>(rows, rows.row(seq[i], h, slot[i]), v + from, x);
    }
}

// Row b of x [B, H_kv, d] goes to slot[b, h] of sequence b, whose position becomes pos[b]; see Ops.overwrite. One slot
// of a sequence serves all heads if heads = 1. A slot outside the n_slot that there are is left out. Grid (H_kv, B, 2).
KERNEL overwrite(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head,
    const int* slot, int heads, int n_slot, const float* k, const float* v, int* positions, i64 positions_sequence,
    i64 positions_head, const int* pos
) {
    __shared__ float x[HEAD_DIM];
    const int h = blockIdx.x, b = blockIdx.y, decides = min(h, heads - 1);
    const int s = slot[b * heads + decides];
    const i64 from = (i64(b) * gridDim.x + h) * HEAD_DIM;
    if (s < 0 || s >= n_slot) return;
    if (blockIdx.z == 0) {
        const Rows rows{k_codes, k_scales, k_sequence, k_head};
        write_head<K_STORE, K_ROTATED>(rows, rows.row(b, h, s), k + from, x);
        if (threadIdx.x == 0 && h == decides) positions[b * positions_sequence + h * positions_head + s] = pos[b];
    } else {
        const Rows rows{v_codes, v_scales, v_sequence, v_head};
        write_head<V_STORE, V_ROTATED>(rows, rows.row(b, h, s), v + from, x);
    }
}
