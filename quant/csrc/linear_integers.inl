// Products in integers: 16-bit activations times 16-bit values of codes, summed exactly in 32 bits for each group of
// columns, then scaled and added up in fp32. For bf16 and fp16 activations.
//
// Activations share a power of two within a group, so that the largest takes all 15 bits. A bf16 activation within
// 1/128 of its group's largest, an fp16 one within 1/16, is thus held exactly; a smaller one to 2^-15 of the power of
// two at or below the largest. Below 2^-115 it counts as zero.

inline bool uses_integers(const PackedWeight& weight, int32_t x_dtype) {
    return x_dtype != DTYPE_F32 && (is_four_bit(weight) || weight.code == CODE_INT8);
}

// How codes become integers. A chunk is kBytes of a row: kSteps vectors of values, one after the other; `column` is the
// column, counted from the row's first, of the code that is met at a place.

struct NibbleIntegers {
    static constexpr int kSteps = 4;
    static constexpr int kCodes = kSteps * 2 * V::kLanes;
    static constexpr int kBytes = kCodes / 2;
    V::ShortTable table;

    explicit NibbleIntegers(const PackedWeight& weight) : table(V::short_table(kIntegerValues[weight.code])) {}
    ALWAYS_INLINE void decode(const uint8_t* codes, V::Shorts* values) const {
        V::lookup_nibbles(table, V::words(codes), values);
    }
    ALWAYS_INLINE void decode(const uint8_t* codes, int64_t num_bytes, V::Shorts* values) const {
        V::lookup_nibbles(table, V::words(codes, num_bytes), values);
    }
    static int64_t column(int64_t place, int64_t interleave) {
        const int in_chunk = static_cast<int>(place % kCodes);
        const int nibble = V::nibble_at(in_chunk / (2 * V::kLanes), in_chunk % (2 * V::kLanes));
        const int64_t byte = place / kCodes * kBytes + nibble / 2;
        const int64_t half = interleave / 2;
        return byte / half * interleave + nibble % 2 * half + byte % half;
    }
};

struct Int8Integers {
    static constexpr int kCodes = 64;
    static constexpr int kSteps = kCodes / (2 * V::kLanes);
    static constexpr int kBytes = kCodes;

    explicit Int8Integers(const PackedWeight&) {}
    ALWAYS_INLINE void decode(const uint8_t* codes, V::Shorts* values) const {
        for (int s = 0; s < kSteps; s++) values[s] = V::widen_int8(codes + s * 2 * V::kLanes);
    }
    // rows are padded to whole groups
    ALWAYS_INLINE void decode(const uint8_t* codes, int64_t, V::Shorts* values) const { decode(codes, values); }
    static int64_t column(int64_t place, int64_t) { return place; }
};

// ---- activations --------------------------------------------------------------------------------------------------

// One token: 16-bit activations in the order in which codes are met, zeros up to whole chunks, then the groups' scales.
struct IntegerInput {
    int64_t cols;        // of the activations, zeros included
    int64_t num_scales;  // zeros up to whole vectors included
    int64_t num_bytes;
    int64_t num_groups;
    int64_t groups_per_scale;  // of the weight
};

// Columns after which the order of codes repeats.
constexpr int kOrderCodes = NibbleIntegers::kCodes > 64 ? NibbleIntegers::kCodes : 64;

inline IntegerInput integer_input(const PackedWeight& weight) {
    const int64_t cols = ceil_div(weight.cols, kOrderCodes) * kOrderCodes;
    // a vector of scales may be read from the last group's on
    const int64_t num_scales = ceil_div(cols / interleave_of(weight), V::kLanes) * V::kLanes + V::kLanes;
    return {cols, num_scales, cols * 2 + num_scales * 4, groups_of(weight), groups_per_scale_of(weight)};
}

