"""How fast memory is read here, and what is made of it: `minirt bandwidth` measures attention and whole models.

    memory      what this machine's memory, or a card's, moves per second
    synthetic   models and caches of random numbers, of any shape
    caches      those of several policies, in the same memory where they hold the same
    counted     the bytes of a cache that a step's calls touch
    paired      several policies timed in turn
    attention, models, throughput   the three benchmarks; each yields records, one for a policy
    grid        cells of a grid, which a file of rows remembers, so that an interrupted run goes on

Benchmarks run on every device; policies are timed in turn, on the same keys and values, so that a speed-up is one of
the same minutes.
"""

from .memory import available_memory, copy_bandwidth, memory_bandwidth, read_bandwidth

__all__ = ["available_memory", "copy_bandwidth", "memory_bandwidth", "read_bandwidth"]
