// A network that was fitted to one model's routing, beside the recall of like tokens: cache/learned.py.
#pragma once
#include "policy.h"

// Arrays of the caller, read only while the policy is made; layer after layer.
struct LearnedWeights {
    int32_t width;
    const float* start;   // [width]
    const float* now;     // [experts of all layers][width]
    const float* before;  // [experts of all layers][width]
    const float* out;     // of each layer [width][experts]
    const float* bias;    // [experts of all layers]
};

std::unique_ptr<Policy> make_learned(const Sizes& num_experts, const LearnedWeights& weights);
