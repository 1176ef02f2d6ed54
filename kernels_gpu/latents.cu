// Writing rows of latents: a block of threads for each token and group of KV heads, keys and values alike.
#include "latents.cuh"

// Row i of k [N, G, r + 1], with positions, and v [N, G, r] goes to slot[i] of sequence seq[i]. Grid (N, G, 2).
KERNEL append(LATENTS(k), LATENTS(v), const int* seq, const int* slot, const float* keys, const float* values) {
    __shared__ float shared[WARP];
    const int i = blockIdx.x, g = blockIdx.y;
    const i64 from = i64(i) * gridDim.y + g;
    const Latents k = GIVEN_LATENTS(k), v = GIVEN_LATENTS(v);
    if (blockIdx.z == 0)
        write_latent<K_BITS, true>(k, k.row(seq[i], g, slot[i]), keys + from * (k.rank + 1), shared);
    else write_latent<V_BITS, false>(v, v.row(seq[i], g, slot[i]), values + from * v.rank, shared);
}

// Row b of k [B, G, r + 1] and v [B, G, r] goes to slot[b, g] of sequence b, whose position becomes pos[b]; see
// Ops.overwrite. One slot of a sequence serves all groups if `heads` is 1. A slot outside the n_slot that there are is
// left out. Grid (G, B, 2).
KERNEL overwrite(
    LATENTS(k), LATENTS(v), const int* slot, int heads, int n_slot, const float* keys, const float* values,
    int* positions, i64 positions_sequence, i64 positions_head, const int* pos
) {
    __shared__ float shared[WARP];
    const int g = blockIdx.x, b = blockIdx.y, decides = min(g, heads - 1), s = slot[b * heads + decides];
    const i64 from = i64(b) * gridDim.x + g;
    const Latents k = GIVEN_LATENTS(k), v = GIVEN_LATENTS(v);
    if (s < 0 || s >= n_slot) return;
    if (blockIdx.z == 0) {
        write_latent<K_BITS, true>(k, k.row(b, g, s), keys + from * (k.rank + 1), shared);
        if (threadIdx.x == 0 && g == decides) positions[b * positions_sequence + g * positions_head + s] = pos[b];
    } else {
        write_latent<V_BITS, false>(v, v.row(b, g, s), values + from * v.rank, shared);
    }
}
