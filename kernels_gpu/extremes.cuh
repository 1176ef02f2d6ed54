// The largest of some numbers, and where numbers stand among others.
#pragma once
#include "common.cuh"

constexpr int NOWHERE = 0x7fffffff;

// Where the largest stands: of equal ones the first, NaN never. So it does not depend on the order of looking at them.
struct Largest {
    float value;
    int where;

    DEVICE void meet(float other, int at) {
        if (other > value || (other == value && at < where)) value = other, where = at;
    }
};

// Before any number: what is not above -infinity does not count.
DEVICE Largest none_yet() { return {-INFINITE, -1}; }

// Over groups of WIDTH lanes, a power of two; every lane of a group gets the result.
template <int WIDTH = WARP>
DEVICE Largest largest_over(Largest x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) {
        const float value = __shfl_xor_sync(ALL, x.value, step);
        const int where = __shfl_xor_sync(ALL, x.where, step);
        x.meet(value, where);
    }
    return x;
}

// Over a block of whole warps, at most 32; every thread gets it, and all threads must call. shared [32].
DEVICE Largest block_largest(Largest x, Largest* shared) {
    x = largest_over(x);
    __syncthreads();
    if (lane_id() == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    return largest_over(lane_id() < int(blockDim.x) / WARP ? shared[lane_id()] : none_yet());
}

// How many of the ascending numbers at(0) ... at(n - 1) are below x.
template <class Numbers, class Number>
DEVICE int count_below(const Numbers& at, int n, Number x) {
    int low = 0, high = n;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (at(middle) < x) low = middle + 1;
        else high = middle;
    }
    return low;
}
