// Runs the threads of a block as fibers on one CPU thread, in an order drawn from the launch's seed; blocks run one
// after another, in a drawn order too.
#include "machine.h"

#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <numeric>
#include <utility>

namespace cuda_host {

Machine machine;

namespace {

constexpr size_t STACK_RESERVE = 32 << 10;
constexpr unsigned MOST_POLLS = 1 << 16;  // of a thread without waiting: then it spins

jmp_buf scheduler, fault;

// The life of a fiber: the kernel once for each block.
void live() {
    for (;;) {
        machine.launch.kernel->run(machine.launch.arguments);
        Thread& t = *machine.current;
        t.waits = Waits::forever;
        machine.alive--;
        after_exit(t);
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

void run_block() {
    Machine& m = machine;
    m.block_starts.push_back(++m.now);
    m.barrier_time = m.now++;
    m.alive = m.n_threads;
    m.at_barrier = m.predicates = 0;
    m.ready.clear();
    m.warps.assign((m.n_threads + WARP - 1) / WARP, Warp{});
    for (unsigned i = 0; i < m.n_threads; i++) {
        Thread& t = m.threads[i];
        t.index = {i % m.launch.block.x, i / m.launch.block.x % m.launch.block.y,
                   i / (m.launch.block.x * m.launch.block.y)};
        t.fenced = t.unpublished = false;
        t.copies.clear();
        t.sets = 0;
        std::memset(t.seen, 0, sizeof t.seen);
        m.warps[i / WARP].alive |= 1u << i % WARP;
        make_ready(t);
    }
    memory_begin_block();
    while (m.alive) {
        if (m.ready.empty()) report_stuck();
        size_t drawn = m.draw(m.ready.size());
        std::swap(m.ready[drawn], m.ready.back());
        m.current = &m.threads[m.ready.back()];
        m.ready.pop_back();
        m.now++;
        resume(*m.current);
    }
    m.current = nullptr;
}

// What no check foresaw ends the launch too, not the process; so does a loop without end.
struct Signals {
    static constexpr int caught[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
    struct sigaction before[std::size(caught)];

    static void on_signal(int signal) {
        if (signal == SIGVTALRM) fail("runs for more than %d s", int(machine.launch.seconds));
        fail("%s", strsignal(signal));
    }
    static void set_timer(uint64_t seconds) {
        const itimerval timer = {{0, 0}, {time_t(seconds), 0}};
        setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    }
    void take() {
        struct sigaction ours = {};
        ours.sa_handler = on_signal;
        ours.sa_flags = SA_NODEFER;  // the handler is left by a jump
        for (size_t i = 0; i < std::size(caught); i++) sigaction(caught[i], &ours, &before[i]);
        set_timer(machine.launch.seconds);
    }
    void give_back() {
        set_timer(0);
        for (size_t i = 0; i < std::size(caught); i++) sigaction(caught[i], &before[i], nullptr);
    }
} signals;

void make_stacks(unsigned n) {
    static size_t have = 0;
    if (n > machine.threads.size()) machine.threads.resize(n);
    for (; have < n; have++) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for the stacks of %u threads", n);
        machine.threads[have].stack = static_cast<char*>(stack);
        machine.threads[have].id = uint16_t(have);
    }
}

}  // namespace

void suspend() {
    settle();
    if (!_setjmp(machine.current->context)) _longjmp(scheduler, 1);
}

void make_ready(Thread& t) {
    t.waits = Waits::nothing;
    t.polls = 0;
    machine.warps[t.id / WARP].waiting &= ~(1u << t.id % WARP);
    machine.ready.push_back(t.id);
}

uint64_t Machine::draw(uint64_t below) {  // splitmix64
    uint64_t z = random += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return uint64_t((unsigned __int128)(z ^ z >> 31) * below >> 64);
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.block_index; }
uint3 block_size() { return machine.launch.block; }
uint3 grid_size() { return machine.launch.grid; }
unsigned lane_index() { return machine.current->id % WARP; }

void yield() {
    machine.ready.push_back(machine.current->id);
    suspend();
}

void let_others() {
    machine.now++;
    if (++machine.current->polls > MOST_POLLS)
        fail("spins: %u atomic or volatile accesses without waiting", MOST_POLLS);
    if (machine.draw(4) == 0) yield();
}

void fail(const char* format, ...) {
    char* out = machine.launch.error;
    size_t left = machine.launch.error_bytes;
    if (Thread* t = machine.current) {
        uint3 b = machine.block_index, i = t->index;
        const char* who = "block (%u, %u, %u), thread (%u, %u, %u): ";
        size_t n = size_t(std::snprintf(out, left, who, b.x, b.y, b.z, i.x, i.y, i.z));
        out += n, left -= n;
    }
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(out, left, format, arguments);
    va_end(arguments);
    _longjmp(fault, 1);  // over the callers' destructors: what they hold is lost
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
    if (!_setjmp(fault)) {
        signals.take();
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
