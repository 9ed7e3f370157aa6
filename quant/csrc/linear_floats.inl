// Products in fp32 throughout: for fp32 activations, and for fp8 weights, whose range no integer holds.

// ---- four bits: 32-bit words of codes, whose eight nibbles are looked up one shift at a time ----------------------
// A chunk is one vector of words: 8 * kLanes codes. Shift s of word w holds the code of byte 4w + s / 2, low nibble for
// even s; activations are prepared in that order, so no code is ever moved between lanes.

constexpr int kChunkCodes = 8 * V::kLanes;
constexpr int kChunkBytes = 4 * V::kLanes;

template <int kInterleave>
struct Chunk {
    static constexpr int kWordsPerGroup = kInterleave / 8;
    // groups of codes in a chunk; with narrow vectors a group takes several chunks
    static constexpr int kGroups = V::kLanes / kWordsPerGroup > 0 ? V::kLanes / kWordsPerGroup : 1;
    static constexpr int kChunksPerGroup = kWordsPerGroup / V::kLanes > 0 ? kWordsPerGroup / V::kLanes : 1;
};

inline int64_t float_cols(const PackedWeight& weight) {
    const int64_t unit = is_four_bit(weight) ? (kChunkCodes > 64 ? kChunkCodes : 64) : 64;
    return ceil_div(weight.cols, unit) * unit;
}

inline void prepare_floats(const PackedWeight& weight, const Matrix& x, int64_t token, void* prepared_token) {
    float* prepared = static_cast<float*>(prepared_token);
    const int64_t padded = float_cols(weight);
    std::unique_ptr<float[]> storage;
    float* natural = prepared;
    if (is_four_bit(weight)) {
        storage.reset(new float[static_cast<size_t>(padded)]);
        natural = storage.get();
    }
    const int64_t start = token * x.stride;
    int64_t col = 0;
    if (x.dtype == DTYPE_F32) {
        std::memcpy(natural, static_cast<const float*>(x.data) + start, static_cast<size_t>(weight.cols) * 4);
        col = weight.cols;
    } else {
        const uint16_t* half = static_cast<const uint16_t*>(x.data) + start;
        for (; col + V::kLanes <= weight.cols; col += V::kLanes) {
            V::store(natural + col, x.dtype == DTYPE_BF16 ? V::bf16(half + col) : V::f16(half + col));
        }
        for (; col < weight.cols; col++) natural[col] = load_as_float(x.data, x.dtype, start + col);
    }
    for (; col < padded; col++) natural[col] = 0.0f;
    if (!is_four_bit(weight)) return;

    const int half = static_cast<int>(interleave_of(weight)) / 2;
    int32_t source[kChunkCodes];
    for (int s = 0; s < 8; s++) {
        for (int lane = 0; lane < V::kLanes; lane++) {
            const int byte = 4 * lane + s / 2;
            source[s * V::kLanes + lane] = byte / half * 2 * half + byte % half + s % 2 * half;
        }
    }
    // where a group takes several chunks, the unit that repeats is the group
    constexpr int kUnit = kChunkCodes > 64 ? kChunkCodes : 64;
    for (int64_t unit = 0; unit < padded; unit += kUnit) {
        for (int chunk = 0; chunk < kUnit / kChunkCodes; chunk++) {
            const int first_byte = chunk * kChunkBytes;
            const float* from = natural + unit + first_byte / half * 2 * half + first_byte % half;
            for (int i = 0; i < kChunkCodes; i += V::kLanes) {
                V::store(prepared + unit + chunk * kChunkCodes + i, V::gather(from, source + i));
            }
        }
    }
}

template <int kRows, int kTokens>
struct Sums {
    V::Floats at[kRows][kTokens];

    ALWAYS_INLINE void clear() {
        for (int r = 0; r < kRows; r++) {
            for (int t = 0; t < kTokens; t++) at[r][t] = V::zero();
        }
    }
};

template <int kShift, int kRows, int kTokens>
ALWAYS_INLINE void multiply_nibbles(const V::Words* words, const V::Table& table, const float* x, int64_t stride,
                                    Sums<kRows, kTokens>& sums) {
    V::Floats values[kRows];
    for (int r = 0; r < kRows; r++) values[r] = V::lookup(table, V::template shift_right<4 * kShift>(words[r]));
    for (int t = 0; t < kTokens; t++) {
        const V::Floats inputs = V::load(x + t * stride + kShift * V::kLanes);
        for (int r = 0; r < kRows; r++) sums.at[r][t] = V::fma(values[r], inputs, sums.at[r][t]);
    }
}

