// Every load and store of a kernel comes here first: g++ -fsanitize=thread puts a call before each, and this file
// stands in for libtsan. An access must lie in one region of memory, be aligned, read no shared memory that nobody
// wrote in this block, and be ordered with the accesses of other threads to the same bytes:
//  - threads of a block are ordered by __syncthreads, lanes of a warp by __syncwarp too, not by shuffles and votes;
//  - blocks are ordered only by __threadfence and an atomic operation, then an atomic operation on the same address
//    (the pattern "the last block sums up");
//  - writes of the same value are no race, nor are atomic accesses among themselves (and volatile ones, in global
//    memory, where they poll flags).
// Not seen: an index beyond a thread's own array reached through a pointer, a fence that is missing after the atomic
// operation, and shared arrays that the compiler happens to align better than their declaration asks.
#include "machine.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>

namespace cuda_host {

namespace {

struct Record {
    uint32_t when;  // 0: never
    uint32_t pc;    // in the library
    uint16_t thread;
    bool atomic;
};

struct Cell {  // the last accesses to a unit of memory; reads and atomic changes by two threads, the latest first
    Record write, reads[2], atomics[2];
};

void remember(Record (&last)[2], const Record& record) {
    if (last[0].thread != record.thread) last[1] = last[0];
    last[0] = record;
}

struct Shadow {
    Cell* cells;
    size_t bytes;
    unsigned unit;  // bytes a cell stands for: 4 until something smaller is accessed, then 1
};

enum Access : unsigned { READ = 0, WRITE = 1, ATOMIC = 2, VOLATILE = 4 };

using Times = std::unordered_map<uint32_t, uint32_t>;  // block, in the order of running -> time

std::vector<Shadow> shadows;  // one per region
size_t last_region;
uintptr_t library;
Times acquired;                                      // what the running block may see of other blocks: all up to a time
std::unordered_map<uintptr_t, Times> published;      // by an atomic operation at an address, after __threadfence

struct {  // a write beside another thread's, harmless if it changes nothing: known once it has happened
    char* address = nullptr;
    size_t bytes;
    char before[64];
    std::string race;
} doubtful;

std::string bytes_text(size_t n) { return std::to_string(n) + (n == 1 ? " byte" : " bytes"); }

std::string address_text(uintptr_t address) {
    const Launch& l = machine.launch;
    std::string text = "no memory of this launch";
    uintptr_t nearest = 1 << 16;
    for (size_t i = 0; i < l.n_regions; i++) {
        const Region& r = l.regions[i];
        std::string of = std::string(r.name) + " (" + bytes_text(r.end - r.begin) + ")";
        if (r.begin <= address && address < r.end) return "byte " + std::to_string(address - r.begin) + " of " + of;
        uintptr_t distance = address < r.begin ? r.begin - address : address - r.end;
        if (distance >= nearest) continue;
        nearest = distance;
        text = bytes_text(distance) + (address < r.begin ? " before " : " past the end of ") + of;
    }
    return text;
}

std::string place_text(uint32_t pc) {
    char text[24];
    std::snprintf(text, sizeof text, "@%x@", pc);
    return text;
}

std::string access_text(unsigned access, uintptr_t address, size_t bytes, uint32_t pc) {
    const char* verb = access & ATOMIC ? "atomically changes " : access & WRITE ? "writes " : "reads ";
    return verb + bytes_text(bytes) + " at " + place_text(pc) + ", " + address_text(address);
}

Shadow& shadow_of(size_t region, bool fine) {
    Shadow& s = shadows[region];
    const Region& r = machine.launch.regions[region];
    const unsigned unit = fine ? 1 : 4;
    if (s.cells && s.unit <= unit) return s;
    const size_t n = (r.end - (r.begin & ~uintptr_t(3))) / unit + 1;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;  // pages nobody touches cost nothing
    void* map = mmap(nullptr, n * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (map == MAP_FAILED) fail("no memory to watch %s", r.name);
    Shadow fresh{static_cast<Cell*>(map), n * sizeof(Cell), unit};
    if (s.cells) {
        for (size_t i = 0; i < n; i++) fresh.cells[i] = s.cells[i / 4];
        munmap(s.cells, s.bytes);
    }
    return s = fresh;
}

// Whether what was recorded happened before what the current thread does now, or needs no order.
bool ordered(const Record& r, bool atomic, bool shared) {
    const Machine& m = machine;
    if (r.when == 0 || (r.atomic && atomic)) return true;
    if (r.when < m.block_starts.back()) {
        if (shared) return true;  // of another block, which had its own
        auto next = std::upper_bound(m.block_starts.begin(), m.block_starts.end(), r.when);
        auto seen = acquired.find(uint32_t(next - m.block_starts.begin() - 1));
        return seen != acquired.end() && r.when <= seen->second;
    }
    const Thread& t = *m.current;
    if (r.thread == t.id || r.when <= m.barrier_time) return true;
    return r.thread / WARP == t.id / WARP && r.when <= t.seen[r.thread % WARP];
}

std::string race_text(const Record& other, const char* did, const std::string& access) {
    bool other_block = other.when < machine.block_starts.back();
    std::string who = other_block ? "a thread of another block" : "thread " + std::to_string(other.thread);
    return "race: " + access + ", which " + who + " " + did + " at " +
           place_text(other.pc) + (other_block ? " without __threadfence and an atomic operation between"
                                               : " with no barrier between");
}

size_t region_of(uintptr_t address, size_t bytes) {  // n_regions if it lies in none
    const Launch& l = machine.launch;
    auto holds = [&](size_t i) {
        return i < l.n_regions && l.regions[i].begin <= address && address < l.regions[i].end;
    };
    if (!holds(last_region)) {
        auto before = [](uintptr_t a, const Region& r) { return a < r.end; };
        last_region = size_t(std::upper_bound(l.regions, l.regions + l.n_regions, address, before) - l.regions);
    }
    return holds(last_region) && l.regions[last_region].end - address >= bytes ? last_region : l.n_regions;
}

void check(uintptr_t address, size_t bytes, unsigned access, uint32_t pc) {
    Machine& m = machine;
    auto text = [&] { return access_text(access, address, bytes, pc); };
    const size_t number = region_of(address, bytes);
    if (number == m.launch.n_regions) fail("out of bounds: %s", text().c_str());
    const Region& region = m.launch.regions[number];
    const bool shared = region.kind == Region::SHARED, write = access & WRITE;
    const bool atomic = access & ATOMIC || (access & VOLATILE && !shared);
    if (region.kind == Region::CONSTANT) {  // races with nobody
        if (write) fail("constant memory: %s", text().c_str());
        return;
    }
    if (!shared && write && !atomic) m.current->unpublished = true;

    Shadow& s = shadow_of(number, (address | bytes) & 3);
    const Record record{m.now, pc, m.current->id, atomic};
    Cell* const first = s.cells + (address - (region.begin & ~uintptr_t(3))) / s.unit;
    for (Cell* c = first; c < first + (bytes + s.unit - 1) / s.unit; c++) {
        const uint32_t written = std::max(c->write.when, c->atomics[0].when);
        if (shared && written < m.block_starts.back() && (!write || atomic))
            fail("uninitialised: %s, which nobody wrote in this block", text().c_str());
        auto check_order = [&](const Record& other, const char* did) {
            if (ordered(other, atomic, shared)) return;
            std::string race = race_text(other, did, text());
            if (!write || atomic || &other != &c->write || bytes > sizeof doubtful.before) fail("%s", race.c_str());
            doubtful.address = reinterpret_cast<char*>(address);
            doubtful.bytes = bytes;
            std::memcpy(doubtful.before, doubtful.address, bytes);
            doubtful.race = race;
        };
        check_order(c->write, "wrote");
        for (const Record& r : c->atomics) check_order(r, "changed atomically");
        for (const Record& r : c->reads)
            if (write) check_order(r, "read");
        if (write && atomic) remember(c->atomics, record);
        else if (write) c->write = record;
        else remember(c->reads, record);
    }
}

uint32_t in_library(void* return_address) {  // of the call before it
    return uint32_t(reinterpret_cast<uintptr_t>(return_address) - library - 1);
}

void on_access(const void* p, size_t bytes, unsigned access, void* return_address) {
    Thread* t = machine.current;
    const uintptr_t address = reinterpret_cast<uintptr_t>(p), stack = t ? reinterpret_cast<uintptr_t>(t->stack) : 0;
    if (!t || address - stack < STACK || bytes == 0) return;
    settle();
    if (access & VOLATILE) let_others();
    check(address, bytes, access, in_library(return_address));
}

void check_alignment(const void* p, size_t bytes, size_t alignment, unsigned access, void* return_address) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address % alignment == 0) return;
    fail("misaligned: %s", access_text(access, address, bytes, in_library(return_address)).c_str());
}

void aligned(const void* p, size_t bytes, unsigned access, void* return_address) {
    check_alignment(p, bytes, bytes, access, return_address);
    on_access(p, bytes, access, return_address);
}

}  // namespace

