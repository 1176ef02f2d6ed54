// Runs the threads of a block as fibers on one CPU thread, in an order drawn from the launch's seed; blocks run one
// after another, in a drawn order too. Barriers and warp operations check who meets whom; what can never meet is
// reported with the lines where the threads wait.
#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

namespace cuda_host {

Machine machine;

namespace {

constexpr size_t STACK_RESERVE = 32 << 10;
constexpr unsigned MOST_ATOMICS = 1 << 16;  // of a thread without waiting: then it spins

jmp_buf scheduler, fault;

void suspend() {
    settle();
    if (!_setjmp(machine.current->context)) _longjmp(scheduler, 1);
}

void make_ready(Thread& t) {
    t.waits = Waits::nothing;
    t.atomics = 0;
    machine.ready.push_back(t.id);
}

void release_barrier() {
    machine.barrier_time = machine.now++;
    for (unsigned i = 0; i < machine.n_threads; i++) {
        Thread& t = machine.threads[i];
        if (t.waits != Waits::barrier) continue;
        t.result = uint64_t(machine.at_barrier) << 32 | machine.predicates;
        make_ready(t);
    }
    machine.at_barrier = machine.predicates = 0;
}

Thread* lane_of(const Thread& t, unsigned lane) {  // null: no such thread, or it has exited
    unsigned id = t.id / WARP * WARP + lane;
    if (id >= machine.n_threads || machine.threads[id].waits == Waits::forever) return nullptr;
    return &machine.threads[id];
}

bool here(unsigned mask, unsigned lane) { return mask >> lane & 1; }

const char* name(Meeting meeting) {
    return meeting == Meeting::sync ? "__syncwarp" : meeting == Meeting::shuffle ? "a shuffle" : "a vote";
}

// Completes the meeting that t waits at if all lanes of its mask are there.
void meet(Thread& t) {
    const unsigned mask = t.mask, warp = t.id / WARP * WARP;
    for (unsigned lane = 0; lane < WARP; lane++) {
        Thread* u = here(mask, lane) ? lane_of(t, lane) : nullptr;
        if (!u || u == &t) continue;
        if (u->waits != Waits::warp) return;
        if (!here(u->mask, t.id - warp)) return;  // it meets others first
        if (u->mask != mask || u->meeting != t.meeting || u->place.line != t.place.line)
            fail("lanes of a warp meet in different operations: lane %u in %s with mask 0x%08x at %s:%d, lane %u in %s "
                 "with mask 0x%08x at %s:%d", t.id - warp, name(t.meeting), mask, t.place.file, t.place.line, lane,
                 name(u->meeting), u->mask, u->place.file, u->place.line);
    }
    uint32_t seen[WARP] = {};
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < WARP; lane++) {
        Thread* u = here(mask, lane) ? lane_of(t, lane) : nullptr;
        if (!u) continue;
        votes |= (u->value & 1) << lane;
        for (unsigned i = 0; i < WARP; i++) seen[i] = here(mask, i) ? machine.now : std::max(seen[i], u->seen[i]);
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        Thread* u = here(mask, lane) ? lane_of(t, lane) : nullptr;
        if (!u) continue;
        if (t.meeting == Meeting::sync) std::memcpy(u->seen, seen, sizeof seen);
        if (t.meeting == Meeting::ballot) u->result = votes;
        if (t.meeting == Meeting::shuffle) {
            Thread* source = here(mask, u->source) ? lane_of(t, u->source) : nullptr;
            u->result = source ? source->value : 0x7ff7dead7fffdead;  // undefined in CUDA; a NaN in each half here
        }
        make_ready(*u);
    }
    machine.now++;
}

uint64_t wait_at(Meeting meeting, unsigned mask, uint64_t value, unsigned source, Place place) {
    Thread& t = *machine.current;
    if (!here(mask, t.id % WARP))
        fail("%s at %s:%d with mask 0x%08x, which leaves out the calling lane %u", name(meeting), place.file, place.line,
             mask, t.id % WARP);
    t.waits = Waits::warp;
    t.meeting = meeting, t.mask = mask, t.value = value, t.source = source, t.place = place;
    meet(t);
    suspend();
    return t.result;
}

// The life of a fiber: the kernel once for each block.
void live() {
    for (;;) {
        machine.launch.kernel->run(machine.launch.arguments);
        Thread& t = *machine.current;
        t.waits = Waits::forever;
        machine.alive--;
        if (machine.at_barrier && machine.at_barrier == machine.alive) release_barrier();
        for (unsigned lane = 0; lane < WARP; lane++) {
            Thread* u = lane_of(t, lane);
            if (u && u->waits == Waits::warp && here(u->mask, t.id % WARP)) meet(*u);
        }
        suspend();
    }
}

[[gnu::noinline]] void resume(Thread& t) {
    if (_setjmp(scheduler)) return;
    if (t.started) _longjmp(t.context, 1);
    t.started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack = {t.stack, 0, STACK};
    start.uc_link = nullptr;
    makecontext(&start, live, 0);
    setcontext(&start);
}

std::string threads_text(Waits waits, Place place) {
    std::string text;
    for (unsigned first = 0; first < machine.n_threads; first++) {
        auto same = [&](unsigned i) {
            const Thread& t = machine.threads[i];
            return t.waits == waits && (waits == Waits::forever || t.place.line == place.line);
        };
        if (!same(first)) continue;
        unsigned last = first;
        while (last + 1 < machine.n_threads && same(last + 1)) last++;
        text += (text.empty() ? "" : ", ") + std::to_string(first) + (last > first ? "-" + std::to_string(last) : "");
        first = last;
    }
    return text;
}

[[noreturn]] void stuck() {
    std::string text;
    std::vector<std::pair<Waits, int>> told;
    for (unsigned i = 0; i < machine.n_threads; i++) {
        const Thread& t = machine.threads[i];
        std::pair<Waits, int> key(t.waits, t.waits == Waits::forever ? 0 : t.place.line);
        if (std::find(told.begin(), told.end(), key) != told.end()) continue;
        told.push_back(key);
        text += (text.empty() ? "threads " : "; threads ") + threads_text(t.waits, t.place);
        if (t.waits == Waits::forever) text += " have exited";
        else text += std::string(" wait in ") + (t.waits == Waits::barrier ? "__syncthreads" : name(t.meeting)) + " at " +
                     t.place.file + ":" + std::to_string(t.place.line);
    }
    fail("threads wait for others that never come: %s", text.c_str());
}

void run_block() {
    Machine& m = machine;
    m.block_starts.push_back(++m.now);
    m.barrier_time = m.now++;
    m.alive = m.n_threads;
    m.at_barrier = m.predicates = 0;
    m.ready.clear();
    for (unsigned i = 0; i < m.n_threads; i++) {
        Thread& t = m.threads[i];
        t.index = {i % m.launch.block.x, i / m.launch.block.x % m.launch.block.y,
                   i / (m.launch.block.x * m.launch.block.y)};
        t.fenced = t.unpublished = false;
        std::memset(t.seen, 0, sizeof t.seen);
        make_ready(t);
    }
    memory_begin_block();
    while (m.alive) {
        if (m.ready.empty()) stuck();
        size_t drawn = m.draw(m.ready.size());
        std::swap(m.ready[drawn], m.ready.back());
        m.current = &m.threads[m.ready.back()];
        m.ready.pop_back();
        m.now++;
        resume(*m.current);
    }
    m.current = nullptr;
}

// What no check foresaw ends the launch too, not the process.
void on_signal(int signal) { fail("%s", strsignal(signal)); }

struct Signals {
    static constexpr int caught[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction before[std::size(caught)];

    void take() {
        struct sigaction ours = {};
        ours.sa_handler = on_signal;
        ours.sa_flags = SA_NODEFER;  // it is left by a jump
        for (size_t i = 0; i < std::size(caught); i++) sigaction(caught[i], &ours, &before[i]);
    }
    void give_back() {
        for (size_t i = 0; i < std::size(caught); i++) sigaction(caught[i], &before[i], nullptr);
    }
} signals;

void make_stacks(unsigned n) {
    static size_t have = 0;
    if (n > machine.threads.size()) machine.threads.resize(n);
    for (; have < n; have++) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for the stacks of %u threads", n);
        machine.threads[have].stack = static_cast<char*>(stack);
        machine.threads[have].id = uint16_t(have);
    }
}

}  // namespace

