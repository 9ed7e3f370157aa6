// The numbers of the three-bit format nf3: see quant/three_bit.py for the bytes.
#pragma once
#include <cstdint>

#include "packed.h"
#include "scalar.h"

constexpr int kNf3Group = 32, kNf3Unit = 64, kNf3UnitBytes = 24, kNf3Tables = 16;
constexpr float kNf3Factor = 1.0f / 128;

inline int64_t nf3_units(const PackedWeight& weight) { return ceil_div(weight.cols, kNf3Unit); }

// Of few-row products, see linear_integers.inl.
inline bool nf3_uses_integers(int32_t x_dtype) { return x_dtype != DTYPE_F32; }
