// Attention of a decode step to a range of slots.
#include "attention.cuh"

// Row b of q sees slots first[b] ... stop[b] - 1; if FAR, the queries far see those from 0 to far_stop[b] - 1 besides.
// Two passes in floats take more registers than two blocks of a multiprocessor leave each other.
KERNEL __launch_bounds__(THREADS, FAR && !TENSOR_CORES ? 1 : FAR || SCORES ? 2 : BLOCKS)
    attend(ATTENTION, const int* first, const int* stop, const int* far_stop) {
    const int b = blockIdx.z, begin = first[b], near = max(0, stop[b] - begin);
    if constexpr (FAR) attend_part(GIVEN, FarRange{far_stop[b], far_stop[b] + near, begin}, AsItIs{});
    else attend_part(GIVEN, Range{0, near, begin}, AsItIs{});
}