template <int kRows, int kTokens, int kInterleave>
ALWAYS_INLINE void multiply_chunk(const V::Words* words, const V::Table& table, const float* const* scales,
                                  const float* x, int64_t stride, Sums<kRows, kTokens>& total) {
    Sums<kRows, kTokens> sums;
    sums.clear();
    multiply_nibbles<0>(words, table, x, stride, sums);
    multiply_nibbles<1>(words, table, x, stride, sums);
    multiply_nibbles<2>(words, table, x, stride, sums);
    multiply_nibbles<3>(words, table, x, stride, sums);
    multiply_nibbles<4>(words, table, x, stride, sums);
    multiply_nibbles<5>(words, table, x, stride, sums);
    multiply_nibbles<6>(words, table, x, stride, sums);
    multiply_nibbles<7>(words, table, x, stride, sums);
    for (int r = 0; r < kRows; r++) {
        const V::Floats scale = V::template spread<Chunk<kInterleave>::kGroups>(scales[r]);
        for (int t = 0; t < kTokens; t++) total.at[r][t] = V::fma(sums.at[r][t], scale, total.at[r][t]);
    }
}

template <int kRows, int kTokens, int kInterleave>
void multiply_four_bit(const PackedWeight& weight, const float* row_scales, int64_t scales_stride, const float* x,
                       int64_t stride, int64_t row, int64_t token, const Matrix& out) {
    using Layout = Chunk<kInterleave>;
    const V::Table table = V::table(kValues[weight.code]);
    const uint8_t* codes = weight.codes + row * weight.row_bytes;
    Sums<kRows, kTokens> total;
    total.clear();
    V::Words words[kRows];
    const float* scales[kRows];
    const int64_t whole = weight.row_bytes / kChunkBytes;
    const int64_t ahead = prefetch_distance<kRows>(weight);
    for (int64_t c = 0; c < whole; c++) {
        for (int r = 0; r < kRows; r++) {
            const uint8_t* at = codes + r * weight.row_bytes + c * kChunkBytes;
            V::prefetch(at + ahead);
            words[r] = V::words(at);
            scales[r] = row_scales + r * scales_stride + c * Layout::kGroups / Layout::kChunksPerGroup;
        }
        multiply_chunk<kRows, kTokens, kInterleave>(words, table, scales, x + c * kChunkCodes, stride, total);
    }
    if (const int64_t rest = weight.row_bytes - whole * kChunkBytes; rest > 0) {
        for (int r = 0; r < kRows; r++) {
            words[r] = V::words(codes + r * weight.row_bytes + whole * kChunkBytes, rest);
            scales[r] = row_scales + r * scales_stride + whole * Layout::kGroups / Layout::kChunksPerGroup;
        }
        multiply_chunk<kRows, kTokens, kInterleave>(words, table, scales, x + whole * kChunkCodes, stride, total);
    }
    for (int r = 0; r < kRows; r++) {
        for (int t = 0; t < kTokens; t++) {
            store_from_float(out.data, out.dtype, (token + t) * out.stride + row + r, V::sum(total.at[r][t]));
        }
    }
}

// ---- eight bits: natural order, one scale at a time ---------------------------------------------------------------

template <class Codes, int kRows, int kTokens>
void multiply_eight_bit(const PackedWeight& weight, const float* row_scales, int64_t scales_stride, const float* x,
                        int64_t stride, int64_t row, int64_t token, const Matrix& out) {
    const uint8_t* codes = weight.codes + row * weight.row_bytes;
    const int64_t cols = weight.row_bytes;  // int8 rows are padded to whole blocks, fp8 rows are as long as they are
    const V::Floats factor = V::set1(Codes::kFactor);
    const int64_t ahead = prefetch_distance<kRows>(weight);
    Sums<kRows, kTokens> total;
    total.clear();
    for (int64_t begin = 0, b = 0; begin < cols; begin += weight.block_cols, b++) {
        const int64_t end = begin + weight.block_cols < cols ? begin + weight.block_cols : cols;
        Sums<kRows, kTokens> sums;
        sums.clear();
        int64_t col = begin;
        const auto multiply_lanes = [&] {
            V::Floats values[kRows];
            for (int r = 0; r < kRows; r++) values[r] = Codes::load(codes + r * weight.row_bytes + col);
            for (int t = 0; t < kTokens; t++) {
                const V::Floats inputs = V::load(x + t * stride + col);
                for (int r = 0; r < kRows; r++) sums.at[r][t] = V::fma(values[r], inputs, sums.at[r][t]);
            }
            col += V::kLanes;
        };
        while (col + 64 <= end) {
            for (int r = 0; r < kRows; r++) V::prefetch(codes + r * weight.row_bytes + col + ahead);
            for (int i = 0; i < 64; i += V::kLanes) multiply_lanes();
        }
        while (col + V::kLanes <= end) multiply_lanes();
        if (col < end) {
            // inputs are cut off too: what follows belongs to another scale, and zero times infinity is not zero
            const size_t rest = static_cast<size_t>(end - col);
            float last_inputs[kTokens][V::kLanes] = {};
            for (int t = 0; t < kTokens; t++) std::memcpy(last_inputs[t], x + t * stride + col, rest * 4);
            for (int r = 0; r < kRows; r++) {
                uint8_t last[V::kLanes] = {};
                std::memcpy(last, codes + r * weight.row_bytes + col, rest);
                const V::Floats values = Codes::load(last);
                for (int t = 0; t < kTokens; t++) {
                    sums.at[r][t] = V::fma(values, V::load(last_inputs[t]), sums.at[r][t]);
                }
            }
        }
        for (int r = 0; r < kRows; r++) {
            const V::Floats scale = V::set1(row_scales[r * scales_stride + b]);
            for (int t = 0; t < kTokens; t++) {
                total.at[r][t] = V::fma(V::mul(sums.at[r][t], factor), scale, total.at[r][t]);
            }
        }
    }
    for (int r = 0; r < kRows; r++) {
        for (int t = 0; t < kTokens; t++) {
            store_from_float(out.data, out.dtype, (token + t) * out.stride + row + r, V::sum(total.at[r][t]));
        }
    }
}

