// Rows of a cache to other slots, as they lie in memory; WORD is the widest type that divides a row.
#include "common.cuh"

constexpr int SLICE = 32 / sizeof(WORD);  // words of a row that a block copies: what memory moves at once
constexpr int THREADS = 256, TOGETHER = 4;
constexpr int ROWS = THREADS / SLICE;

// Rows rows[H, n] of `from` become rows 0 ... n - 1 of `to`, each of `words`. Grid (slices of a row, heads).
// Both may be the same memory if rows ascend: a block takes all rows of its slice in order, and some together are read
// before they are written.
KERNEL copy_rows(
    const WORD* from, i64 from_head, WORD* to, i64 to_head, const int* rows, i64 rows_head, int n, int words
) {
    const int word = blockIdx.x * SLICE + threadIdx.x % SLICE, own = threadIdx.x / SLICE;
    const bool mine = word < words;
    from += blockIdx.y * from_head * words + word, to += blockIdx.y * to_head * words + word;
    rows += blockIdx.y * rows_head;
    for (int first = 0; first < n; first += ROWS * TOGETHER) {
        WORD held[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int row = first + i * ROWS + own;
            if (mine && row < n) held[i] = from[i64(rows[row]) * words];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int row = first + i * ROWS + own;
            if (mine && row < n) to[i64(row) * words] = held[i];
        }
        __syncthreads();
    }
}
