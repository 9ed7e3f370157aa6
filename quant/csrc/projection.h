// The weights of a module that a decode step computes: linear layers, norms and convolutions.
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

// x / rms(x) * (weight + offset) over rows of `width`. `rounds_first`: to the dtype of x before the weight, as Llama
// does, and not only after it.
struct RmsNorm {
    const void* weight;  // null: no norm
    int64_t width;
    float epsilon;
    float offset;
    int32_t weight_dtype;
    int32_t rounds_first;
};

// One filter of kernel_size a channel, over its last tokens, and silu; the bias may be null.
struct Convolution {
    const void* weight;  // [channels, kernel_size], in dtype
    const void* bias;    // [channels], in dtype
    int64_t kernel_size;
    int32_t dtype;  // of activations and of the tokens that are kept, too
};