// ---- rows and tokens in small tiles -------------------------------------------------------------------------------

using Multiply = void (*)(const PackedWeight&, const float*, int64_t, const float*, int64_t, int64_t, int64_t,
                          const Matrix&);

template <int kRows, int kTokens>
Multiply multiply_for(const PackedWeight& weight) {
    if (weight.code == CODE_INT8) return multiply_eight_bit<Int8Codes, kRows, kTokens>;
    if (weight.code == CODE_E4M3) return multiply_eight_bit<E4m3Codes, kRows, kTokens>;
    if (interleave_of(weight) == 32) return multiply_four_bit<kRows, kTokens, 32>;
    return multiply_four_bit<kRows, kTokens, 64>;
}

template <int kRows>
void multiply_tokens(const PackedWeight& weight, const float* scales, int64_t scales_stride, const PreparedInput& x,
                     int64_t row, const Matrix& out) {
    const float* inputs = reinterpret_cast<const float*>(x.data);
    const int64_t stride = x.stride_bytes / 4;
    int64_t token = 0;
    const auto run = [&](Multiply multiply, int count) {
        multiply(weight, scales, scales_stride, inputs + token * stride, stride, row, token, out);
        token += count;
    };
    while (x.num_tokens - token >= 4) run(multiply_for<kRows, 4>(weight), 4);
    if (x.num_tokens - token >= 2) run(multiply_for<kRows, 2>(weight), 2);
    if (x.num_tokens - token >= 1) run(multiply_for<kRows, 1>(weight), 1);
}

inline void linear_rows_floats(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                               const Matrix& out) {
    const bool four_bit = is_four_bit(weight);
    const int64_t interleave = interleave_of(weight);
    const int64_t scale_cols = ceil_div(weight.cols, weight.block_cols);
    // whole chunks, and what spread() reads past the last one
    const int64_t scales_stride = (four_bit ? float_cols(weight) / interleave : scale_cols) + 16;
    std::unique_ptr<float[]> scales(new float[static_cast<size_t>(V::kRows * scales_stride)]);
    const int64_t num_groups = four_bit ? groups_of(weight) : 0;
    const int64_t groups_per_scale = four_bit ? groups_per_scale_of(weight) : 0;
    std::memset(scales.get(), 0, static_cast<size_t>(V::kRows * scales_stride) * 4);
    const auto load_scales = [&](int64_t row, float* to) {
        if (four_bit) {
            for (int64_t g = 0; g < num_groups; g += V::kLanes) {
                V::store(to + g, group_scales(weight, row, g, num_groups, groups_per_scale));
            }
        } else {
            const int64_t start = row / weight.block_rows * scale_cols;
            for (int64_t b = 0; b < scale_cols; b++) to[b] = scale_at(weight, start + b);
        }
    };
    int64_t row = row_begin;
    // One token is bound by memory, which one stream reads fastest; more are bound by arithmetic, where rows side by
    // side share the loads of activations.
    if (x.num_tokens > 1) {
        for (; row + V::kRows <= row_end; row += V::kRows) {
            for (int r = 0; r < V::kRows; r++) load_scales(row + r, scales.get() + r * scales_stride);
            multiply_tokens<V::kRows>(weight, scales.get(), scales_stride, x, row, out);
        }
    }
    for (; row < row_end; row++) {
        load_scales(row, scales.get());
        multiply_tokens<1>(weight, scales.get(), scales_stride, x, row, out);
    }
}
