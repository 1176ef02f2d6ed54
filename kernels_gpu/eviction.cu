// Which of the cached tokens goes; orders, and rows by their numbers.
#include "extremes.cuh"
#include "softmax.cuh"

// See Ops.evict. scores and positions [B, H, slots], sequences and heads apart as said, slot [B, H]. A block for each
// head: grid (H, B). Where a number lies outside the slots, nothing is done.
KERNEL evict(
    float* scores, i64 scores_sequence, i64 scores_head, int* positions, i64 positions_sequence, i64 positions_head,
    int slots, const int* stops, const int* rooms, const int* heads, const int* befores, int* slot
) {
    __shared__ Largest shared[WARP];
    const int h = blockIdx.x, b = blockIdx.y;
    const int stop = stops[b], head = heads[b], before = befores[b];
    const bool full = stop >= rooms[b];
    if (stop < 0 || head < 0 || (full ? max(stop - 1, head) : stop) >= slots) return;
    float* score = scores + b * scores_sequence + h * scores_head;
    int* position = positions + b * positions_sequence + h * positions_head;
    int found = stop;
    if (full) {
        Largest lowest = none_yet();
#pragma unroll 4
        for (int s = head + threadIdx.x; s < stop; s += blockDim.x) {
            const float x = score[s];
            if (position[s] < before) lowest.meet(-x, s);  // what is infinite never counts
        }
        lowest = block_largest(lowest, shared);
        found = lowest.where < 0 ? head : lowest.where;
    }
    if (threadIdx.x == 0) slot[b * gridDim.x + h] = found, score[found] = 0.0f, position[found] = 0x7fffffff;
}

// -- orders -----------------------------------------------------------------------------------------------------------

// Numbers and their places in one key each: keys are distinct, and in the order of numbers, of equal ones of places.
DEVICE u64 sort_key(int value, int place) { return u64(u32(value) ^ 0x80000000u) << 32 | u32(place); }

constexpr int TILE = 1024;

// Tiles of values [H, n], rows `row` apart, as sorted keys [H, n]: a bitonic sort (Batcher 1968). Grid (tiles, H).
KERNEL sort_tiles(const int* values, i64 row, int n, u64* keys) {
    __shared__ u64 tile[TILE];
    const int first = blockIdx.x * TILE, h = blockIdx.y;
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) {
        tile[i] = first + i < n ? sort_key(values[h * row + first + i], first + i) : ~u64(0);
    }
    for (int run = 2; run <= TILE; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < TILE / 2; i += blockDim.x) {
                const int a = i / step * 2 * step + i % step, b = a + step;
                const u64 x = tile[a], y = tile[b];
                if ((x > y) == ((a & run) == 0)) tile[a] = y, tile[b] = x;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE && first + i < n; i += blockDim.x) keys[i64(h) * n + first + i] = tile[i];
}

// Sorted runs of `run` keys [H, n], two and two together: how many of the other run are smaller tells a key's place.
// Grid (n / block, H).
KERNEL merge_runs(const u64* from, int n, int run, u64* to) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    from += i64(blockIdx.y) * n, to += i64(blockIdx.y) * n;
    const int first = i / (2 * run) * 2 * run, middle = min(first + run, n), end = min(middle + run, n);
    const u64 key = from[i];
    const bool left = i < middle;
    const u64* other = from + (left ? middle : first);
    const int smaller = count_below([&](int j) { return other[j]; }, left ? end - middle : middle - first, key);
    to[(left ? i : i - middle + first) + smaller] = key;
}

// Places of sorted keys.
KERNEL places(const u64* keys, i64 n, int* order) {
    const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) order[i] = int(u32(keys[i]));
}

// out [H, m] = values [H, n] at rows [H, m], of four bytes each. A distance of 0 between rows serves all heads.
KERNEL take(const u32* values, i64 values_head, const int* rows, i64 rows_head, int m, u32* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y;
    if (i < m) out[i64(h) * m + i] = values[h * values_head + rows[h * rows_head + i]];
}

// weights [B, H, slots] = or += the probabilities of slots 0 ... stop[b] - 1, averaged over the group of query heads
// that shares a row: of attention that kept scores [B, H_q, n_score] and totals [B, H_q]. A block has WARP slots, and
// up to 8 heads at a time; grid (slots / WARP, H, B).
KERNEL average_weights(
    const float* scores, const float2* totals, int n_score, const int* stop, int group, int add, float* weights,
    i64 weights_sequence, i64 weights_head
) {
    __shared__ float sums[8][WARP];
    const int s = blockIdx.x * WARP + threadIdx.x, h = blockIdx.y, b = blockIdx.z;
    const bool counts = s < stop[b];
    const i64 first = (i64(b) * gridDim.y + h) * group;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.y; i < group; i += blockDim.y) {
        const float2 total = totals[first + i];
        if (counts) sum += power_of_2(scores[(first + i) * n_score + s] - total.x) / total.y;
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || !counts) return;
    for (int i = 1; i < int(blockDim.y); i++) sum += sums[i][threadIdx.x];
    float* to = weights + b * weights_sequence + h * weights_head + s;
    *to = sum / float(group) + (add ? *to : 0.0f);
}
