// Scores and weights: a score is a logit times log2(e), a weight 2^(score - highest score).
#pragma once
#include "common.cuh"

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr float LOWEST = -1e30f;  // score of nothing: below all others, and finite, so that differences are numbers

DEVICE float power_of_2(float x) {
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}
