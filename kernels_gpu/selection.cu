// The best slots by numbers that something else has found.
#include "selection.cuh"

// rows [B, H, k] become the k largest of ranks [B, H, slots] among the first stop[b], ascending; the first `head` and the
// last `tail` are among them. From one row of ranks to the next lie `head_span` numbers, and from one sequence to the
// next `span`. Grid (H, B). A bit for each slot: spare [B, H, spare_words], or if that is null, dynamic shared memory.
KERNEL __launch_bounds__(1024) top_k(
    const float* ranks, i64 span, i64 head_span, const int* stop, int k, int head, int tail, int* rows, u32* spare,
    int spare_words
) {
    extern __shared__ u32 shared_marks[];
    __shared__ Tally tally;
    const int n = stop[blockIdx.y], middle = n - head - tail, m = k - head - tail, words = (middle + 31) / 32;
    const float* values = ranks + blockIdx.y * span + blockIdx.x * head_span + head;
    const i64 row = i64(blockIdx.y) * gridDim.x + blockIdx.x;
    u32* marks = spare ? spare + row * spare_words : shared_marks;
    rows += row * k;
    const bool all = n <= k;
    for (int i = threadIdx.x; i < k; i += blockDim.x)
        if (all || i < head) rows[i] = i;
        else if (i >= k - tail) rows[i] = n - k + i;
    if (all || m == 0) return;
    for (int i = threadIdx.x; i < words; i += blockDim.x) marks[i] = 0;
    const auto key = [&](int i) { return key_of(order_of(values[i]), i); };
    const u64 least = least_of_largest(middle, m, 0, 64, tally, key);
    for (int i = threadIdx.x; i < middle; i += blockDim.x)
        if (key(i) >= least) mark(marks, i);
    __syncthreads();
    write_marked(marks, words, head, rows + head, tally.warps);
}
