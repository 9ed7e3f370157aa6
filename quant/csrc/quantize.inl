// Quantisers, written as loops over whole groups that compilers turn into vectors of the instruction set in force.
// Operation for operation as quant/reference.py, so that the bytes are the same.

template <int kSize>
struct Block {
    float values[kSize];
    uint32_t absmax_bits;  // of the largest magnitude; at or above infinity's if any value is infinite or NaN

    float absmax() const { return bits_float(absmax_bits); }
    bool finite() const { return absmax_bits < 0x7F800000; }
};

// Loads `count` values and fills up with zeros.
template <int kSize>
ALWAYS_INLINE void load_block(const Matrix& source, int64_t row, int64_t col, int64_t count, Block<kSize>& block) {
    const int64_t start = row * source.stride + col;
    if (count < kSize) {
        for (int i = 0; i < kSize; i++) {
            block.values[i] = i < count ? load_as_float(source.data, source.dtype, start + i) : 0.0f;
        }
    } else if (source.dtype == DTYPE_F32) {
        std::memcpy(block.values, static_cast<const float*>(source.data) + start, sizeof(block.values));
    } else {
        const uint16_t* half = static_cast<const uint16_t*>(source.data) + start;
        for (int i = 0; i < kSize; i += V::kLanes) {
            V::store(block.values + i, source.dtype == DTYPE_BF16 ? V::bf16(half + i) : V::f16(half + i));
        }
    }
    uint32_t largest = 0;
    for (int i = 0; i < kSize; i++) {
        const uint32_t bits = float_bits(block.values[i]) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    block.absmax_bits = largest;
}

template <int kSize>
ALWAYS_INLINE void pack_nibbles(const int32_t* codes, uint8_t* out) {
    for (int j = 0; j < kSize / 2; j++) out[j] = static_cast<uint8_t>(codes[j] | codes[j + kSize / 2] << 4);
}

// How many of the bounds lie below each value.
template <int kSize, size_t... kBound>
ALWAYS_INLINE void count_bounds(const float* values, float factor, const float* bounds, int32_t* counts,
                                std::index_sequence<kBound...>) {
    for (int i = 0; i < kSize; i++) {
        const float value = values[i] * factor;
        int32_t count = 0;
        ((count += value > bounds[kBound] ? 1 : 0), ...);
        counts[i] = count;
    }
}

struct Nf4Quantizer {
    static constexpr int kBlock = 64;
    static int block(const Block<kBlock>& block, uint8_t* codes, void* scales, int64_t index) {
        const uint16_t scale = float_to_f16(block.absmax());
        if (scale == 0x7C00) return STATUS_SCALE_OVERFLOW;
        static_cast<uint16_t*>(scales)[index] = scale;
        int32_t counts[kBlock];
        const float absmax = block.absmax();
        count_bounds<kBlock>(block.values, 1.0f / (absmax > 1e-38f ? absmax : 1e-38f), kNf4Bounds, counts,
                             std::make_index_sequence<15>());
        pack_nibbles<kBlock>(counts, codes);
        return STATUS_OK;
    }
};

struct Int4Quantizer {
    static constexpr int kBlock = 64;
    static int block(const Block<kBlock>& block, uint8_t* codes, void* scales, int64_t index) {
        float high = block.values[0], low = block.values[0];
        for (int i = 0; i < kBlock; i++) {
            high = block.values[i] > high ? block.values[i] : high;
            low = block.values[i] < low ? block.values[i] : low;
        }
        const float scale = (high > -low ? high : low) / -8.0f;
        uint16_t scale_f16 = float_to_f16(scale);
        if ((scale_f16 & 0x7FFF) == 0x7C00) return STATUS_SCALE_OVERFLOW;
        if ((scale_f16 & 0x7FFF) == 0) scale_f16 = 0;
        static_cast<uint16_t*>(scales)[index] = scale_f16;
        const float inverse = scale_f16 != 0 ? 1.0f / scale : 0.0f;
        int32_t quantized[kBlock];
        for (int i = 0; i < kBlock; i++) {
            // positive throughout, so that truncation is floor
            const float shifted = block.values[i] * inverse + 8.5f;
            const int32_t code = static_cast<int32_t>(shifted);
            quantized[i] = code > 15 ? 15 : code;
        }
        pack_nibbles<kBlock>(quantized, codes);
        return STATUS_OK;
    }
};

struct Mxfp4Quantizer {
    static constexpr int kBlock = 32;
    static int block(const Block<kBlock>& block, uint8_t* codes, void* scales, int64_t index) {
        // the exponent of the largest, less e2m1's; numbers below the normal ones all end at the smallest scale
        const int32_t exponent = static_cast<int32_t>(block.absmax_bits >> 23) - 2;
        const int32_t scale = exponent > 0 ? exponent : 0;
        static_cast<uint8_t*>(scales)[index] = static_cast<uint8_t>(scale);
        int32_t counts[kBlock];
        count_bounds<kBlock>(block.values, bits_float(static_cast<uint32_t>(254 - scale) << 23), kE2m1Bounds, counts,
                             std::make_index_sequence<14>());
        // ascending: codes 15 to 9 are negative, then 0 to 7
        for (int i = 0; i < kBlock; i++) counts[i] = counts[i] < 7 ? 15 - counts[i] : counts[i] - 7;
        pack_nibbles<kBlock>(counts, codes);
        return STATUS_OK;
    }
};

struct Int8Quantizer {
    static constexpr int kBlock = 64;
    static int block(const Block<kBlock>& block, uint8_t* codes, void* scales, int64_t index) {
        const uint16_t scale_f16 = float_to_f16(block.absmax() / 127.0f);
        if (scale_f16 == 0x7C00) return STATUS_SCALE_OVERFLOW;
        static_cast<uint16_t*>(scales)[index] = scale_f16;
        const float inverse = scale_f16 != 0 ? 1.0f / f16_to_float(scale_f16) : 0.0f;
        for (int i = 0; i < kBlock; i++) {
            float value = block.values[i] * inverse;
            value = value > 127.0f ? 127.0f : value;
            value = value < -127.0f ? -127.0f : value;
            // 1.5 * 2^23 leaves no bits below one, which rounds to nearest even
            const uint32_t rounded = float_bits(value + 12582912.0f);
            codes[i] = static_cast<uint8_t>(rounded);
        }
        return STATUS_OK;
    }
};

template <class Quantizer>
int quantize_grouped_rows(const PackedWeight& weight, const Matrix& source, int64_t row_begin, int64_t row_end) {
    constexpr int kBlock = Quantizer::kBlock;
    const int64_t blocks = ceil_div(weight.cols, kBlock);
    const int64_t block_bytes = is_four_bit(weight) ? kBlock / 2 : kBlock;
    Block<kBlock> block;
    for (int64_t row = row_begin; row < row_end; row++) {
        for (int64_t b = 0; b < blocks; b++) {
            load_block(source, row, b * kBlock, weight.cols - b * kBlock, block);
            if (!block.finite()) return STATUS_NONFINITE;
            uint8_t* codes = weight.codes + row * weight.row_bytes + b * block_bytes;
            const int status = Quantizer::block(block, codes, weight.scales, row * blocks + b);
            if (status != STATUS_OK) return status;
        }
    }
    return STATUS_OK;
}

// Absolute maximum and midpoints, with blocks of any size and fp32 scales: bitsandbytes' formats.
template <int kInterleave>
int quantize_bnb_rows(const PackedWeight& weight, const Matrix& source, int64_t row_begin, int64_t row_end) {
    const int64_t blocks = weight.cols / weight.block_cols;
    Block<kInterleave> block;
    int32_t codes[kInterleave];
    for (int64_t row = row_begin; row < row_end; row++) {
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t begin = b * weight.block_cols, end = begin + weight.block_cols;
            uint32_t largest = 0;
            for (int64_t col = begin; col < end; col += kInterleave) {
                load_block(source, row, col, kInterleave, block);
                largest = block.absmax_bits > largest ? block.absmax_bits : largest;
            }
            if (largest >= 0x7F800000) return STATUS_NONFINITE;
            const float absmax = bits_float(largest);
            static_cast<float*>(weight.scales)[row * blocks + b] = absmax;
            const float inverse = 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
            for (int64_t col = begin; col < end; col += kInterleave) {
                load_block(source, row, col, kInterleave, block);
                count_bounds<kInterleave>(block.values, inverse, weight.code == CODE_NF4 ? kNf4Bounds : kFp4Bounds,
                                          codes, std::make_index_sequence<15>());
                if (weight.code == CODE_FP4) {
                    for (int i = 0; i < kInterleave; i++) codes[i] = kFp4Order[codes[i]];
                }
                pack_nibbles<kInterleave>(codes, weight.codes + row * weight.row_bytes + col / 2);
            }
        }
    }
    return STATUS_OK;
}

