// Attention of a decode step to a range of slots, and what becomes of attention to several.
#include "attention.cuh"

// Row b of q sees slots first[b] ... stop[b] - 1; with far_stop also slots 0 ... far_stop[b] - 1, with the queries far.
KERNEL __launch_bounds__(THREADS, 2) attend(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head,
    const float* q, const int* first, const int* stop, const float* far, const int* far_stop, float* out, float* sums,
    float2* ends, int* done, float* scores, float2* totals, int slots
) {
    const Attention a{{k_codes, k_scales, k_sequence, k_head}, {v_codes, v_scales, v_sequence, v_head},
                      q, far, out, sums, ends, done, scores, totals, slots};
    const int b = blockIdx.z, begin = first[b], near = max(0, stop[b] - begin);
#if FAR
    const int before = far_stop[b];
    attend(a, FarRange{before, before + near, begin}, AsItIs{});
#else
    attend(a, Range{0, near, begin}, AsItIs{});
#endif
}
