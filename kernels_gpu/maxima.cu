// The largest magnitudes of weights that are numbers.
#include "numbers.cuh"

// largest [rows]: the bits of each row's, what is not finite left out. A warp for each row of n_in.
KERNEL find_largest(const Number* x, int rows, int n_in, u32* largest) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= rows) return;
    float most = 0.0f;
    for (int i = lane_id(); i < n_in; i += WARP) {
        const float a = fabsf(number(x[i64(row) * n_in + i]));
        if (a < INFINITE) most = fmaxf(most, a);
    }
    most = max_over(most);
    if (lane_id() == 0) largest[row] = u32(__float_as_int(most));
}
