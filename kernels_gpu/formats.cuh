// Weights in groups of 32 as products read them: codes, further bits of codes, scales, each in a plane of its own.
//
// A file's blocks are torn apart once, when a model is loaded (repack.cu), because their odd sizes keep wide loads from
// being aligned. What a format is is told by macros (formats.py): w = scale (code - OFFSET) - minimum.
//   low     LOW_BITS 4: 16 bytes a group, byte i holds codes i and i + 16; 8: 32 bytes
//   high    HIGH_BITS a code, on top of its low ones: field k of byte j belongs to code 4 k + j; of 16 codes a word with
//           2 bits, of 32 with 1
//   scales  2 bytes a group, HALF_MIN 4
//   supers  of SUPER formats: half scale and half minimum of 256 weights, a word
#pragma once
#include "common.cuh"

enum Scales {
    HALF,         // a half
    HALF_MIN,     // two halves: scale, and minimum, to be added
    SUPER_MIN,    // bytes scale and minimum, times those of 256
    SUPER_16,     // signed bytes: scales of 16 weights each
    SUPER_MIN_16  // bytes for 16 weights each: scale below, minimum above
};
constexpr int GROUP = 32;
constexpr int LOW_BYTES = GROUP * LOW_BITS / 8, HIGH_BYTES = GROUP * HIGH_BITS / 8;
constexpr int SCALE_BYTES = SCALES == HALF_MIN ? 4 : 2;
constexpr bool IS_SUPER = SCALES >= SUPER_MIN;
constexpr bool HAS_MINIMUM = SCALES == HALF_MIN || SCALES == SUPER_MIN || SCALES == SUPER_MIN_16;
constexpr bool BY_16 = SCALES >= SUPER_16;

struct Weights {
    const u8* low;
    const u8* high;
    const u8* scales;
    const u32* supers;
};

// As they lie in memory.
struct Group {
    u32 low[LOW_BYTES / 4];
    u32 high[HIGH_BITS ? HIGH_BITS : 1];
    u32 scales, super;
};

// Scale and minimum of each half of a group; of both, where there are no halves, the first.
struct Steps {
    float scale[2], minimum[2];
};

DEVICE Group load_group(const Weights& w, i64 group) {
    Group g;
    const uint4* low = reinterpret_cast<const uint4*>(w.low) + group * (LOW_BYTES / 16);
#pragma unroll
    for (int i = 0; i < LOW_BYTES / 16; i++) {
        const uint4 a = low[i];
        g.low[4 * i] = a.x, g.low[4 * i + 1] = a.y, g.low[4 * i + 2] = a.z, g.low[4 * i + 3] = a.w;
    }
    if constexpr (HIGH_BITS == 1) g.high[0] = reinterpret_cast<const u32*>(w.high)[group];
    if constexpr (HIGH_BITS == 2) {
        const uint2 a = reinterpret_cast<const uint2*>(w.high)[group];
        g.high[0] = a.x, g.high[1] = a.y;
    }
    if constexpr (SCALE_BYTES == 4) g.scales = reinterpret_cast<const u32*>(w.scales)[group];
    else g.scales = reinterpret_cast<const u16*>(w.scales)[group];
    g.super = IS_SUPER ? w.supers[group / 8] : 0;
    return g;
}

DEVICE Steps steps_of(const Group& g) {
    Steps s = {};
    if constexpr (SCALES == HALF) {
        s.scale[0] = low_half(g.scales);
    } else if constexpr (SCALES == HALF_MIN) {
        s.scale[0] = low_half(g.scales), s.minimum[0] = -high_half(g.scales);
    } else {
        const float d = low_half(g.super), m = high_half(g.super);
        const u32 a = g.scales & 255, b = g.scales >> 8;
        if constexpr (SCALES == SUPER_MIN) {
            s.scale[0] = d * float(a), s.minimum[0] = m * float(b);
        } else if constexpr (SCALES == SUPER_16) {
            s.scale[0] = d * float(i8(a)), s.scale[1] = d * float(i8(b));
        } else {
            s.scale[0] = d * float(a & 15), s.scale[1] = d * float(b & 15);
            s.minimum[0] = m * float(a >> 4), s.minimum[1] = m * float(b >> 4);
        }
    }
    return s;
}

// Four numbers of IQ4_NL for four codes of 4 bits, one a byte.
DEVICE u32 looked_up(u32 codes) {
    // Their low three bits side by side choose bytes of either half of the table, the fourth between the halves.
    const u32 pairs = codes | codes >> 4, chosen = ((pairs & 0xff) | (pairs >> 8 & 0xff00)) & 0x7777;
    const u32 low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, chosen), high = __byte_perm(0x26190d01u, 0x71594535u, chosen);
    const u32 upper = (codes >> 3 & 0x01010101u) * 0xff;
    return (low & ~upper) | (high & upper);
}

// Codes 4 i ... 4 i + 3 as signed bytes of a word; i is known when this is compiled.
DEVICE u32 codes_of(const Group& g, int i) {
    if constexpr (LOW_BITS == 8) return g.low[i];
    u32 word = (i < 4 ? g.low[i] : g.low[i - 4] >> 4) & 0x0f0f0f0fu;
    if constexpr (HIGH_BITS == 1) word |= (g.high[0] >> i & 0x01010101u) << 4;
    if constexpr (HIGH_BITS == 2) word |= (g.high[i / 4] >> 2 * (i % 4) & 0x03030303u) << 4;
    return LOOKED_UP ? looked_up(word) : word;
}

// Weights 4 i ... 4 i + 3 themselves.
DEVICE void weights_of(const Group& g, const Steps& s, int i, float (&w)[4]) {
    const u32 word = codes_of(g, i);
    const int half = BY_16 ? i / 4 : 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        w[j] = s.scale[half] * float(int(i8(word >> 8 * j)) - OFFSET);
        if constexpr (HAS_MINIMUM) w[j] -= s.minimum[half];
    }
}