uint64_t Machine::draw(uint64_t below) {  // splitmix64
    uint64_t z = random += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (z ^ z >> 31) % below;
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.block_index; }
uint3 block_size() { return machine.launch.block; }
uint3 grid_size() { return machine.launch.grid; }
unsigned lane_index() { return machine.current->id % WARP; }

unsigned barrier(bool predicate, unsigned* arrived, Place place) {
    Thread& t = *machine.current;
    if (!machine.at_barrier) machine.first_at_barrier = t.id;
    const Thread& first = machine.threads[machine.first_at_barrier];
    if (machine.at_barrier && (first.place.line != place.line || std::strcmp(first.place.file, place.file)))
        fail("divergent __syncthreads: this thread is at %s:%d, thread %u at %s:%d", place.file, place.line, first.id,
             first.place.file, first.place.line);
    t.waits = Waits::barrier;
    t.place = place;
    machine.predicates += predicate;
    if (++machine.at_barrier == machine.alive) release_barrier();
    suspend();
    *arrived = unsigned(t.result >> 32);
    return unsigned(t.result);
}

void sync_warp(unsigned mask, Place place) { wait_at(Meeting::sync, mask, 0, 0, place); }
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, Place place) {
    return wait_at(Meeting::shuffle, mask, value, source, place);
}
unsigned ballot(unsigned mask, bool predicate, Place place) {
    return unsigned(wait_at(Meeting::ballot, mask, predicate, 0, place));
}

