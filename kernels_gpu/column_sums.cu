// What the rows of a prompt's chunk gave each slot: probabilities, added up. See column_products.cuh.
#include "rows.cuh"
#include "softmax.cuh"
constexpr bool SPLIT = K_STORE == F32;  // else as exact as the attention itself
#include "column_products.cuh"

// Keys stay, queries pass: row i of them is query head i % group of token i / group.
struct ColumnSums {
    using State = float;
    Keys keys;
    int rows;              // slots that the chunk's last row sees
    const float *q, *lse;  // of the group's first head
    int group, heads, start;

    DEVICE int query(int i) const { return i / group * heads + i % group; }
    DEVICE Halves staying(int slot, int piece) const { return keys.halves(slot, piece, 1.0f); }
    DEVICE Halves passing(int i, int piece) const {
        float x[8];
        load8<F32, D>({reinterpret_cast<u8*>(const_cast<float*>(q)), nullptr, 0, 0}, query(i), piece, x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= rsqrtf(float(D)) * LOG2_E;
        return split(x);
    }
    DEVICE float factor(int i) const { return lse[query(i)] * LOG2_E; }
    DEVICE int mark(int i) const { return start + i / group; }  // the last slot that it sees
    DEVICE bool idle(int first, int i) const { return first > mark(i + PASSING - 1); }
    DEVICE void meet(float& sum, int slot, float product, float lse, int last) const {
        if (slot <= last) sum += power_of_2(product - lse);
    }
};

// partial [parts, H_kv, columns]: what rows part * rows_each ... of the chunk gave each KV head's slots; of slots that
// none of them sees, nothing. q [T, H_q, d], rotated as the keys are; rows = T group. Grid (columns / STAYING, H_kv,
// parts).
KERNEL __launch_bounds__(THREADS, BLOCKS) add_probabilities(
    const u8* k_codes, const u16* k_scales, i64 k_sequence, i64 k_head, int seq, int columns, const float* q,
    const float* lse, int group, int start, int rows, int rows_each, float* partial
) {
    const int first = blockIdx.x * STAYING, h = blockIdx.y, heads = gridDim.y * group;
    const int end = min(rows, int(blockIdx.z + 1) * rows_each);
    const int from = max(int(blockIdx.z) * rows_each, max(0, first - start) * group);  // rows before see none of it
    if (from >= end) return;
    const Keys keys(k_codes, k_scales, seq * k_sequence + h * k_head);
    const ColumnSums job{keys, columns, q + h * group * D, lse + h * group, group, heads, start};
    float sums[TILES][2] = {};
    pass_by(job, first, from, end, sums);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float sum = sum_over<4>(sums[m][r]);
            const int slot = row_that_stays(first, m, r);
            if (lane_id() % 4 || slot >= columns) continue;
            partial[(i64(blockIdx.z) * gridDim.y + h) * columns + slot] = sum;
        }
    }
}

// sums [H_kv, columns] += the sums of all parts, averaged over the group; rows of sums lie sums_head apart. Grid
// (columns / block, H_kv).
KERNEL join_probabilities(
    const float* partial, int parts, int rows_each, int group, int start, int columns, float* sums, i64 sums_head
) {
    const int slot = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y;
    if (slot >= columns) return;
    float sum = 0.0f;
    for (int part = max(0, slot - start) * group / rows_each; part < parts; part++) {
        sum += partial[(i64(part) * gridDim.y + h) * columns + slot];
    }
    sums[h * sums_head + slot] += sum / float(group);
}