void settle() {
    if (!doubtful.address) return;
    bool harmless = !std::memcmp(doubtful.before, doubtful.address, doubtful.bytes);
    doubtful.address = nullptr;
    if (!harmless) fail("%s", doubtful.race.c_str());
}

void memory_begin() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&memory_begin), &info);
    library = reinterpret_cast<uintptr_t>(info.dli_fbase);
    shadows.assign(machine.launch.n_regions, Shadow{});
    published.clear();
    doubtful.address = nullptr;
}

void memory_begin_block() {
    acquired.clear();
    for (size_t i = 0; i < machine.launch.n_regions; i++) {
        const Region& r = machine.launch.regions[i];
        if (r.kind != Region::SHARED) continue;
        std::memset(reinterpret_cast<void*>(r.begin), 0xff, r.end - r.begin);  // NaN in every type of float
    }
}

void memory_end() {
    for (Shadow& s : shadows)
        if (s.cells) munmap(s.cells, s.bytes);
    shadows.clear();
}

void fence() {
    machine.current->fenced = true;
    machine.current->unpublished = false;
}

void access(const void* p, size_t bytes, size_t alignment, bool write) {
    check_alignment(p, bytes, alignment, write, __builtin_return_address(0));
    on_access(p, bytes, write, __builtin_return_address(0));
}