// |value| <= 448.
ALWAYS_INLINE uint8_t float_to_e4m3(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    const uint32_t normal = (magnitude + ((7u - 127u) << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20;
    // below 2^-6: adding 2^14 puts the rounding at the smallest step, 2^-9
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 16384.0f) - float_bits(16384.0f);
    return static_cast<uint8_t>((magnitude < (121u << 23) ? subnormal : normal) | (bits >> 24 & 0x80));
}

ALWAYS_INLINE void quantize_fp8_run(const float* values, float scale, int count, uint8_t* codes) {
    for (int i = 0; i < count; i++) {
        float value = values[i] / scale;
        value = value > 448.0f ? 448.0f : value;
        value = value < -448.0f ? -448.0f : value;
        codes[i] = float_to_e4m3(value);
    }
}

// Rows begin at a multiple of the block's.
inline int quantize_fp8_rows(const PackedWeight& weight, const Matrix& source, int64_t row_begin, int64_t row_end) {
    constexpr int kRun = 64;
    const int64_t scale_cols = ceil_div(weight.cols, weight.block_cols);
    Block<kRun> run;
    for (int64_t row = row_begin; row < row_end; row += weight.block_rows) {
        const int64_t last = row + weight.block_rows < row_end ? row + weight.block_rows : row_end;
        for (int64_t b = 0; b < scale_cols; b++) {
            const int64_t begin = b * weight.block_cols;
            const int64_t end = begin + weight.block_cols < weight.cols ? begin + weight.block_cols : weight.cols;
            uint32_t largest = 0;
            for (int64_t r = row; r < last; r++) {
                for (int64_t col = begin; col < end; col += kRun) {
                    load_block(source, r, col, end - col, run);
                    largest = run.absmax_bits > largest ? run.absmax_bits : largest;
                }
            }
            if (largest >= 0x7F800000) return STATUS_NONFINITE;
            const float scale = bits_float(largest) / 448.0f;
            static_cast<float*>(weight.scales)[row / weight.block_rows * scale_cols + b] = scale;
            for (int64_t r = row; r < last; r++) {
                for (int64_t col = begin; col < end; col += kRun) {
                    uint8_t* codes = weight.codes + r * weight.row_bytes + col;
                    const int count = static_cast<int>(end - col < kRun ? end - col : kRun);
                    if (!(scale > 0.0f)) {
                        std::memset(codes, 0, static_cast<size_t>(count));
                        continue;
                    }
                    load_block(source, r, col, end - col, run);
                    if (count == kRun) {
                        quantize_fp8_run(run.values, scale, kRun, codes);
                    } else {
                        quantize_fp8_run(run.values, scale, count, codes);
                    }
                }
            }
        }
    }
    return STATUS_OK;
}

inline int quantize_rows(const PackedWeight& weight, const Matrix& source, int64_t row_begin, int64_t row_end) {
    switch (weight.code) {
        case CODE_INT4: return quantize_grouped_rows<Int4Quantizer>(weight, source, row_begin, row_end);
        case CODE_E2M1: return quantize_grouped_rows<Mxfp4Quantizer>(weight, source, row_begin, row_end);
        case CODE_INT8: return quantize_grouped_rows<Int8Quantizer>(weight, source, row_begin, row_end);
        case CODE_E4M3: return quantize_fp8_rows(weight, source, row_begin, row_end);
        case CODE_NF3: return quantize_nf3_rows(weight, source, row_begin, row_end);
        default: break;
    }
    if (weight.scale_type == SCALE_F16) return quantize_grouped_rows<Nf4Quantizer>(weight, source, row_begin, row_end);
    return weight.block_cols < 64 ? quantize_bnb_rows<32>(weight, source, row_begin, row_end)
                                  : quantize_bnb_rows<64>(weight, source, row_begin, row_end);
}
