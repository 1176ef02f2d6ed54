// __nv_bfloat16 and __nv_bfloat162: stored as bits, converted to and from float.
#pragma once
#include "arithmetic.h"

struct __nv_bfloat16_raw { unsigned short x; };
struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    CUDA_HOST_INLINE __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
    CUDA_HOST_INLINE __nv_bfloat16(float x) {
        const uint32_t word = __float_as_uint(x), odd = word >> 16 & 1;
        bits = x != x ? 0x7fff : static_cast<unsigned short>((word + 0x7fff + odd) >> 16);
    }
    CUDA_HOST_INLINE operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    CUDA_HOST_INLINE __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};

CUDA_HOST_INLINE float __bfloat162float(__nv_bfloat16 a) { return a; }
CUDA_HOST_INLINE __nv_bfloat16 __float2bfloat16(float a) { return a; }
CUDA_HOST_INLINE __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
CUDA_HOST_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return __nv_bfloat16_raw{a}; }
CUDA_HOST_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
CUDA_HOST_INLINE float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
CUDA_HOST_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
CUDA_HOST_INLINE __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
CUDA_HOST_INLINE float __low2float(__nv_bfloat162 a) { return a.x; }
CUDA_HOST_INLINE float __high2float(__nv_bfloat162 a) { return a.y; }
