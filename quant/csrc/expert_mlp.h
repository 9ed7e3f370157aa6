// One expert of a layer; quant/moe_layer.py describes it.
#pragma once
#include <cstdint>

#include "packed.h"

constexpr int kMaxPieces = 2;

// `up` is one weight or two, whose rows follow one another; biases are null, or one number for each row.
struct ExpertMlp {
    PackedWeight up[kMaxPieces];
    PackedWeight down;
    const void* up_bias;
    const void* down_bias;
    int32_t num_up;
    int32_t bias_dtype;
};
