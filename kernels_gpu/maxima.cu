// The largest magnitude of weights that are numbers.
#include "numbers.cuh"

// largest: its bits, 0 before; what is not finite is left out.
KERNEL find_largest(const Number* x, i64 n, u32* largest) {
    float most = 0.0f;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += i64(gridDim.x) * blockDim.x) {
        const float a = fabsf(number(x[i]));
        if (a < INFINITE) most = fmaxf(most, a);
    }
    most = max_over(most);
    if (lane_id() == 0) atomicMax(largest, u32(__float_as_int(most)));
}
