// FlexGen's scores (arXiv 2303.06865): whole keys are read.
// Macros: HEAD_DIM, GROUP, K_STORE, K_ROTATED.
#define INTERLEAVED 0
#include "row_scores.cuh"

// q [B, H_q, d]; of sequence b the first stop[b] rows of k.
KERNEL __launch_bounds__(THREADS, GROUP > 2 ? 2 : 5 - GROUP) exact_top_k(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, const float* q, const int* stop, int* done, CHOICE
) {
    __shared__ union {
        struct {
            float q[GROUP * HEAD_DIM], scores[SEEN * THREADS];
        } now;
        Chooser later;
    } shared;
    const int n = stop[blockIdx.z], tiles = (n + THREADS - 1) / THREADS, parts = min(int(gridDim.x), tiles);
    if (int(blockIdx.x) >= parts) return;
    const Choice c = CHOSEN;
    const Rows keys{k_codes, k_scales, k_sequence, k_head};
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS)
        shared.now.q[i] = q[i64(kv_head_id()) * GROUP * HEAD_DIM + i] / sqrtf(float(HEAD_DIM));
    rotate_queries(shared.now.q);
    for (int tile = blockIdx.x; tile < tiles; tile += parts) {
        const int first = tile * THREADS;
        const i64 row = keys.row(blockIdx.z, blockIdx.y, first);
        score_tile<false>(c, keys, row, first, min(THREADS, n - first), shared.now.q, shared.now.scores);
    }
    choose(c, n, parts, done + kv_head_id(), shared.later);
}
