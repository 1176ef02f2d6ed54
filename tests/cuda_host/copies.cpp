// Copies to shared memory that go on while a thread does other things. Each is made at once or when it is waited for,
// by chance: what reads too early, or writes where others still read, shows in one of the two.
#include "machine.h"

#include <cstring>

namespace cuda_host {

namespace {

void make(const Copy& c) {
    access(c.to, c.bytes, c.bytes, true);
    if (c.from) access(c.from, c.bytes, c.bytes, false), std::memcpy(c.to, c.from, c.bytes);
    else std::memset(c.to, 0, c.bytes);
}

}  // namespace

void copy_ahead(void* to, const void* from, size_t bytes) {
    const Copy copy = {to, from, bytes, machine.current->sets};
    if (machine.draw(2)) make(copy);
    else machine.current->copies.push_back(copy);
}

void end_copies() { machine.current->sets++; }

void await_copies(unsigned but) {
    Thread& t = *machine.current;
    size_t made = 0;
    while (made < t.copies.size() && t.copies[made].set + but < t.sets) make(t.copies[made++]);
    t.copies.erase(t.copies.begin(), t.copies.begin() + made);
}

}  // namespace cuda_host
