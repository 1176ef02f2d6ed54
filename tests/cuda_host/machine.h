// The state of the runtime: the threads of the running block, time, and what the launch was given.
#pragma once
#include <csetjmp>
#include <vector>

#include "runtime.h"

namespace cuda_host {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10;  // bytes of a fiber

struct Region {  // memory a kernel may touch, sorted by address, without overlaps
    uintptr_t begin, end;
    const char* name;
    enum : uint32_t { GLOBAL, CONSTANT, SHARED } kind;
};

struct Launch {
    const Kernel* kernel;
    void** arguments;
    uint3 grid, block;
    uint64_t seed;
    uint64_t seconds;  // of CPU time, the most it may take
    const Region* regions;
    uint64_t n_regions;
    char* error;  // [error_bytes], the message of a fault; code addresses in it as @hex@, relative to the library
    uint64_t error_bytes;
};

struct Copy {  // to shared memory, that waits; from nowhere: zeros
    void* to;
    const void* from;
    size_t bytes;
    unsigned set;  // of its thread's
};

enum class Waits : uint8_t { nothing, barrier, warp, forever };  // forever: it has exited
enum class Meeting : uint8_t { sync, shuffle, ballot };

struct Thread {
    jmp_buf context;
    char* stack;  // its lowest byte
    bool started = false;
    uint3 index;
    uint16_t id;  // in the block
    Waits waits;
    Place place;  // of the meeting it waits at
    Meeting meeting;
    unsigned mask, source;
    uint64_t value, result;
    uint32_t seen[WARP];  // per lane of its warp: accesses up to this time are ordered before what it does now
    bool fenced, unpublished;  // has called __threadfence; has written to global memory since
    unsigned polls;            // atomic and volatile accesses since it last waited
    std::vector<Copy> copies;
    unsigned sets;  // of copies that it has ended
};

struct Warp {  // its lanes that have not exited, and of those the ones that wait in an operation of the warp
    unsigned alive, waiting;
};

struct Machine {
    Launch launch;
    uint3 block_index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    unsigned n_threads, alive, at_barrier, first_at_barrier, predicates;
    Thread* current;  // null between blocks
    std::vector<uint16_t> ready;
    uint64_t random;
    // Time counts what separates accesses: turns of threads, barriers, atomic operations. Never 0 in a launch.
    uint32_t now, barrier_time;
    std::vector<uint32_t> block_starts;

    uint64_t draw(uint64_t below);
};
extern Machine machine;

// fibers.cpp
void suspend();  // lets others run until the current thread is made ready
void make_ready(Thread&);
void yield();

// meetings.cpp
void after_exit(const Thread&);    // lets those go on who waited for this thread only
[[noreturn]] void report_stuck();  // when all wait

// memory.cpp
void memory_begin();  // of a launch
void memory_begin_block();
void memory_end();
void settle();  // when a thread stops running

}  // namespace cuda_host
