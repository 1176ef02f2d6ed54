// Weights that are single numbers: F32, F16 or BF16, by the macro NUMBER.
#pragma once
#include "common.cuh"

enum Kind { KIND_F32, KIND_F16, KIND_BF16 };
template <int KIND>
struct Stored {
    using Type = u16;
};
template <>
struct Stored<KIND_F32> {
    using Type = float;
};
using Number = Stored<NUMBER>::Type;
constexpr int WIDE = 16 / sizeof(Number);  // of a wide load

DEVICE float number(Number x) {
    if constexpr (NUMBER == KIND_F32) return x;
    else if constexpr (NUMBER == KIND_F16) return to_float(x);
    else return __int_as_float(int(u32(x) << 16));
}

// Of a wide load.
DEVICE void unpack(const uint4& from, float (&x)[WIDE]) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < WIDE; i++) {
        if constexpr (NUMBER == KIND_F32) x[i] = __int_as_float(int(words[i]));
        else x[i] = number(u16(words[i / 2] >> 16 * (i % 2)));
    }
}
