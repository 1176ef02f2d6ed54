// Where threads wait for each other: barriers of the block and operations of warps. Who meets whom is checked, and what
// can never meet is reported with the lines where the threads wait.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "machine.h"

namespace cuda_host {

namespace {

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

bool here(unsigned mask, unsigned lane) { return lane < WARP && mask >> lane & 1; }
unsigned first_lane(unsigned mask) { return unsigned(__builtin_ctz(mask)); }

const char* name(Meeting meeting) {
    return meeting == Meeting::sync ? "__syncwarp" : meeting == Meeting::shuffle ? "a shuffle" : "a vote";
}

// Completes the meeting that t waits at if all lanes of its mask are there.
void meet(Thread& t) {
    const Warp& warp = machine.warps[t.id / WARP];
    const unsigned mask = t.mask, lanes = mask & warp.alive, own = t.id % WARP;
    if (lanes & ~warp.waiting) return;
    Thread* const threads = &machine.threads[t.id - own];
    for (unsigned left = lanes; left; left &= left - 1) {
        const unsigned lane = first_lane(left);
        const Thread& u = threads[lane];
        if (!here(u.mask, own)) return;  // it meets others first
        if (u.mask != mask || u.meeting != t.meeting || u.place.line != t.place.line)
            fail("lanes of a warp meet in different operations: lane %u in %s with mask 0x%08x at %s:%d, "
                 "lane %u in %s with mask 0x%08x at %s:%d",
                 own, name(t.meeting), mask, t.place.file, t.place.line,
                 lane, name(u.meeting), u.mask, u.place.file, u.place.line);
    }
    if (t.meeting == Meeting::sync) {
        uint32_t seen[WARP] = {};
        for (unsigned left = lanes; left; left &= left - 1)
            for (unsigned i = 0; i < WARP; i++) seen[i] = std::max(seen[i], threads[first_lane(left)].seen[i]);
        for (unsigned left = lanes; left; left &= left - 1) seen[first_lane(left)] = machine.now;
        for (unsigned left = lanes; left; left &= left - 1)
            std::memcpy(threads[first_lane(left)].seen, seen, sizeof seen);
    } else if (t.meeting == Meeting::shuffle) {
        for (unsigned left = lanes; left; left &= left - 1) {
            Thread& u = threads[first_lane(left)];
            // Of a lane that is not here undefined in CUDA; a NaN in each half here.
            u.result = here(lanes, u.source) ? threads[u.source].value : 0x7ff7dead7fffdead;
        }
    } else {
        uint64_t votes = 0;
        for (unsigned left = lanes; left; left &= left - 1)
            votes |= (threads[first_lane(left)].value & 1) << first_lane(left);
        for (unsigned left = lanes; left; left &= left - 1) threads[first_lane(left)].result = votes;
    }
    for (unsigned left = lanes; left; left &= left - 1) make_ready(threads[first_lane(left)]);
    machine.now++;
}

uint64_t wait_at(Meeting meeting, unsigned mask, uint64_t value, unsigned source, Place place) {
    Thread& t = *machine.current;
    if (!here(mask, t.id % WARP))
        fail("%s at %s:%d with mask 0x%08x, which leaves out the calling lane %u",
             name(meeting), place.file, place.line, mask, t.id % WARP);
    t.waits = Waits::warp;
    machine.warps[t.id / WARP].waiting |= 1u << t.id % WARP;
    t.meeting = meeting, t.mask = mask, t.value = value, t.source = source, t.place = place;
    meet(t);
    suspend();
    return t.result;
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
        text += (text.empty() ? "" : ", ") + std::to_string(first);
        if (last > first) text += "-" + std::to_string(last);
        first = last;
    }
    return text;
}

}  // namespace

void after_exit(const Thread& t) {
    if (machine.at_barrier && machine.at_barrier == machine.alive) release_barrier();
    Warp& warp = machine.warps[t.id / WARP];
    warp.alive &= ~(1u << t.id % WARP);
    for (unsigned left = warp.waiting; left; left &= left - 1) {
        Thread& u = machine.threads[t.id / WARP * WARP + first_lane(left)];
        if (u.waits == Waits::warp && here(u.mask, t.id % WARP)) meet(u);
    }
}

void report_stuck() {
    std::string text;
    std::vector<std::pair<Waits, int>> told;
    for (unsigned i = 0; i < machine.n_threads; i++) {
        const Thread& t = machine.threads[i];
        std::pair<Waits, int> key(t.waits, t.waits == Waits::forever ? 0 : t.place.line);
        if (std::find(told.begin(), told.end(), key) != told.end()) continue;
        told.push_back(key);
        text += (text.empty() ? "threads " : "; threads ") + threads_text(t.waits, t.place);
        const char* where = t.waits == Waits::barrier ? "__syncthreads" : name(t.meeting);
        text += t.waits == Waits::forever ? " have exited"
                : std::string(" wait in ") + where + " at " + t.place.file + ":" + std::to_string(t.place.line);
    }
    fail("threads wait for others that never come: %s", text.c_str());
}

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

unsigned live_lanes() { return machine.warps[machine.current->id / WARP].alive; }

}  // namespace cuda_host
