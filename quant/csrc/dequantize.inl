// Codes back to floats: code x scale in fp32, rounded once.

ALWAYS_INLINE void store_lanes(void* out, int32_t dtype, int64_t index, V::Floats values) {
    if (dtype == DTYPE_F32) {
        V::store(static_cast<float*>(out) + index, values);
    } else if (dtype == DTYPE_BF16) {
        V::store_bf16(static_cast<uint16_t*>(out) + index, values);
    } else {
        V::store_f16(static_cast<uint16_t*>(out) + index, values);
    }
}

// kHalf codes low and kHalf codes high from kHalf bytes, all of one scale.
template <int kHalf>
ALWAYS_INLINE void dequantize_group(const uint8_t* codes, const V::Table& table, float scale, void* out, int32_t dtype,
                                    int64_t index) {
    const V::Floats scales = V::set1(scale);
    for (int j = 0; j < kHalf; j += V::kLanes) {
        const V::Words bytes = V::bytes(codes + j);
        store_lanes(out, dtype, index + j, V::mul(V::lookup(table, bytes), scales));
        store_lanes(out, dtype, index + kHalf + j, V::mul(V::lookup(table, V::template shift_right<4>(bytes)), scales));
    }
}

// The same to bf16, from a table of the products of each code with the scale.
template <int kHalf, class W>
ALWAYS_INLINE void dequantize_words(const uint8_t* codes, const typename W::Table& table,
                                    const typename W::Floats& scale, uint16_t* out) {
    const typename W::Words words = W::word_table(W::mul(table, scale));
    if constexpr (kHalf == 32) {
        W::store_words(out, out + 32, words, codes);
    } else {
        W::store_words(out, words, codes);
    }
}

template <class W>
ALWAYS_INLINE typename W::Floats spread_scale(const PackedWeight& weight, int64_t index) {
    if (weight.scale_type == SCALE_F16) return W::set1_f16(static_cast<const uint16_t*>(weight.scales)[index]);
    return W::set1(scale_at(weight, index));
}

// Whole groups of a region to bf16.
template <int kInterleave, class W>
void dequantize_four_bit_words(const PackedWeight& weight, const Region& region, const Matrix& out) {
    const typename W::Table table = W::table(kValues[weight.code]);
    const int64_t scale_cols = ceil_div(weight.cols, weight.block_cols);
    const int64_t first_block = region.col_begin / weight.block_cols;
    const int64_t first_end = (first_block + 1) * weight.block_cols;
    for (int64_t row = region.row_begin; row < region.row_end; row++) {
        const uint8_t* codes = weight.codes + row * weight.row_bytes + region.col_begin / 2;
        uint16_t* to = static_cast<uint16_t*>(out.data) + (row - region.row_begin) * out.stride;
        int64_t scale_index = row * scale_cols + first_block;
        int64_t block_end = first_end;
        for (int64_t begin = region.col_begin, end; begin < region.col_end; begin = end) {
            end = block_end < region.col_end ? block_end : region.col_end;
            block_end += weight.block_cols;
            const typename W::Floats scale = spread_scale<W>(weight, scale_index++);
            for (int64_t col = begin; col < end; col += kInterleave) {
                dequantize_words<kInterleave / 2, W>(codes, table, scale, to);
                codes += kInterleave / 2;
                to += kInterleave;
            }
        }
    }
}

template <int kInterleave, class W>
void dequantize_four_bit(const PackedWeight& weight, const Region& region, const Matrix& out) {
    if constexpr (W::kLooksUpWords) {
        if (out.dtype == DTYPE_BF16 && (region.col_end - region.col_begin) % kInterleave == 0) {
            return dequantize_four_bit_words<kInterleave, W>(weight, region, out);
        }
    }
    const V::Table table = V::table(kValues[weight.code]);
    const int64_t scale_cols = ceil_div(weight.cols, weight.block_cols);
    for (int64_t row = region.row_begin; row < region.row_end; row++) {
        const uint8_t* codes = weight.codes + row * weight.row_bytes;
        const int64_t start = (row - region.row_begin) * out.stride - region.col_begin;
        for (int64_t col = region.col_begin; col < region.col_end; col += kInterleave) {
            const float scale = scale_at(weight, row * scale_cols + col / weight.block_cols);
            if (region.col_end - col >= kInterleave) {
                dequantize_group<kInterleave / 2>(codes + col / 2, table, scale, out.data, out.dtype, start + col);
            } else {
                float last[kInterleave];
                dequantize_group<kInterleave / 2>(codes + col / 2, table, scale, last, DTYPE_F32, 0);
                for (int64_t i = 0; i < region.col_end - col; i++) {
                    store_from_float(out.data, out.dtype, start + col + i, last[i]);
                }
            }
        }
    }
}

