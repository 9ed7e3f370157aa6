// A Mamba 2 layer (arXiv 2405.21060), as Granite 4 and Nemotron have it: one token, and a state instead of a past.
#pragma once
#include <cstdint>

#include "projection.h"

// `input` gives gates [inner], what goes through the convolution (x [inner], then inputs and outputs of the state,
// [num_groups, state_size] each), and steps [num_heads]; inner is num_heads * head_dim. Consecutive heads share a group.
struct Mamba {
    Projection input, output;
    RmsNorm norm;  // after the gate, over rows of inner / num_groups, with weights of its own for each
    Convolution convolution;
    const void* step_bias;  // [num_heads], as the two below
    const void* decay_log;
    const void* skip;
    int64_t num_heads, head_dim, num_groups, state_size;
    int32_t step_bias_dtype, decay_log_dtype, skip_dtype;
    int32_t dtype;  // of activations and of the convolution's state
};
