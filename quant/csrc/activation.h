// The activations of experts' MLPs; quant/activation.py has the same names and the formula in plain torch.
#pragma once
#include <cstdint>

// x sigmoid(alpha x) is SiLU with alpha 1, quick GELU with 1.702.
enum Function : int32_t {
    FUNCTION_SIGMOID = 0,
    FUNCTION_GELU_TANH = 1,
    FUNCTION_GELU = 2,
    FUNCTION_RELU = 3,
    FUNCTION_RELU_SQUARED = 4
};
// How the first product's rows are split: all gates before all ups, by turns, or gates alone.
enum Gating : int32_t { GATING_HALVES = 0, GATING_INTERLEAVED = 1, GATING_NONE = 2 };

// min(f(min(gate, gate_limit)), activated_limit) * (clamp(up, -up_limit, up_limit) + up_shift); without ups f(gate).
struct Activation {
    int32_t function;
    int32_t gating;
    float alpha;
    float gate_limit;
    float activated_limit;
    float up_limit;
    float up_shift;
};
