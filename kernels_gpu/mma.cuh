// A product of tiles by a warp on tensor cores: D [16, 8] += A [16, 16] B [16, 8], of halves, added up as floats.
#pragma once
#include "common.cuh"

// What lane 4 g + t holds, two halves a word, the lower column (of A) or row (of B) below:
//   a  (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8)
//   b  (2 t, g), (2 t + 8, g)
//   d  (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
DEVICE void multiply_tiles(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
#else
    // Without tensor cores each lane asks the others for what it needs, two words at a time.
    const int g = lane_id() / 4, t = lane_id() % 4;
    using Words = unsigned long long;
    const Words low = Words(a[1]) << 32 | a[0], high = Words(a[3]) << 32 | a[2], own = Words(b[1]) << 32 | b[0];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const Words rows[2] = {__shfl_sync(ALL, low, 4 * g + k), __shfl_sync(ALL, high, 4 * g + k)};
        const Words columns[2] = {__shfl_sync(ALL, own, 8 * t + k), __shfl_sync(ALL, own, 8 * t + 4 + k)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 row = u32(rows[half] >> 32 * (i / 2)), column = u32(columns[i % 2] >> 32 * half);
                d[i] += low_half(row) * low_half(column) + high_half(row) * high_half(column);
            }
        }
    }
#endif
}
