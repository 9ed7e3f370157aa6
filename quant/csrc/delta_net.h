// A gated delta net (arXiv 2412.06464), as Qwen3-Next has it: one token, and a state instead of a past.
#pragma once
#include <cstdint>

#include "projection.h"

// Queries and keys have num_key_heads heads of key_dim, values num_value_heads of value_dim: consecutive value heads share
// a key head. `mixed` gives queries, keys and values, which go through the convolution.
struct DeltaNet {
    Projection mixed, gate, beta, decay, output;
    RmsNorm norm;             // of a value head, before the gate
    Convolution convolution;  // of 2 * num_key_heads * key_dim + num_value_heads * value_dim channels
    const void* decay_bias;   // [num_value_heads]
    const void* decay_log;    // [num_value_heads]
    int64_t num_key_heads, num_value_heads, key_dim, value_dim;
    int32_t decay_bias_dtype, decay_log_dtype;
    // `mixed` gives each key head's query, key, values and gates, and `beta` each key head's betas and decays; `gate` and
    // `decay` are then without weights.
    int32_t is_grouped;
    int32_t dtype;  // of activations and of the convolution's state
};
