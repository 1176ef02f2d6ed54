// Instructions of newer cards that CUDA C++ has no words for; beside each what it does, for older cards and for the tests,
// which so see where lanes read and when copies are waited for.
#pragma once
#include "common.cuh"

// -- pairs of halves ---------------------------------------------------------------------------------------------------

DEVICE u32 minus(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    asm("sub.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
#else
    return two_halves(low_half(a) - low_half(b), high_half(a) - high_half(b));
#endif
}

DEVICE u32 times(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    asm("mul.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
#else
    return two_halves(low_half(a) * low_half(b), high_half(a) * high_half(b));
#endif
}

// a b + c, rounded once.
DEVICE u32 times_plus(u32 a, u32 b, u32 c) {
#ifdef __CUDA_ARCH__
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(a) : "r"(a), "r"(b), "r"(c));
    return a;
#else
    return two_halves(
        low_half(a) * low_half(b) + low_half(c), high_half(a) * high_half(b) + high_half(c)
    );
#endif
}

// -- matrices of a warp ------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of halves in shared memory; lane 8 i + j says where row j of matrix i is. Lane 4 g + t gets of each
// the numbers 2 t and 2 t + 1 of row g or, TURNED, of column g.
template <bool TURNED>
DEVICE void load_matrices(const u16* row, u32 (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    const u32 at = u32(__cvta_generic_to_shared(row));
    if constexpr (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
#else
    const int g = lane_id() / 4, t = lane_id() % 4;
    const auto row_of = [&](int lane) { return reinterpret_cast<const u16*>(__shfl_sync(ALL, u64(row), lane)); };
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (TURNED) {
            const u16 low = row_of(8 * i + 2 * t)[g], high = row_of(8 * i + 2 * t + 1)[g];
            x[i] = u32(low) | u32(high) << 16;
        } else {
            x[i] = *reinterpret_cast<const u32*>(row_of(8 * i + g) + 2 * t);
        }
    }
#endif
}

// -- copies to shared memory that go on while other things are done ----------------------------------------------------

// 16 or 4 bytes; zeros where `is` is not.
template <class T>
DEVICE void copy_ahead(T* to, const T* from, bool is = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const u32 at = u32(__cvta_generic_to_shared(to)), bytes = is ? sizeof(T) : 0;
    if constexpr (sizeof(T) == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#elif defined(CUDA_HOST)
    static_assert(sizeof(T) == 16 || sizeof(T) == 4);
    ::cuda_host::copy_ahead(to, is ? from : nullptr, sizeof(T));
#else
    *to = is ? *from : T{};
#endif
}

// Ends a set of copies of this thread.
DEVICE void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(CUDA_HOST)
    ::cuda_host::end_copies();
#endif
}

// Waits for all sets of copies of this thread but the last `but`.
template <int BUT>
DEVICE void await_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(BUT) : "memory");
#elif defined(CUDA_HOST)
    ::cuda_host::await_copies(BUT);
#endif
}
