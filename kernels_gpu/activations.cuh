// Rows of activations rounded for products with integer codes: x = scale (128 high + low), 15 bits in two bytes, so that
// an instruction that multiplies bytes loses nothing that weights in blocks had kept.
#pragma once
#include "common.cuh"

constexpr int LARGEST = 127 * 128 + 63;

// Of 32 columns.
struct Codes {
    u32 high[8], low[8];
};
struct Sums {
    float scale;
    int first, second;  // of the rounded values of either half
    int unused;
};
