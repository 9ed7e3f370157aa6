// The dense part of a decode step: the interface between step_api.cpp and the kernels of each instruction set.
#pragma once
#include <cstdint>

#include "packed.h"

// A weight [rows, cols] kept in a float dtype, its rows one after the other.
struct RawWeight {
    const void* data;
    int64_t rows;
    int64_t cols;
    int32_t dtype;
};

// A linear layer: `raw` where its data is not null, else `packed`. The bias may be null.
struct Projection {
    PackedWeight packed;
    RawWeight raw;
    const void* bias;
    int32_t bias_dtype;
};

// x / rms(x) * weight over rows of `width`. `rounds_first`: to the dtype of x before the weight, as Llama does, and not
// only after it.
struct RmsNorm {
    const void* weight;  // null: no norm
    int64_t width;
    float epsilon;
    int32_t weight_dtype;
    int32_t rounds_first;
};

// One attention module. Keys and values of a head lie one after the other, [num_kv_heads, capacity, head_dim].
struct Attention {
    Projection query, key, value, output;
    RmsNorm query_norm, key_norm;
    const void* sinks;  // [num_heads]: a logit that takes its share and gives nothing, or null
    int64_t num_heads, num_kv_heads, head_dim;
    float scaling;
    int32_t sinks_dtype;
    int32_t dtype;  // of activations, keys and values
};

struct StepKernels {
    // rows [row_begin, row_end) of out [num_tokens, rows] = x [num_tokens, cols] in fp32 @ weight.T, in fp32
    void (*raw_rows)(const RawWeight&, const float* x, int64_t num_tokens, int64_t row_begin, int64_t row_end,
                     float* out);
    // one row in fp32, in place; rounded where a module in `dtype` rounds
    void (*rms_norm)(const RmsNorm&, float* x, int32_t dtype);
    // One key-value head and the query heads that share it, over positions [begin, end): `query` and `out`
    // [group, head_dim] in fp32, `scores` room for [group, end - begin].
    void (*attend)(const Attention&, int64_t kv_head, const float* query, const void* keys, const void* values,
                   int64_t begin, int64_t end, float* scores, float* out);
};