// `size` floats to integers; returns what one step of them stands for, NaN if one is not finite.
inline float integers_of(const float* values, int size, int16_t* integers) {
    uint32_t largest = 0;
    for (int i = 0; i < size; i++) {
        const uint32_t magnitude = float_bits(values[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7F800000) {
        std::memset(integers, 0, static_cast<size_t>(size) * 2);
        return bits_float(0x7FC00000);
    }
    const uint32_t exponent = largest >> 23 > 27 ? largest >> 23 : 27;  // at least 2^-100, so that none overflows
    const float factor = bits_float((127 + 127 + 14 - exponent) << 23);
    for (int i = 0; i < size; i++) {
        // adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits
        integers[i] = static_cast<int16_t>(float_bits(values[i] * factor + 12582912.0f) & 0xFFFF);
    }
    return bits_float((exponent - 14) << 23);
}

template <int kInterleave>
void prepare_groups(const PackedWeight& weight, const Matrix& x, int64_t token, int16_t* integers, float* scales) {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + token * x.stride;
    const float step = weight.code == CODE_INT8 ? 1.0f : kIntegerSteps[weight.code];
    for (int64_t col = 0; col < weight.cols; col += kInterleave) {
        float values[kInterleave];
        if (weight.cols - col >= kInterleave) {
            for (int i = 0; i < kInterleave; i += V::kLanes) {
                V::store(values + i, x.dtype == DTYPE_BF16 ? V::bf16(from + col + i) : V::f16(from + col + i));
            }
        } else {
            for (int i = 0; i < kInterleave; i++) {
                values[i] = col + i < weight.cols ? load_as_float(from, x.dtype, col + i) : 0.0f;
            }
        }
        *scales++ = integers_of(values, kInterleave, integers + col) * step;
    }
}

inline void prepare_integers(const PackedWeight& weight, const Matrix& x, int64_t token, void* prepared) {
    const IntegerInput input = integer_input(weight);
    const int64_t interleave = interleave_of(weight);
    int16_t* integers = static_cast<int16_t*>(prepared);
    float* scales = reinterpret_cast<float*>(integers + input.cols);
    const int64_t groups = ceil_div(weight.cols, interleave);
    std::memset(scales + groups, 0, static_cast<size_t>(input.num_scales - groups) * 4);

    std::unique_ptr<int16_t[]> storage;
    int16_t* natural = integers;
    if (is_four_bit(weight)) {
        storage.reset(new int16_t[static_cast<size_t>(input.cols)]);
        natural = storage.get();
    }
    if (groups * interleave < input.cols) {
        std::memset(natural + groups * interleave, 0, static_cast<size_t>(input.cols - groups * interleave) * 2);
    }
    if (interleave == 32) {
        prepare_groups<32>(weight, x, token, natural, scales);
    } else {
        prepare_groups<64>(weight, x, token, natural, scales);
    }
    if (!is_four_bit(weight)) return;
    uint16_t order[kOrderCodes];
    for (int i = 0; i < kOrderCodes; i++) order[i] = static_cast<uint16_t>(NibbleIntegers::column(i, interleave));
    for (int64_t unit = 0; unit < input.cols; unit += kOrderCodes) {
        V::permute<kOrderCodes>(natural + unit, order, integers + unit);
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// Rows and tokens of one call, and room for the groups' scales of a tile of them.
template <class Codes>
struct IntegerProduct {
    const PackedWeight weight;  // copies: what is behind a reference would be read again after each store
    const IntegerInput input;
    const PreparedInput x;
    const Matrix out;
    const Codes decoder;
    const int64_t ahead_rows;   // how far ahead of their use codes and scales are asked for
    const int64_t scale_bytes;  // of a row
    float* products;
};

// Rows [row, row + kRows) times tokens [token, token + kTokens).
template <class Codes, int kInterleave, int kRows, int kTokens>
ALWAYS_INLINE void multiply_integers(const IntegerProduct<Codes>& call, int64_t row, int64_t token) {
    // groups of codes in a chunk; with narrow vectors a group takes several chunks
    constexpr int kGroups = Codes::kCodes > kInterleave ? Codes::kCodes / kInterleave : 1;
    constexpr int kChunksPerGroup = Codes::kCodes < kInterleave ? kInterleave / Codes::kCodes : 1;
    const PackedWeight& weight = call.weight;
    const int64_t row_bytes = weight.row_bytes;
    const int64_t scales_stride = call.input.num_scales;
    float* const products = call.products;
    const uint8_t* const codes = weight.codes + row * row_bytes;
    const int16_t* inputs[kTokens];
    for (int t = 0; t < kTokens; t++) {
        inputs[t] = reinterpret_cast<const int16_t*>(call.x.data + (token + t) * call.x.stride_bytes);
    }
    for (int r = 0; r < kRows; r++) {
        const uint8_t* scales = static_cast<const uint8_t*>(weight.scales);
        const uint8_t* later = scales + (row + r + call.ahead_rows) * call.scale_bytes;
        for (int64_t i = 0; i < call.scale_bytes; i += 64) V::prefetch(later + i);
        for (int64_t g = 0; g < call.input.num_groups; g += V::kLanes) {
            const V::Floats scale =
                group_scales(weight, row + r, g, call.input.num_groups, call.input.groups_per_scale);
            for (int t = 0; t < kTokens; t++) {
                const V::Floats input_scale = V::load(reinterpret_cast<const float*>(inputs[t] + call.input.cols) + g);
                V::store(products + (r * kTokens + t) * scales_stride + g, V::mul(scale, input_scale));
            }
        }
    }
    Sums<kRows, kTokens> total;
    total.clear();
    const auto add_chunk = [&](V::Shorts(&values)[kRows][Codes::kSteps], int64_t chunk) {
        const float* chunk_scales = products + chunk / kChunksPerGroup * kGroups;
        for (int t = 0; t < kTokens; t++) {
            V::Ints sums[kRows];
            for (int s = 0; s < Codes::kSteps; s++) {
                const V::Shorts input_values = V::shorts(inputs[t] + chunk * Codes::kCodes + s * 2 * V::kLanes);
                for (int r = 0; r < kRows; r++) {
                    sums[r] = s == 0 ? V::dot(values[r][s], input_values) : V::dot(sums[r], values[r][s], input_values);
                }
            }
            for (int r = 0; r < kRows; r++) {
                const V::Floats scale = V::template spread<kGroups>(chunk_scales + (r * kTokens + t) * scales_stride);
                total.at[r][t] = V::fma(V::to_floats(sums[r]), scale, total.at[r][t]);
            }
        }
    };
    const int64_t whole = row_bytes / Codes::kBytes;
    const int64_t ahead = call.ahead_rows * row_bytes;
    for (int64_t c = 0; c < whole; c++) {
        V::Shorts values[kRows][Codes::kSteps];
        for (int r = 0; r < kRows; r++) {
            const uint8_t* at = codes + r * row_bytes + c * Codes::kBytes;
            V::prefetch(at + ahead);
            call.decoder.decode(at, values[r]);
        }
        add_chunk(values, c);
    }
    if (const int64_t rest = row_bytes - whole * Codes::kBytes; rest > 0) {
        V::Shorts values[kRows][Codes::kSteps];
        for (int r = 0; r < kRows; r++) {
            call.decoder.decode(codes + r * row_bytes + whole * Codes::kBytes, rest, values[r]);
        }
        add_chunk(values, whole);
    }
    for (int r = 0; r < kRows; r++) {
        for (int t = 0; t < kTokens; t++) {
            store_from_float(call.out.data, call.out.dtype, (token + t) * call.out.stride + row + r,
                             V::sum(total.at[r][t]));
        }
    }
}

template <class Codes, int kInterleave, int kRows>
ALWAYS_INLINE void multiply_rows(const IntegerProduct<Codes>& call, int64_t row) {
    const int64_t count = call.x.num_tokens;
    int64_t token = 0;
    for (; token + 4 <= count; token += 4) multiply_integers<Codes, kInterleave, kRows, 4>(call, row, token);
    for (; token + 2 <= count; token += 2) multiply_integers<Codes, kInterleave, kRows, 2>(call, row, token);
    for (; token < count; token++) multiply_integers<Codes, kInterleave, kRows, 1>(call, row, token);
}

template <class Codes, int kInterleave>
void linear_rows_of(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                    const Matrix& out) {
    const IntegerInput input = integer_input(weight);
    const int64_t scale_size = weight.scale_type == SCALE_F16 ? 2 : weight.scale_type == SCALE_F32 ? 4 : 1;
    const std::unique_ptr<float[]> products(new float[static_cast<size_t>(V::kRows * 4 * input.num_scales)]());
    const IntegerProduct<Codes> call = {
        weight, input, x, out, Codes(weight), ceil_div(kPrefetchBytes, weight.row_bytes > 0 ? weight.row_bytes : 1),
        input.num_groups / input.groups_per_scale * scale_size, products.get()};
    int64_t row = row_begin;
    if (x.num_tokens == 1) {
        for (; row < row_end; row++) multiply_integers<Codes, kInterleave, 1, 1>(call, row, 0);
        return;
    }
    for (; row + V::kRows <= row_end; row += V::kRows) multiply_rows<Codes, kInterleave, V::kRows>(call, row);
    for (; row < row_end; row++) multiply_rows<Codes, kInterleave, 1>(call, row);
}

inline void linear_rows_integers(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                                 const Matrix& out) {
    if (weight.code == CODE_INT8) return linear_rows_of<Int8Integers, 64>(weight, x, row_begin, row_end, out);
    if (interleave_of(weight) == 32) return linear_rows_of<NibbleIntegers, 32>(weight, x, row_begin, row_end, out);
    linear_rows_of<NibbleIntegers, 64>(weight, x, row_begin, row_end, out);
}
