// Arithmetic on bits, bytes and floats: CUDA's built-in functions that look at their arguments only.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "runtime.h"

#define CUDA_HOST_MIN_MAX(R, A, B)         \
    CUDA_HOST_INLINE R min(A a, B b) {     \
        const R x = a, y = b;              \
        return x < y ? x : y;              \
    }                                      \
    CUDA_HOST_INLINE R max(A a, B b) {     \
        const R x = a, y = b;              \
        return x < y ? y : x;              \
    }
CUDA_HOST_MIN_MAX(int, int, int)
CUDA_HOST_MIN_MAX(unsigned, unsigned, unsigned)
CUDA_HOST_MIN_MAX(unsigned, int, unsigned)
CUDA_HOST_MIN_MAX(unsigned, unsigned, int)
CUDA_HOST_MIN_MAX(long, long, long)
CUDA_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUDA_HOST_MIN_MAX(long long, long long, long long)
CUDA_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef CUDA_HOST_MIN_MAX
CUDA_HOST_INLINE float min(float a, float b) { return ::fminf(a, b); }  // of a number and NaN, the number
CUDA_HOST_INLINE float max(float a, float b) { return ::fmaxf(a, b); }
CUDA_HOST_INLINE double min(double a, double b) { return ::fmin(a, b); }
CUDA_HOST_INLINE double max(double a, double b) { return ::fmax(a, b); }

namespace cuda_host {

template <class To, class From>
CUDA_HOST_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// f of each of the 4 bytes (N = 8) or 2 halves (N = 16) of two words.
template <int N, class T, class F>
CUDA_HOST_INLINE unsigned by_parts(unsigned a, unsigned b, F f) {
    unsigned out = 0;
    for (int shift = 0; shift < 32; shift += N)
        out |= unsigned(std::make_unsigned_t<T>(f(T(a >> shift), T(b >> shift)))) << shift;
    return out;
}

// The nearest integer, ties to even or toward zero, saturated; 0 for NaN: cvt.rni and cvt.rzi.
template <class Int, class Float>
CUDA_HOST_INLINE Int saturated(Float rounded) {
    constexpr Float below = Float(std::is_signed_v<Int> ? -(Float(1ull << (8 * sizeof(Int) - 1))) : 0);
    constexpr Float above = Float(1ull << (8 * sizeof(Int) - 1)) * (std::is_signed_v<Int> ? 1 : 2);
    if (rounded != rounded) return 0;
    return rounded <= below ? Int(below) : rounded >= above ? Int(~Int(0) ^ Int(below)) : Int(rounded);
}

template <class A, class B>
CUDA_HOST_INLINE unsigned dot4(A a, B b, unsigned sum) {
    using Byte1 = std::conditional_t<std::is_signed_v<A>, int8_t, uint8_t>;
    using Byte2 = std::conditional_t<std::is_signed_v<B>, int8_t, uint8_t>;
    for (int shift = 0; shift < 32; shift += 8)
        sum += unsigned(int(Byte1(unsigned(a) >> shift)) * int(Byte2(unsigned(b) >> shift)));
    return sum;
}

}  // namespace cuda_host

// -- bits --
CUDA_HOST_INLINE float __int_as_float(int x) { return cuda_host::bits_as<float>(x); }
CUDA_HOST_INLINE float __uint_as_float(unsigned x) { return cuda_host::bits_as<float>(x); }
CUDA_HOST_INLINE int __float_as_int(float x) { return cuda_host::bits_as<int>(x); }
CUDA_HOST_INLINE unsigned __float_as_uint(float x) { return cuda_host::bits_as<unsigned>(x); }
CUDA_HOST_INLINE double __longlong_as_double(long long x) { return cuda_host::bits_as<double>(x); }
CUDA_HOST_INLINE long long __double_as_longlong(double x) { return cuda_host::bits_as<long long>(x); }
CUDA_HOST_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CUDA_HOST_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CUDA_HOST_INLINE int __ffs(int x) { return __builtin_ffs(x); }
CUDA_HOST_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
CUDA_HOST_INLINE int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
CUDA_HOST_INLINE int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
CUDA_HOST_INLINE unsigned __brev(unsigned x) {
    x = (x & 0x55555555) << 1 | (x >> 1 & 0x55555555);
    x = (x & 0x33333333) << 2 | (x >> 2 & 0x33333333);
    x = (x & 0x0f0f0f0f) << 4 | (x >> 4 & 0x0f0f0f0f);
    return __builtin_bswap32(x);
}
CUDA_HOST_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> 4 * i, byte = unsigned(bytes >> 8 * (s & 7)) & 255;
        out |= (s & 8 ? (byte >> 7) * 255 : byte) << 8 * i;  // bit 3: the byte's sign, repeated
    }
    return out;
}
CUDA_HOST_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
CUDA_HOST_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
CUDA_HOST_INLINE int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
CUDA_HOST_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