unsigned live_lanes() {
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < WARP; lane++) lanes |= unsigned(lane_of(*machine.current, lane) != nullptr) << lane;
    return lanes;
}

void yield() {
    machine.ready.push_back(machine.current->id);
    suspend();
}

void after_atomic() {
    machine.now++;
    if (++machine.current->atomics > MOST_ATOMICS) fail("spins: %u atomic operations without waiting", MOST_ATOMICS);
    if (machine.draw(4) == 0) yield();
}

void fail(const char* format, ...) {
    char* out = machine.launch.error;
    size_t left = machine.launch.error_bytes;
    if (Thread* t = machine.current) {
        uint3 b = machine.block_index, i = t->index;
        size_t n = size_t(std::snprintf(out, left, "block (%u, %u, %u), thread (%u, %u, %u): ", b.x, b.y, b.z, i.x, i.y, i.z));
        out += n, left -= n;
    }
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(out, left, format, arguments);
    va_end(arguments);
    _longjmp(fault, 1);
}

extern __thread char dynamic_shared[] asm("cuda_host_dynamic_shared");  // made by build.py
extern "C" void* cuda_host_shared() { return dynamic_shared; }

// Returns 0, or 1 with the message of a fault in launch->error.
extern "C" int cuda_host_launch(const Launch* launch) {
    Machine& m = machine;
    m.launch = *launch;
    m.current = nullptr;
    m.n_threads = launch->block.x * launch->block.y * launch->block.z;
    m.random = launch->seed;
    m.now = 0;
    m.block_starts.clear();
    volatile bool ok = false;
    signals.take();
    if (!_setjmp(fault)) {
        make_stacks(m.n_threads);
        memory_begin();
        const uint3 grid = launch->grid;
        static std::vector<uint64_t> order;  // outlives a fault
        order.resize(uint64_t(grid.x) * grid.y * grid.z);
        std::iota(order.begin(), order.end(), 0);
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[m.draw(i)]);
        for (uint64_t b : order) {
            m.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
            run_block();
        }
        ok = true;
    } else {
        for (Thread& t : m.threads) t.started = false;
    }
    signals.give_back();
    memory_end();
    return !ok;
}

extern "C" void __tsan_func_entry(void*) {
    char* frame = static_cast<char*>(__builtin_frame_address(0));
    if (Thread* t = machine.current; t && frame < t->stack + STACK_RESERVE) fail("stack overflow");
}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

}  // namespace cuda_host
