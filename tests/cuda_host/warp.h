// Barriers of a block and operations of a warp.
#pragma once
#include "runtime.h"

CUDA_HOST_INLINE int __syncthreads_count(int predicate, cuda_host::Place at = {}) {
    unsigned arrived;
    return int(cuda_host::barrier(predicate != 0, &arrived, at));
}
CUDA_HOST_INLINE int __syncthreads_and(int predicate, cuda_host::Place at = {}) {
    unsigned arrived, n = cuda_host::barrier(predicate != 0, &arrived, at);
    return n == arrived;
}
CUDA_HOST_INLINE int __syncthreads_or(int predicate, cuda_host::Place at = {}) {
    return __syncthreads_count(predicate, at) > 0;
}
CUDA_HOST_INLINE void __syncthreads(cuda_host::Place at = {}) { __syncthreads_count(0, at); }
CUDA_HOST_INLINE void __syncwarp(unsigned mask = ~0u, cuda_host::Place at = {}) { cuda_host::sync_warp(mask, at); }

CUDA_HOST_INLINE unsigned __activemask() { return cuda_host::live_lanes(); }
CUDA_HOST_INLINE unsigned __ballot_sync(unsigned mask, int predicate, cuda_host::Place at = {}) {
    return cuda_host::ballot(mask, predicate != 0, at);
}
CUDA_HOST_INLINE int __any_sync(unsigned mask, int predicate, cuda_host::Place at = {}) {
    return cuda_host::ballot(mask, predicate != 0, at) != 0;
}
CUDA_HOST_INLINE int __all_sync(unsigned mask, int predicate, cuda_host::Place at = {}) {
    return cuda_host::ballot(mask, predicate == 0, at) == 0;
}

namespace cuda_host {

template <class T>
CUDA_HOST_INLINE T shuffled(unsigned mask, T value, int source, Place at) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    __builtin_memcpy(&word, &value, sizeof(T));
    word = shuffle(mask, word, unsigned(source), at);
    __builtin_memcpy(&value, &word, sizeof(T));
    return value;
}

// The first lane of the calling lane's group of `width` lanes.
CUDA_HOST_INLINE int first_of(int width, Place at) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle of width %d at %s:%d", width, at.file, at.line);
    return int(lane_index()) & ~(width - 1);
}

}  // namespace cuda_host

// A lane whose source would lie outside its group gets its own value.
template <class T>
CUDA_HOST_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, cuda_host::Place at = {}) {
    return cuda_host::shuffled(mask, value, cuda_host::first_of(width, at) + (source & (width - 1)), at);
}
template <class T>
CUDA_HOST_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, cuda_host::Place at = {}) {
    const int lane = int(cuda_host::lane_index()), source = lane - int(delta);
    return cuda_host::shuffled(mask, value, source < cuda_host::first_of(width, at) ? lane : source, at);
}
template <class T>
CUDA_HOST_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, cuda_host::Place at = {}) {
    const int lane = int(cuda_host::lane_index()), source = lane + int(delta);
    return cuda_host::shuffled(mask, value, source < cuda_host::first_of(width, at) + width ? source : lane, at);
}
template <class T>
CUDA_HOST_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, cuda_host::Place at = {}) {
    const int lane = int(cuda_host::lane_index()), source = lane ^ lanes;
    return cuda_host::shuffled(mask, value, source < cuda_host::first_of(width, at) + width ? source : lane, at);
}