// e4m3 numbers come from V scaled by 2^-8; undoing that first is exact.
struct Int8Codes {
    static ALWAYS_INLINE V::Floats load(const uint8_t* codes) { return V::int8(codes); }
    static constexpr float kFactor = 1.0f;
};
struct E4m3Codes {
    static ALWAYS_INLINE V::Floats load(const uint8_t* codes) { return V::e4m3(codes); }
    static constexpr float kFactor = 256.0f;
};

template <class Codes>
ALWAYS_INLINE V::Floats eight_bit_lanes(const uint8_t* codes, V::Floats scale) {
    const V::Floats values = Codes::load(codes);
    if constexpr (Codes::kFactor == 1.0f) return V::mul(values, scale);
    return V::mul(V::mul(values, V::set1(Codes::kFactor)), scale);
}

template <class Codes, class W>
void dequantize_eight_bit(const PackedWeight& weight, const Region& region, const Matrix& out) {
    const int64_t scale_cols = ceil_div(weight.cols, weight.block_cols);
    const int64_t first_block = region.col_begin / weight.block_cols;
    const int64_t first_end = (first_block + 1) * weight.block_cols;
    for (int64_t row = region.row_begin; row < region.row_end; row++) {
        const uint8_t* codes = weight.codes + row * weight.row_bytes;
        const int64_t start = (row - region.row_begin) * out.stride - region.col_begin;
        int64_t scale_index = row / weight.block_rows * scale_cols + first_block - 1;
        int64_t block_end = first_end;
        for (int64_t begin = region.col_begin, end; begin < region.col_end; begin = end) {
            end = block_end < region.col_end ? block_end : region.col_end;
            block_end += weight.block_cols;
            scale_index++;
            V::Floats scale;
            int64_t col = begin;
            if constexpr (W::kLooksUpWords) {
                scale = spread_scale<W>(weight, scale_index);
                uint16_t* to = static_cast<uint16_t*>(out.data) + start;
                for (; out.dtype == DTYPE_BF16 && col + 2 * W::kLanes <= end; col += 2 * W::kLanes) {
                    W::store_bf16(to + col, eight_bit_lanes<Codes>(codes + col, scale),
                                  eight_bit_lanes<Codes>(codes + col + W::kLanes, scale));
                }
            } else {
                scale = V::set1(scale_at(weight, scale_index));
            }
            for (; col + V::kLanes <= end; col += V::kLanes) {
                store_lanes(out.data, out.dtype, start + col, eight_bit_lanes<Codes>(codes + col, scale));
            }
            if (col < end) {
                uint8_t last_codes[V::kLanes] = {};
                float last[V::kLanes];
                std::memcpy(last_codes, codes + col, static_cast<size_t>(end - col));
                V::store(last, eight_bit_lanes<Codes>(last_codes, scale));
                for (int64_t i = 0; i < end - col; i++) {
                    store_from_float(out.data, out.dtype, start + col + i, last[i]);
                }
            }
        }
    }
}

// Numbers held as they are.
inline void convert_raw(const PackedWeight& weight, const Region& region, const Matrix& out) {
    const int32_t dtype = weight.code == CODE_BF16 ? DTYPE_BF16 : DTYPE_F16;
    const int64_t count = region.col_end - region.col_begin;
    for (int64_t row = region.row_begin; row < region.row_end; row++) {
        const auto* from = reinterpret_cast<const uint16_t*>(weight.codes + row * weight.row_bytes) + region.col_begin;
        const int64_t start = (row - region.row_begin) * out.stride;
        if (out.dtype == dtype) {
            std::memcpy(static_cast<uint16_t*>(out.data) + start, from, static_cast<size_t>(count) * 2);
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            store_from_float(out.data, out.dtype, start + i, load_as_float(from, dtype, i));
        }
    }
}

inline void dequantize_region(const PackedWeight& weight, const Region& region, const Matrix& out) {
    switch (weight.code) {
        case CODE_INT8: return dequantize_eight_bit<Int8Codes, V>(weight, region, out);
        case CODE_E4M3: return dequantize_eight_bit<E4m3Codes, V>(weight, region, out);
        case CODE_BF16:
        case CODE_F16: return convert_raw(weight, region, out);
        case CODE_NF3: return dequantize_nf3(weight, region, out);
        default: break;
    }
    if (interleave_of(weight) == 32) return dequantize_four_bit<32, V>(weight, region, out);
    dequantize_four_bit<64, V>(weight, region, out);
}
