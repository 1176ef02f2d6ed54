// The largest of many numbers, found by a block of threads: exactly so many, of equal ones the first, as they lie.
//
// Numbers are told apart by keys of 64 bits: in the order of the numbers, then of their places. How many keys lie in
// which of DIGITS equal parts of all that there can be is counted; the part in which the m-th largest falls is kept, and
// divided in turn, until all that lie in it are among the m. So time grows with the length, however numbers lie.
#pragma once
#include "common.cuh"


constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;

// u32 in the order of float32; NaN counts as -inf, and both zeros are one. No arithmetic, which flushes subnormals.
// SIGNED: whether there may be numbers below 0, and NaN.
template <bool SIGNED = true>
DEVICE u32 order_of(float x) {
    if constexpr (!SIGNED) return __float_as_uint(x) | 0x80000000u;
    const u32 given = __float_as_uint(x == x ? x : -INFINITE), bits = given << 1 ? given : 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Of equal numbers the one in the first place is the largest.
DEVICE u64 key_of(u32 order, int place) { return u64(order) << 32 | ~u32(place); }

struct Range {
    int begin, end;
};

// use(i, load(i)) for i in a range, shared by the threads of a block; N loads are on their way at a time.
template <int N, class Load, class Use>
DEVICE void for_each(Range range, const Load& load, const Use& use) {
    for (int first = range.begin + threadIdx.x; first < range.end; first += N * blockDim.x) {
        decltype(load(0)) x[N];
#pragma unroll
        for (int u = 0; u < N; u++)
            if (first + u * int(blockDim.x) < range.end) x[u] = load(first + u * blockDim.x);
#pragma unroll
        for (int u = 0; u < N; u++)
            if (first + u * int(blockDim.x) < range.end) use(first + u * int(blockDim.x), x[u]);
    }
}

// The same for i < n.
template <int N, class Load, class Use>
DEVICE void for_each(int n, const Load& load, const Use& use) {
    for_each<N>(Range{0, n}, load, use);
}

// The first of so many free places, for each lane; a warp asks once. All lanes call.
DEVICE int places_in(int* count, int wanted) {
    int sum = wanted, first = 0;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(ALL, sum, step);
        if (lane_id() >= step) sum += before;
    }
    if (lane_id() == WARP - 1 && sum) first = atomicAdd(count, sum);
    return __shfl_sync(ALL, first, WARP - 1) + sum - wanted;
}

// The same of one for each lane that wants one.
DEVICE int place_in(int* count, bool wanted) {
    const u32 votes = __ballot_sync(ALL, wanted), before = votes & ((1u << lane_id()) - 1);
    int first = 0;
    if (lane_id() == 0 && votes) first = atomicAdd(count, __popc(votes));
    return __shfl_sync(ALL, first, 0) + __popc(before);
}

struct Tally {
    int count[DIGITS], warps[WARP];
    int digit, above, within;  // that of the m-th largest; keys with larger ones, and with this one
};

// The sum of x over the threads before the calling one. All threads of a block of whole warps call. shared [WARP]: a
// barrier must lie between two calls.
DEVICE int sum_before(int x, int* shared) {
    int sum = x;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(ALL, sum, step);
        if (lane_id() >= step) sum += before;
    }
    const int warp = threadIdx.x / WARP;
    if (lane_id() == WARP - 1) shared[warp] = sum;
    __syncthreads();
    return sum_over(lane_id() < warp ? shared[lane_id()] : 0) + sum - x;
}

// All threads of a block call, of a power of two up to 1024; ends with a barrier.
DEVICE void clear_digits(Tally& tally) {
    for (int i = threadIdx.x; i < DIGITS; i += blockDim.x) tally.count[i] = 0;
    __syncthreads();
}

// Tells the digit of the m-th largest of what was counted. The same threads call; begins and ends with a barrier.
DEVICE void find_digit(int m, Tally& tally) {
    __syncthreads();
    // Threads share the digits among them, the first threads the largest.
    const int own = DIGITS / blockDim.x, top = DIGITS - 1 - threadIdx.x * own;
    int sum = 0;
    for (int i = 0; i < own; i++) sum += tally.count[top - i];
    int above = sum_before(sum, tally.warps);
    if (above < m && m <= above + sum) {
        int digit = top;
        while (above + tally.count[digit] < m) above += tally.count[digit--];
        tally.digit = digit, tally.above = above, tally.within = tally.count[digit];
    }
    __syncthreads();
}

// A number that exactly the m largest reach of those keys key(i), i < n, that lie from `low` on, below low + 2^bits; if
// keys are equal, perhaps more do. There are m, and m > 0. The same threads call; none reads a key before a barrier.
template <class Key>
DEVICE u64 least_of_largest(int n, int m, u64 low, int bits, Tally& tally, const Key& key) {
    while (bits > 0) {
        const int shift = max(0, bits - DIGIT_BITS);
        clear_digits(tally);
        for_each<4>(n, key, [&](int, u64 its) {
            const u64 part = (its - low) >> shift;
            if (part >> (bits - shift) == 0) atomicAdd(&tally.count[int(part)], 1);
        });
        find_digit(m, tally);
        low += u64(tally.digit) << shift, m -= tally.above, bits = shift;
        if (m == tally.within) break;
    }
    return low;
}

// Which of the first `words` of marks have bits set, ascending from `first` on, to rows. All threads of a block call.
DEVICE void write_marked(const u32* marks, int words, int first, int* rows, int* shared) {
    const int own = (words + blockDim.x - 1) / blockDim.x, begin = min(words, int(threadIdx.x) * own);
    const int end = min(words, begin + own);
    int n = 0;
    for (int i = begin; i < end; i++) n += __popc(marks[i]);
    int at = sum_before(n, shared);
    for (int i = begin; i < end; i++)
        for (u32 bits = marks[i]; bits; bits &= bits - 1) rows[at++] = first + 32 * i + __ffs(int(bits)) - 1;
}

DEVICE void mark(u32* marks, int place) { atomicOr(&marks[place / 32], 1u << place % 32); }
