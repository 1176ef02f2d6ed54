// CUDA C++ as C++17 for g++ and clang++: included before a kernel's source, which then runs on the CPU.
// CUDA_HOST is defined. Not here: what sources guard with __CUDA_ARCH__ (inline PTX), cooperative groups, textures, dynamic parallelism.
#pragma once
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <math.h>

#include "runtime.h"

#define CUDA_HOST 1

// build.py finds kernels by just these attributes.
#define __global__ __attribute__((__used__, noinline))
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// Static also in templates and at namespace scope, allowed with extern, and told from other variables in the library.
#define __shared__ thread_local

#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index())
#define blockDim (::cuda_host::block_size())
#define gridDim (::cuda_host::grid_size())
constexpr int warpSize = 32;

#define CUDA_HOST_INLINE inline __attribute__((always_inline))

#include "arithmetic.h"
#include "atomics.h"
#include "warp.h"

#define memcpy(to, from, bytes) ::cuda_host::copy(to, from, bytes)
#define assert(condition) \
    ((condition) ? (void)0 : ::cuda_host::fail("assert(%s) at %s:%d", #condition, __FILE__, __LINE__))
#define __trap() ::cuda_host::fail("__trap() at %s:%d", __FILE__, __LINE__)

namespace cuda_host {

CUDA_HOST_INLINE void* copy(void* to, const void* from, size_t bytes) {
    access(from, bytes, 1, false);
    access(to, bytes, 1, true);
    return __builtin_memcpy(to, from, bytes);
}

template <class T>
constexpr char kind_of() {
    if (std::is_pointer_v<T>) return std::is_const_v<std::remove_pointer_t<T>> ? 'c' : 'p';
    if (std::is_floating_point_v<T>) return 'f';
    return !std::is_integral_v<T> ? 's' : std::is_signed_v<T> ? 'i' : 'u';
}

template <auto kernel>
struct Described;

template <class... P, void (*kernel)(P...)>
struct Described<kernel> {
    static constexpr Parameter parameters[] = {Parameter{sizeof(P), kind_of<P>()}..., Parameter{0, 0}};

    template <size_t... I>
    __attribute__((no_sanitize("thread", "undefined"))) static void run(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<P*>(arguments[I])...);
    }
    __attribute__((no_sanitize("thread", "undefined"))) static void run(void** arguments) {
        run(arguments, std::index_sequence_for<P...>());
    }
    static constexpr Kernel value = {run, parameters, sizeof...(P)};
};

}  // namespace cuda_host
