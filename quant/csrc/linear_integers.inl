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

// The scales of a row's groups times those of a token's, to `products`.
template <class Codes>
ALWAYS_INLINE void multiply_scales(const IntegerProduct<Codes>& call, int64_t row, const int16_t* input, float* products) {
    const float* const input_scales = reinterpret_cast<const float*>(input + call.input.cols);
    for (int64_t g = 0; g < call.input.num_groups; g += V::kLanes) {
        const V::Floats scale = group_scales(call.weight, row, g, call.input.num_groups, call.input.groups_per_scale);
        V::store(products + g, V::mul(scale, V::load(input_scales + g)));
    }
}

// Asks for the scales of a later tile.
template <class Codes>
ALWAYS_INLINE void prefetch_scales(const IntegerProduct<Codes>& call, int64_t row, int64_t num_rows) {
    const uint8_t* const scales = static_cast<const uint8_t*>(call.weight.scales);
    const uint8_t* const later = scales + (row + call.ahead_rows) * call.scale_bytes;
    for (int64_t i = 0; i < num_rows * call.scale_bytes; i += 64) V::prefetch(later + i);
}

// Adds kRows rows of codes times kTokens tokens to `total`; `products` has what multiply_scales made for each.
template <class Codes, int kInterleave, int kRows, int kTokens>
ALWAYS_INLINE void add_codes(const IntegerProduct<Codes>& call, const uint8_t* codes, const int16_t* const* inputs,
                             const float* products, Sums<kRows, kTokens>& total) {
    // groups of codes in a chunk; with narrow vectors a group takes several chunks
    constexpr int kGroups = Codes::kCodes > kInterleave ? Codes::kCodes / kInterleave : 1;
    constexpr int kChunksPerGroup = Codes::kCodes < kInterleave ? kInterleave / Codes::kCodes : 1;
    const int64_t row_bytes = call.weight.row_bytes;
    const int64_t scales_stride = call.input.num_scales;
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
}

// Rows [row, row + kRows) times tokens [token, token + kTokens).
template <class Codes, int kInterleave, int kRows, int kTokens>
ALWAYS_INLINE void multiply_integers(const IntegerProduct<Codes>& call, int64_t row, int64_t token) {
    const int16_t* inputs[kTokens];
    for (int t = 0; t < kTokens; t++) {
        inputs[t] = reinterpret_cast<const int16_t*>(call.x.data + (token + t) * call.x.stride_bytes);
    }
    for (int r = 0; r < kRows; r++) {
        prefetch_scales(call, row + r, 1);
        for (int t = 0; t < kTokens; t++) {
            multiply_scales(call, row + r, inputs[t], call.products + (r * kTokens + t) * call.input.num_scales);
        }
    }
    Sums<kRows, kTokens> total;
    total.clear();
    add_codes<Codes, kInterleave>(call, call.weight.codes + row * call.weight.row_bytes, inputs, call.products, total);
    for (int r = 0; r < kRows; r++) {
        for (int t = 0; t < kTokens; t++) {
            store_from_float(call.out.data, call.out.dtype, (token + t) * call.out.stride + row + r,
                             V::sum(total.at[r][t]));
        }
    }
}

// Groups up to which a row is short: where what it takes besides its codes is a good part of its time.
constexpr int64_t kShortRowGroups = 32;

// One token times rows [row, row_end), kTile at a time; returns the first that is left. Codes are read row after row,
// since the hardware reads ahead of one stream better than of several; what else a row takes, its scales and the sum of
// its lanes, is done for all of a tile at once. Not inline: among other loops the compiler runs out of registers.
template <class Codes, int kInterleave, int kTile, class W = V>
NEVER_INLINE int64_t multiply_one_token(const IntegerProduct<Codes>& of, int64_t row, int64_t row_end) {
    const IntegerProduct<Codes> call = of;
    const int16_t* const input = reinterpret_cast<const int16_t*>(call.x.data);
    for (; row + kTile <= row_end; row += kTile) {
        prefetch_scales(call, row, kTile);
        for (int r = 0; r < kTile; r++) multiply_scales(call, row + r, input, call.products + r * call.input.num_scales);
        V::Floats totals[kTile];
        for (int r = 0; r < kTile; r++) {
            Sums<1, 1> total;
            total.clear();
            add_codes<Codes, kInterleave>(call, call.weight.codes + (row + r) * call.weight.row_bytes, &input,
                                          call.products + r * call.input.num_scales, total);
            totals[r] = total.at[0][0];
        }
        float sums[kTile];
        if constexpr (kTile == 1) {
            sums[0] = W::sum(totals[0]);
        } else {
            W::sums(totals, sums);
        }
        for (int r = 0; r < kTile; r++) store_from_float(call.out.data, call.out.dtype, row + r, sums[r]);
    }
    return row;
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
    // a vector of scales that straddles two lines of the cache would be read back late
    const size_t count = static_cast<size_t>(V::kRows * 4 * input.num_scales);
    const std::unique_ptr<float[]> storage(new float[count + 16]());
    float* const products = storage.get() + (64 - reinterpret_cast<uintptr_t>(storage.get()) % 64) % 64 / 4;
    const IntegerProduct<Codes> call = {
        weight, input, x, out, Codes(weight), ceil_div(kPrefetchBytes, weight.row_bytes > 0 ? weight.row_bytes : 1),
        input.num_groups / input.groups_per_scale * scale_size, products};
    int64_t row = row_begin;
    if (x.num_tokens == 1) {
        if (V::kShortRows > 1 && input.num_groups <= kShortRowGroups) {
            row = multiply_one_token<Codes, kInterleave, V::kShortRows>(call, row, row_end);
        }
        multiply_one_token<Codes, kInterleave, 1>(call, row, row_end);
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