void atomic_access(void* p, size_t bytes) {
    aligned(p, bytes, WRITE | ATOMIC, __builtin_return_address(0));
    Times& times = published[reinterpret_cast<uintptr_t>(p)];
    for (auto [block, time] : times) acquired[block] = std::max(acquired[block], time);
    if (!machine.current->fenced || machine.current->unpublished) return;
    times = acquired;
    times[uint32_t(machine.block_starts.size() - 1)] = machine.now;
}

#define CUDA_HOST_CALL(name, check, n, access) \
    extern "C" void __tsan_##name##n(void* p) { check(p, n, access, __builtin_return_address(0)); }
#define CUDA_HOST_CALLS(n)                                     \
    CUDA_HOST_CALL(read, aligned, n, READ)                     \
    CUDA_HOST_CALL(write, aligned, n, WRITE)                   \
    CUDA_HOST_CALL(volatile_read, aligned, n, READ | VOLATILE) \
    CUDA_HOST_CALL(volatile_write, aligned, n, WRITE | VOLATILE)
CUDA_HOST_CALLS(1)
CUDA_HOST_CALLS(2)
CUDA_HOST_CALLS(4)
CUDA_HOST_CALLS(8)
CUDA_HOST_CALLS(16)

// Of packed structures, and of those that are copied by parts.
#define CUDA_HOST_PACKED(n)                          \
    CUDA_HOST_CALL(unaligned_read, on_access, n, READ) \
    CUDA_HOST_CALL(unaligned_write, on_access, n, WRITE)
CUDA_HOST_PACKED(2)
CUDA_HOST_PACKED(4)
CUDA_HOST_PACKED(8)
CUDA_HOST_PACKED(16)

// clang++'s way to copy and fill.
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t n) {
    on_access(from, n, READ, __builtin_return_address(0));
    on_access(to, n, WRITE, __builtin_return_address(0));
    return std::memcpy(to, from, n);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t n) {
    on_access(from, n, READ, __builtin_return_address(0));
    on_access(to, n, WRITE, __builtin_return_address(0));
    return std::memmove(to, from, n);
}
extern "C" void* __tsan_memset(void* to, int value, size_t n) {
    on_access(to, n, WRITE, __builtin_return_address(0));
    return std::memset(to, value, n);
}

extern "C" void __tsan_read_range(void* p, size_t n) { on_access(p, n, READ, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { on_access(p, n, WRITE, __builtin_return_address(0)); }

}  // namespace cuda_host
