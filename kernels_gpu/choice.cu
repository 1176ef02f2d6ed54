// The choice of choice.cuh by several blocks for each KV head: those of one launch rank the tokens, those of the next
// list the best, and the last of them chooses.
// Macros: GROUP, INTERLEAVED.
#include "choice.cuh"

constexpr int CHOOSERS = 1024;  // threads of a block

// Blocks that have a share of the first n tokens.
DEVICE int parts_of(const Choice& c, int n) {
    return wanted(c, n) > 0 ? min(int(gridDim.x), runs_of(n - c.local)) : 1;
}

// Of sequence b the first stop[b] tokens.
KERNEL __launch_bounds__(CHOOSERS, 1) rank_tokens(const int* stop, CHOICE) {
    __shared__ Chooser s;
    const Choice c = CHOSEN;
    const int n = stop[blockIdx.z], few = n - c.local, parts = parts_of(c, n);
    if (int(blockIdx.x) >= parts) return;
    Found& own = *c.found;
    find_softmax(c, n, s);
    if (wanted(c, n) > 0) {
        find_top(c, few, s);
        clear_digits(s.tally);
        count_ranks(c, few, share_of(few, blockIdx.x, parts), s);
        __syncthreads();
        for (int i = threadIdx.x; i < DIGITS; i += CHOOSERS)
            if (s.tally.count[i]) atomicAdd(&own.count[i], s.tally.count[i]);
        if (blockIdx.x == 0 && threadIdx.x == 0) own.top = s.top, own.base = s.base;
    }
    if (blockIdx.x > 0) return;
    for (int g = threadIdx.x; g < GROUP; g += CHOOSERS) own.high[g] = s.high[g], own.scale[g] = s.scale[g];
}

KERNEL __launch_bounds__(CHOOSERS, 1) choose_ranked(const int* stop, CHOICE) {
    __shared__ Chooser s;
    const Choice c = CHOSEN;
    const int n = stop[blockIdx.z], m = wanted(c, n), parts = parts_of(c, n);
    if (int(blockIdx.x) >= parts) return;
    Found& own = *c.found;
    for (int g = threadIdx.x; g < GROUP; g += CHOOSERS) s.high[g] = own.high[g], s.scale[g] = own.scale[g];
    Bound bound{};
    if (m > 0) {
        if (threadIdx.x == 0) s.top = own.top, s.base = own.base;
        for (int i = threadIdx.x; i < DIGITS; i += CHOOSERS) s.tally.count[i] = own.count[i];
        bound = bound_by_ranks(m, s);
        list_by_ranks(c, share_of(n - c.local, blockIdx.x, parts), bound.rank, &own.listed);
        if (!is_last(&own.done, parts)) return;
    }
    __syncthreads();
    settle(c, n, own.listed, bound, s, own.seen);
}
