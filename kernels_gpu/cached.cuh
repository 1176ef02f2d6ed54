// Keys and values that attention reads: those of one KV head, row by row, and the scores they get.
#pragma once
#include "rows.cuh"

constexpr int D = HEAD_DIM;
constexpr int CHUNKS = (D + 7) / 8, PADDED = 8 * CHUNKS;  // of eight numbers, in a row
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
