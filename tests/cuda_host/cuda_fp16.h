// __half and __half2: stored as bits, computed in float and rounded to nearest even.
#pragma once
#include "arithmetic.h"

namespace cuda_host {

inline uint16_t half_bits(float x) {
    const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;                       // NaN, as the device writes it
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);     // 65520 and more: infinity
    if (size >= 0x38800000) {                                   // normal: the exponent's bias goes from 127 to 15
        const uint32_t odd = size >> 13 & 1;
        return uint16_t(sign | (size - 0x38000000 + 0xfff + odd) >> 13);
    }
    return uint16_t(sign | uint32_t(::lrintf(::fabsf(x) * 16777216.0f)));  // subnormal: a multiple of 2^-24
}

inline float half_value(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
    if (size >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (size & 0x3ff) << 13);
    if (size >= 0x0400) return bits_as<float>(sign | ((size << 13) + 0x38000000));
    const float value = float(size) * 5.9604644775390625e-8f;
    return sign ? -value : value;
}

}  // namespace cuda_host

struct __half_raw { unsigned short x; };
struct __half {
    unsigned short bits;
    __half() = default;
    CUDA_HOST_INLINE __half(__half_raw raw) : bits(raw.x) {}
    CUDA_HOST_INLINE __half(float x) : bits(cuda_host::half_bits(x)) {}
    CUDA_HOST_INLINE __half(double x) : bits(cuda_host::half_bits(float(x))) {}
    CUDA_HOST_INLINE __half(int x) : bits(cuda_host::half_bits(float(x))) {}
    CUDA_HOST_INLINE operator float() const { return cuda_host::half_value(bits); }
};
struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    CUDA_HOST_INLINE __half2(__half x, __half y) : x(x), y(y) {}
};
using half = __half;
using half2 = __half2;

CUDA_HOST_INLINE float __half2float(__half a) { return a; }
CUDA_HOST_INLINE __half __float2half(float a) { return a; }
CUDA_HOST_INLINE __half __float2half_rn(float a) { return a; }
CUDA_HOST_INLINE __half __ushort_as_half(unsigned short a) { return __half_raw{a}; }
CUDA_HOST_INLINE __half __short_as_half(short a) { return __half_raw{static_cast<unsigned short>(a)}; }
CUDA_HOST_INLINE unsigned short __half_as_ushort(__half a) { return a.bits; }
CUDA_HOST_INLINE short __half_as_short(__half a) { return short(a.bits); }
CUDA_HOST_INLINE float2 __half22float2(__half2 a) { return {a.x, a.y}; }
CUDA_HOST_INLINE __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
CUDA_HOST_INLINE __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
CUDA_HOST_INLINE __half2 __float2half2_rn(float a) { return {a, a}; }
CUDA_HOST_INLINE __half2 __half2half2(__half a) { return {a, a}; }
CUDA_HOST_INLINE __half2 __halves2half2(__half a, __half b) { return {a, b}; }
CUDA_HOST_INLINE __half2 make_half2(__half a, __half b) { return {a, b}; }
CUDA_HOST_INLINE __half __low2half(__half2 a) { return a.x; }
CUDA_HOST_INLINE __half __high2half(__half2 a) { return a.y; }
CUDA_HOST_INLINE float __low2float(__half2 a) { return a.x; }
CUDA_HOST_INLINE float __high2float(__half2 a) { return a.y; }

#define CUDA_HOST_HALVES(name, operation)                                                                      \
    CUDA_HOST_INLINE __half operator operation(__half a, __half b) { return float(a) operation float(b); }     \
    CUDA_HOST_INLINE __half __h##name(__half a, __half b) { return a operation b; }                            \
    CUDA_HOST_INLINE __half2 __h##name##2(__half2 a, __half2 b) { return {a.x operation b.x, a.y operation b.y}; }
CUDA_HOST_HALVES(add, +)
CUDA_HOST_HALVES(sub, -)
CUDA_HOST_HALVES(mul, *)
#undef CUDA_HOST_HALVES
CUDA_HOST_INLINE __half __hfma(__half a, __half b, __half c) { return float(a) * float(b) + float(c); }
CUDA_HOST_INLINE __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
