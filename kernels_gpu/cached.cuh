// Keys and values that attention reads: those of one KV head, row by row, and the scores they get.
#pragma once
#include "rows.cuh"

constexpr int D = HEAD_DIM;
constexpr int CHUNKS = (D + 7) / 8, PADDED = 8 * CHUNKS;  // of eight numbers, in a row
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -1e30f;  // score of nothing: below all others, and finite, so that differences are numbers

// Rows of a KV head, and where the logits of its query heads go. Scores are logits times log2(e): weights are 2^score.
struct Cached {
    Rows k, v;
    i64 k_first, v_first;  // row of slot 0
    float* scores;         // [heads, slots], or null
    int heads, slots;

    DEVICE Eight<K_STORE> key(int slot, int chunk) const { return fetch<K_STORE, D>(k, k_first + slot, chunk); }
    DEVICE Eight<V_STORE> value(int slot, int chunk) const { return fetch<V_STORE, D>(v, v_first + slot, chunk); }
};

DEVICE float power_of_2(float x) {
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}