// -- bytes and halves of words --
CUDA_HOST_INLINE int __dp4a(int a, int b, int sum) { return int(cuda_host::dot4(a, b, unsigned(sum))); }
CUDA_HOST_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned sum) { return cuda_host::dot4(a, b, sum); }

#define CUDA_HOST_PARTS(name, bits, T, expression)                                                \
    CUDA_HOST_INLINE unsigned name(unsigned x, unsigned y) {                                      \
        return cuda_host::by_parts<bits, T>(x, y, [](T a, T b) { return T(expression); });        \
    }
CUDA_HOST_PARTS(__vadd4, 8, uint8_t, a + b)
CUDA_HOST_PARTS(__vsub4, 8, uint8_t, a - b)
CUDA_HOST_PARTS(__vaddss4, 8, int8_t, std::clamp(a + b, -128, 127))
CUDA_HOST_PARTS(__vsubss4, 8, int8_t, std::clamp(a - b, -128, 127))
CUDA_HOST_PARTS(__vcmpeq4, 8, uint8_t, a == b ? 255 : 0)
CUDA_HOST_PARTS(__vcmpne4, 8, uint8_t, a != b ? 255 : 0)
CUDA_HOST_PARTS(__vmaxs4, 8, int8_t, a > b ? a : b)
CUDA_HOST_PARTS(__vmins4, 8, int8_t, a < b ? a : b)
CUDA_HOST_PARTS(__vabsdiffu4, 8, uint8_t, a > b ? a - b : b - a)
CUDA_HOST_PARTS(__vadd2, 16, uint16_t, a + b)
CUDA_HOST_PARTS(__vsub2, 16, uint16_t, a - b)
#undef CUDA_HOST_PARTS

// -- floats: what is approximate on the device is exact here --
CUDA_HOST_INLINE float __fadd_rn(float a, float b) { return a + b; }
CUDA_HOST_INLINE float __fsub_rn(float a, float b) { return a - b; }
CUDA_HOST_INLINE float __fmul_rn(float a, float b) { return a * b; }
CUDA_HOST_INLINE float __fdiv_rn(float a, float b) { return a / b; }
CUDA_HOST_INLINE float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
CUDA_HOST_INLINE float __frcp_rn(float a) { return 1 / a; }
CUDA_HOST_INLINE float __fsqrt_rn(float a) { return ::sqrtf(a); }
CUDA_HOST_INLINE float __fdividef(float a, float b) { return a / b; }
CUDA_HOST_INLINE float __saturatef(float a) { return ::fminf(::fmaxf(a, 0), 1); }
CUDA_HOST_INLINE float rsqrtf(float a) { return 1 / ::sqrtf(a); }
CUDA_HOST_INLINE float __frsqrt_rn(float a) { return float(1 / ::sqrt(double(a))); }
CUDA_HOST_INLINE double rsqrt(double a) { return 1 / ::sqrt(a); }
CUDA_HOST_INLINE float __expf(float a) { return ::expf(a); }
CUDA_HOST_INLINE float __exp10f(float a) { return ::powf(10, a); }
CUDA_HOST_INLINE float __logf(float a) { return ::logf(a); }
CUDA_HOST_INLINE float __log2f(float a) { return ::log2f(a); }
CUDA_HOST_INLINE float __log10f(float a) { return ::log10f(a); }
CUDA_HOST_INLINE float __powf(float a, float b) { return ::powf(a, b); }
CUDA_HOST_INLINE float __sinf(float a) { return ::sinf(a); }
CUDA_HOST_INLINE float __cosf(float a) { return ::cosf(a); }
CUDA_HOST_INLINE float __tanhf(float a) { return ::tanhf(a); }
CUDA_HOST_INLINE void __sincosf(float a, float* sine, float* cosine) { *sine = ::sinf(a), *cosine = ::cosf(a); }
CUDA_HOST_INLINE int __float2int_rn(float a) { return cuda_host::saturated<int>(::rintf(a)); }
CUDA_HOST_INLINE int __float2int_rz(float a) { return cuda_host::saturated<int>(::truncf(a)); }
CUDA_HOST_INLINE int __float2int_rd(float a) { return cuda_host::saturated<int>(::floorf(a)); }
CUDA_HOST_INLINE int __float2int_ru(float a) { return cuda_host::saturated<int>(::ceilf(a)); }
CUDA_HOST_INLINE unsigned __float2uint_rn(float a) { return cuda_host::saturated<unsigned>(::rintf(a)); }
CUDA_HOST_INLINE unsigned __float2uint_rz(float a) { return cuda_host::saturated<unsigned>(::truncf(a)); }
CUDA_HOST_INLINE float __int2float_rn(int a) { return float(a); }
CUDA_HOST_INLINE float __uint2float_rn(unsigned a) { return float(a); }
