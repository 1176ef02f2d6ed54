// The next token, where nothing but the most likely is asked for.
#include "extremes.cuh"

constexpr int NUMBERS = 8;  // of a thread

// found [rows] = where the largest of logits [rows, n] stands, of equal ones the first; -1 if any is not finite.
// best [rows, parts], done [rows] zeros. Grid (parts, rows).
KERNEL most_likely(const float* logits, int n, Largest* best, int* done, int* found) {
    __shared__ Largest shared[WARP];
    const int row = blockIdx.y, parts = gridDim.x, first = blockIdx.x * blockDim.x * NUMBERS + threadIdx.x;
    logits += i64(row) * n;
    best += i64(row) * parts;
    const auto meet = [](Largest& own, float x, int at) {
        if (fabsf(x) < INFINITE) own.meet(x, at);
        else own.meet(INFINITE, -1);
    };
    Largest own = none_yet();
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) {
        const int at = first + i * blockDim.x;
        if (at < n) meet(own, logits[at], at);
    }
    own = block_largest(own, shared);
    if (threadIdx.x == 0) best[blockIdx.x] = own;
    if (!is_last(done + row, parts)) return;
    own = none_yet();
    for (int i = threadIdx.x; i < parts; i += blockDim.x) own.meet(best[i].value, best[i].where);
    own = block_largest(own, shared);
    if (threadIdx.x == 0) found[row] = own.where;
}
