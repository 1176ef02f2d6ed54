// D2O, after a prompt: the kept row most like each evicted one, and what is merged into it. Grids end in the KV heads.
#include "rows.cuh"
constexpr bool SPLIT = K_STORE != F16;
#include "column_products.cuh"
#include "extremes.cuh"

// evicted [H_kv, n - m]: those of slots 0 ... n - 1 that are not in kept [H_kv, m]; both ascend. inverse [H_kv, n]: of
// the length of each slot's key, 0 of a key of zeros. Grid (n / block, H_kv).
KERNEL find_evicted(
    const u8* codes, const u16* scales, i64, i64 head, const int* kept, int n, int m, int* evicted, float* inverse
) {
    const int slot = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y;
    if (slot >= n) return;
    kept += i64(h) * m;
    const int below = count_below([&](int i) { return kept[i]; }, m, slot);
    if (below == m || kept[below] != slot) evicted[i64(h) * (n - m) + slot - below] = slot;
    const Keys keys(codes, scales, h * head);
    float squares = 0.0f;
    for (int piece = 0; 8 * piece < D; piece++) {
        float x[8];
        load8<K_STORE, D>(keys.rows(), slot, piece, x);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += x[j] * x[j];
    }
    inverse[i64(h) * n + slot] = squares > 0.0f ? 1.0f / sqrtf(squares) : 0.0f;
}

// Evicted keys stay, kept ones pass. Those that are split have length 1 before, so that none is too small for halves.
struct Similarity {
    using State = Largest;
    Keys keys;
    int rows;
    const int *evicted, *kept;
    const float* inverse;

    DEVICE Halves staying(int i, int piece) const { return keys.halves(evicted[i], piece, inverse[evicted[i]]); }
    DEVICE Halves passing(int i, int piece) const { return keys.halves(kept[i], piece, inverse[kept[i]]); }
    DEVICE float factor(int i) const { return SPLIT ? 1.0f : inverse[kept[i]]; }
    DEVICE int mark(int i) const { return kept[i]; }
    DEVICE bool idle(int, int) const { return false; }
    DEVICE void meet(Largest& best, int, float product, float factor, int slot) const {
        best.meet(product * factor, slot);
    }
};

// Of each evicted slot [H_kv, n - m] the kept one from `head` on that is most like it, and their cosine. Grid
// (evicted / STAYING, H_kv).
KERNEL __launch_bounds__(THREADS, BLOCKS) find_similar(
    const u8* codes, const u16* scales, i64, i64 head, const int* kept, const int* evicted, const float* inverse, int n,
    int m, int first_receiver, float* cosines, int* receivers
) {
    const int first = blockIdx.x * STAYING, h = blockIdx.y, n_evicted = n - m;
    kept += i64(h) * m, evicted += i64(h) * n_evicted, inverse += i64(h) * n;
    const Similarity job{Keys(codes, scales, h * head), n_evicted, evicted, kept, inverse};
    Largest best[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++) best[m][0] = best[m][1] = none_yet();
    pass_by(job, first, count_below([&](int i) { return kept[i]; }, m, first_receiver), m, best);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const Largest x = largest_over<4>(best[m][r]);
            const int i = row_that_stays(first, m, r);
            if (lane_id() % 4 || i >= n_evicted) continue;
            // None was found if no product is a number.
            const float cosine = x.where < 0 ? NOT_A_NUMBER : x.value * (SPLIT ? 1.0f : inverse[evicted[i]]);
            cosines[i64(h) * n_evicted + i] = cosine, receivers[i64(h) * n_evicted + i] = x.where;
        }
    }
}
