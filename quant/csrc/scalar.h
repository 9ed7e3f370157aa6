// Single numbers between formats, in portable integer arithmetic; every conversion rounds to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "packed.h"

#if defined(_MSC_VER)
#define ALWAYS_INLINE __forceinline
#define NEVER_INLINE __declspec(noinline)
#else
#define NEVER_INLINE __attribute__((noinline))
#define ALWAYS_INLINE inline __attribute__((always_inline))
#endif

static ALWAYS_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static ALWAYS_INLINE float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static ALWAYS_INLINE float bf16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

static ALWAYS_INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    // rounding must not carry a NaN into infinity
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

static ALWAYS_INLINE float f16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return bits_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    if (magnitude < 0x400) {  // below the normal numbers: magnitude * 2^-24
        return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
    }
    return bits_float(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}

static ALWAYS_INLINE uint16_t float_to_f16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and more
    if (magnitude < 0x38800000) {                                             // below 2^-14
        // adding 0.5 puts the rounding at half's smallest step, 2^-24
        return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000));
    }
    const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - ((127 - 15) << 10)));
}

// 2^(exponent - 127), by its bits; the smallest lies below the normal numbers.
static ALWAYS_INLINE float e8m0_to_float(uint8_t exponent) {
    return bits_float(exponent != 0 ? static_cast<uint32_t>(exponent) << 23 : 1u << 22);
}

static ALWAYS_INLINE float load_as_float(const void* data, int32_t dtype, int64_t index) {
    if (dtype == DTYPE_F32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return dtype == DTYPE_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

static ALWAYS_INLINE void store_from_float(void* data, int32_t dtype, int64_t index, float value) {
    if (dtype == DTYPE_F32) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<uint16_t*>(data)[index] = dtype == DTYPE_BF16 ? float_to_bf16(value) : float_to_f16(value);
    }
}

// `value` as `dtype` holds it.
static ALWAYS_INLINE float rounded(float value, int32_t dtype) {
    if (dtype == DTYPE_F32) return value;
    return dtype == DTYPE_BF16 ? bf16_to_float(float_to_bf16(value)) : f16_to_float(float_to_f16(value));
}

static ALWAYS_INLINE void round_row(float* row, int64_t count, int32_t dtype) {
    if (dtype == DTYPE_BF16) {
        for (int64_t i = 0; i < count; i++) row[i] = bf16_to_float(float_to_bf16(row[i]));
    } else if (dtype == DTYPE_F16) {
        for (int64_t i = 0; i < count; i++) row[i] = f16_to_float(float_to_f16(row[i]));
    }
}

static ALWAYS_INLINE float scale_at(const PackedWeight& weight, int64_t index) {
    if (weight.scale_type == SCALE_F16) return f16_to_float(static_cast<const uint16_t*>(weight.scales)[index]);
    if (weight.scale_type == SCALE_F32) return static_cast<const float*>(weight.scales)[index];
    return e8m0_to_float(static_cast<const uint8_t*>(weight.scales)[index]);
}

static ALWAYS_INLINE int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

static ALWAYS_INLINE bool is_four_bit(const PackedWeight& weight) { return weight.code <= CODE_FP4; }

// Codes whose halves share bytes: byte j of such a group holds code j and code j + interleave / 2.
static ALWAYS_INLINE int64_t interleave_of(const PackedWeight& weight) {
    return weight.block_cols < 64 ? weight.block_cols : 64;
}
