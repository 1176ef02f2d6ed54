// Attention to rows that something else has chosen: SparQ's steps 2 and 3 (arXiv 2312.04985).
#include "attention.cuh"

// Slots rows[0] ... rows[count - 1]; those that are none of the cache's are left out.
struct Listed {
    static constexpr bool HAS_FAR = false;
    int far, count;
    const int* rows;
    int slots;

    DEVICE int slot(int i) const { return u32(rows[i]) < u32(slots) ? rows[i] : -1; }
};

// What was not read counts as the mean of all values: alpha y + (1 - alpha) mean.
struct Blended {
    const float *weights, *mean;  // [GROUP, k], [D]; null: y
    int k, count;
    float* alpha;  // [GROUP], shared

    DEVICE void prepare() const {
        if (!weights) return;
        for (int h = threadIdx.x / WARP; h < GROUP; h += WARPS) {
            float sum = 0.0f;
            for (int i = lane_id(); i < count; i += WARP) sum += weights[i64(h) * k + i];
            sum = sum_over(sum);
            if (lane_id() == 0) alpha[h] = sum;
        }
        __syncthreads();
    }
    DEVICE float number(int h, int j, float y) const {
        return weights ? alpha[h] * y + (1.0f - alpha[h]) * mean[j] : y;
    }
};

// Row b of q attends the first stop[b] of rows [B, H_kv, k], which are among n_slots; with counts [B, H_kv, 3] no more
// than the first counts[b, h, 0] of head h. weights [B, H_q, k] and mean [B,
// H_kv, D]: see Blended.
KERNEL __launch_bounds__(THREADS, TENSOR_CORES ? 2 : 1) attend_rows(
    ATTENTION, const int* rows, const int* stop, int k, int n_slots, const float* weights, const float* mean,
    const int* counts
) {
    __shared__ float alpha[GROUP];
    const int kv_head = blockIdx.z * (gridDim.y / SPLIT) + blockIdx.y / SPLIT, most = min(stop[blockIdx.z], k);
    const int count = counts ? max(0, min(most, counts[3 * kv_head])) : most;
    const Listed listed{0, count, rows + i64(kv_head) * k, n_slots};
    Blended blended{nullptr, nullptr, k, count, alpha};
    if (weights) blended.weights = weights + i64(kv_head) * GROUP * k, blended.mean = mean + i64(kv_head) * D;
    attend_part(GIVEN, listed, blended);
}
