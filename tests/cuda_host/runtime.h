// What kernels call in the runtime: their coordinates, and the points where threads meet.
#pragma once
#include <cstddef>
#include <cstdint>

#include "vectors.h"

namespace cuda_host {

struct Place {  // in a source; as a default argument, that of the call
    const char* file = __builtin_FILE();
    int line = __builtin_LINE();
};

// A fiber is one thread of one block from its first instruction to its last, so these are constants to it.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] uint3 block_size();
[[gnu::const]] uint3 grid_size();
[[gnu::const]] unsigned lane_index();

// __syncthreads: waits for all threads of the block that have not exited; returns how many came with `predicate`,
// and in `arrived` how many came.
unsigned barrier(bool predicate, unsigned* arrived, Place);

// Each waits for all lanes of `mask` that have not exited; sync_warp orders memory as a barrier does, others do not.
void sync_warp(unsigned mask, Place);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, Place);
unsigned ballot(unsigned mask, bool predicate, Place);
unsigned live_lanes();

// Of cp.async: from null, zeros are copied.
void copy_ahead(void* to, const void* from, size_t bytes);
void end_copies();
void await_copies(unsigned but);

void fence();                             // __threadfence
void atomic_access(void*, size_t bytes);  // checks an atomic operation
void let_others();                        // lets others run now and then, so that a thread may poll
// Checks a load or store that the compiler does not announce, or not with its alignment.
void access(const void*, size_t bytes, size_t alignment, bool write);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A kernel as Python sees it.
struct Parameter {
    uint32_t bytes;
    char kind;  // p pointer, c pointer to const, i signed, u unsigned, f float, s other
};
struct Kernel {
    void (*run)(void** arguments);
    const Parameter* parameters;
    uint32_t count;
};

}  // namespace cuda_host
