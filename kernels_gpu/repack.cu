// A file's blocks to planes: see formats.cuh. A thread makes a group of 32 weights. What each format's bytes mean is
// told in minirt/dequantize.py.
#include "formats.cuh"

enum Source { FROM_Q4_0, FROM_Q4_1, FROM_Q5_0, FROM_Q5_1, FROM_Q8_0, FROM_Q2_K, FROM_Q3_K, FROM_Q4_K, FROM_Q5_K,
              FROM_Q6_K, FROM_IQ4_NL, FROM_IQ4_XS };

DEVICE u32 u16_at(const u8* b) { return b[0] | b[1] << 8; }

// Code i of group g of a block.
DEVICE u32 code_of(const u8* b, int g, int i) {
    const int shift = i < 16 ? 0 : 4, run = g / 2 * 32, half = g % 2 * 4;  // K formats: runs of 32 bytes, two groups each
    if constexpr (SOURCE == FROM_Q4_0 || SOURCE == FROM_IQ4_NL) return b[2 + i % 16] >> shift & 15;
    if constexpr (SOURCE == FROM_Q4_1) return b[4 + i % 16] >> shift & 15;
    if constexpr (SOURCE == FROM_Q5_0) return (b[6 + i % 16] >> shift & 15) | (b[2 + i / 8] >> i % 8 & 1) << 4;
    if constexpr (SOURCE == FROM_Q5_1) return (b[8 + i % 16] >> shift & 15) | (b[4 + i / 8] >> i % 8 & 1) << 4;
    if constexpr (SOURCE == FROM_Q8_0) return b[2 + i];
    if constexpr (SOURCE == FROM_Q2_K) return b[16 + g / 4 * 32 + i] >> 2 * (g % 4) & 3;
    if constexpr (SOURCE == FROM_Q3_K) return (b[32 + g / 4 * 32 + i] >> 2 * (g % 4) & 3) | (b[i] >> g & 1) << 2;
    if constexpr (SOURCE == FROM_Q4_K) return b[16 + run + i] >> half & 15;
    if constexpr (SOURCE == FROM_Q5_K) return (b[48 + run + i] >> half & 15) | (b[16 + i] >> g & 1) << 4;
    if constexpr (SOURCE == FROM_Q6_K) {
        const u32 low = b[g / 4 * 64 + g % 2 * 32 + i] >> (g % 4 < 2 ? 0 : 4) & 15;
        return low | (b[128 + g / 4 * 32 + i] >> 2 * (g % 4) & 3) << 4;
    }
    if constexpr (SOURCE == FROM_IQ4_XS) return b[8 + g * 16 + i % 16] >> shift & 15;
    return 0;
}

// Scale j of 8 in the 12 bytes of Q4_K and Q5_K; of their minima with `first` 4.
DEVICE u32 six_bits(const u8* b, int j, int first) {
    if (j < 4) return b[first + j] & 63;
    return (first ? b[4 + j] >> 4 : b[4 + j] & 15) | (b[first + j - 4] >> 6) << 4;
}

// Scale j of 16 of Q3_K, 32 larger.
DEVICE u32 q3_scale(const u8* b, int j) {
    const u32 low = j < 8 ? b[96 + j] & 15 : b[88 + j] >> 4;
    return low | (b[104 + j % 4] >> 2 * (j / 4) & 3) << 4;
}

// The scales of group g, as formats.cuh has them.
DEVICE u32 scales_of(const u8* b, int g) {
    if constexpr (SCALES == HALF) return u16_at(b);
    if constexpr (SCALES == HALF_MIN) return u16_at(b) | u16_at(b + 2) << 16;
    if constexpr (SOURCE == FROM_Q2_K) return u16_at(b + 2 * g);
    if constexpr (SOURCE == FROM_Q3_K) {
        return (q3_scale(b, 2 * g) - 32 & 255) | (q3_scale(b, 2 * g + 1) - 32 & 255) << 8;
    }
    if constexpr (SCALES == SUPER_MIN) return six_bits(b + 4, g, 0) | six_bits(b + 4, g, 4) << 8;
    if constexpr (SOURCE == FROM_Q6_K) return u16_at(b + 192 + 2 * g);
    if constexpr (SOURCE == FROM_IQ4_XS) {
        const u32 scale = ((b[4 + g / 2] >> g % 2 * 4 & 15) | (u16_at(b + 2) >> 2 * g & 3) << 4) - 32 & 255;
        return scale | scale << 8;
    }
    return 0;
}

DEVICE u32 super_of(const u8* b) {
    if constexpr (SOURCE == FROM_Q2_K) return u16_at(b + 80) | u16_at(b + 82) << 16;
    if constexpr (SOURCE == FROM_Q3_K) return u16_at(b + 108);
    if constexpr (SOURCE == FROM_Q6_K) return u16_at(b + 208);
    if constexpr (SOURCE == FROM_IQ4_XS) return u16_at(b);
    return u16_at(b) | u16_at(b + 2) << 16;
}

// Blocks of BLOCK_BYTES bytes that hold BLOCK_GROUPS groups each. largest: the bits of the largest |weight| of each row
// of row_groups, 0 before.
KERNEL repack(
    const u8* blocks, i64 groups, int row_groups, u8* low, u8* high, u8* scales, u32* supers, u32* largest
) {
    const i64 group = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const u8* b = blocks + group / BLOCK_GROUPS * BLOCK_BYTES;
    const int g = group % BLOCK_GROUPS;
    u32 words[LOW_BYTES / 4] = {}, above[2] = {};
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        const u32 code = code_of(b, g, i);
        if constexpr (LOW_BITS == 8) words[i / 4] |= code << i % 4 * 8;
        else words[i % 16 / 4] |= (code & 15) << (i % 4 * 8 + i / 16 * 4);
        if constexpr (HIGH_BITS == 1) above[0] |= (code >> 4) << (i % 4 * 8 + i / 4);
        if constexpr (HIGH_BITS == 2) above[i / 16] |= (code >> 4) << (i % 4 * 8 + 2 * (i / 4 % 4));
    }
    for (int i = 0; i < LOW_BYTES / 4; i++) reinterpret_cast<u32*>(low)[group * (LOW_BYTES / 4) + i] = words[i];
    for (int i = 0; i < HIGH_BITS; i++) reinterpret_cast<u32*>(high)[group * HIGH_BITS + i] = above[i];
    if constexpr (SCALE_BYTES == 4) reinterpret_cast<u32*>(scales)[group] = scales_of(b, g);
    else reinterpret_cast<u16*>(scales)[group] = u16(scales_of(b, g));
    // Every group of a super block writes the same word: whichever comes first, it is right.
    if constexpr (IS_SUPER) supers[group / 8] = super_of(b);

    Group own = {};
    for (int i = 0; i < LOW_BYTES / 4; i++) own.low[i] = words[i];
    for (int i = 0; i < HIGH_BITS; i++) own.high[i] = above[i];
    own.scales = scales_of(b, g), own.super = IS_SUPER ? super_of(b) : 0;
    const Steps steps = steps_of(own);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUP / 4; i++) {
        float w[4];
        weights_of(own, steps, i, w);
        for (int j = 0; j < 4; j++) most = fmaxf(most, fabsf(w[j]));
    }
    if (most < INFINITE) atomicMax(largest + group / row_groups, u32(__float_as_int(most)));
}
