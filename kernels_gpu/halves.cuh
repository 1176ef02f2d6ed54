// Weights as halves, for products on tensor cores.
//
// Halves reach from 6e-8 to 65504: a power of two is taken out of each row, of activations and of weights, so that what
// is small beside the largest of its row is rounded first. Weights that are halves stay as they are.
#pragma once
#ifdef LOW_BITS
#include "formats.cuh"
using Given = Weights;
#else
#include "numbers.cuh"
using Given = const Number*;
#endif

// The power of two that is taken out of a row, by the bits of its largest magnitude.
DEVICE float power_of(u32 largest) {
#ifdef NUMBER
    if (NUMBER == KIND_F16) return 1.0f;
#endif
    return largest ? exp2f(fmaxf(floorf(log2f(__int_as_float(int(largest)))) - 7.0f, -120.0f)) : 1.0f;
}
