// Loads through caches, fences and atomic operations, on shared and global memory.
#pragma once
#include <type_traits>

#include "runtime.h"

namespace cuda_host {

template <class T>
struct Same { using type = T; };  // keeps an argument from taking part in deducing T

template <class T>
T __attribute__((no_sanitize("thread", "undefined"), noinline)) exchanged(T* address, T value) {
    T old = *address;
    *address = value;
    return old;
}

template <class T>
T __attribute__((no_sanitize("thread", "undefined"), noinline)) peek(const T* address) { return *address; }

}  // namespace cuda_host

#define CUDA_HOST_ATOMIC(name, expression)                                                  \
    template <class T>                                                                      \
    CUDA_HOST_INLINE T name(T* address, typename cuda_host::Same<T>::type value) {          \
        cuda_host::atomic_access(address, sizeof(T));                                       \
        T old = cuda_host::peek(address);                                                   \
        cuda_host::exchanged(address, T(expression));                                       \
        cuda_host::let_others();                                                          \
        return old;                                                                         \
    }
CUDA_HOST_ATOMIC(atomicAdd, old + value)
CUDA_HOST_ATOMIC(atomicSub, old - value)
CUDA_HOST_ATOMIC(atomicMin, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicMax, old < value ? value : old)
CUDA_HOST_ATOMIC(atomicExch, value)
CUDA_HOST_ATOMIC(atomicAnd, old & value)
CUDA_HOST_ATOMIC(atomicOr, old | value)
CUDA_HOST_ATOMIC(atomicXor, old ^ value)
CUDA_HOST_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_HOST_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDA_HOST_ATOMIC

template <class T>
CUDA_HOST_INLINE T atomicCAS(T* address, typename cuda_host::Same<T>::type expected,
                             typename cuda_host::Same<T>::type value) {
    cuda_host::atomic_access(address, sizeof(T));
    T old = cuda_host::peek(address);
    if (old == expected) cuda_host::exchanged(address, T(value));
    cuda_host::let_others();
    return old;
}

CUDA_HOST_INLINE void __threadfence() { cuda_host::fence(); }
CUDA_HOST_INLINE void __threadfence_block() {}
CUDA_HOST_INLINE void __threadfence_system() { cuda_host::fence(); }

#define CUDA_HOST_LOAD(name) \
    template <class T>       \
    CUDA_HOST_INLINE T name(const T* address) { \
        cuda_host::access(address, sizeof(T), alignof(T), false); \
        return *address; \
    }
CUDA_HOST_LOAD(__ldg)
CUDA_HOST_LOAD(__ldca)
CUDA_HOST_LOAD(__ldcg)
CUDA_HOST_LOAD(__ldcs)
CUDA_HOST_LOAD(__ldlu)
#undef CUDA_HOST_LOAD
#define CUDA_HOST_STORE(name) \
    template <class T>        \
    CUDA_HOST_INLINE void name(T* address, typename cuda_host::Same<T>::type value) { *address = value; }
CUDA_HOST_STORE(__stcg)
CUDA_HOST_STORE(__stcs)
CUDA_HOST_STORE(__stwt)
#undef CUDA_HOST_STORE
