// Few-row products of nf3, for activations in fp32 or as 16-bit integers (see linear_integers.inl).

// Columns whose activations share a step: two units, whose products sixteen lanes can sum before they are scaled.
constexpr int kNf3StepCols = 2 * kNf3Unit;

// A token's activations, zeros up to whole units; integers are followed by what one step of each unit's stands for.
inline int64_t nf3_prepared_bytes(const PackedWeight& weight, int32_t x_dtype) {
    const int64_t units = nf3_units(weight);
    const int64_t bytes = nf3_uses_integers(x_dtype) ? units * (kNf3Unit * 2 + 4) : units * kNf3Unit * 4;
    return ceil_div(bytes, 64) * 64;
}

inline void prepare_nf3(const PackedWeight& weight, const Matrix& x, int64_t token, void* prepared) {
    const int64_t units = nf3_units(weight), start = token * x.stride;
    float* const floats = static_cast<float*>(prepared);
    int16_t* const integers = static_cast<int16_t*>(prepared);
    float* const steps = reinterpret_cast<float*>(integers + units * kNf3Unit);
    for (int64_t u = 0; u < units; u += 2) {
        const int num_units = units - u < 2 ? 1 : 2, size = num_units * kNf3Unit;
        float values[kNf3StepCols];
        const int64_t col = u * kNf3Unit, count = weight.cols - col < size ? weight.cols - col : size;
        if (count == size && x.dtype != DTYPE_F32) {
            const uint16_t* const half = static_cast<const uint16_t*>(x.data) + start + col;
            for (int i = 0; i < size; i += V::kLanes) {
                V::store(values + i, x.dtype == DTYPE_BF16 ? V::bf16(half + i) : V::f16(half + i));
            }
        } else {
            for (int i = 0; i < size; i++) {
                values[i] = i < count ? load_as_float(x.data, x.dtype, start + col + i) : 0.0f;
            }
        }
        if (nf3_uses_integers(x.dtype)) {
            const float step = integers_of(values, size, integers + col);
            for (int i = 0; i < num_units; i++) steps[u + i] = step;
        } else {
            std::memcpy(floats + col, values, static_cast<size_t>(size) * 4);
        }
    }
}

// Units [unit, unit + kUnits), which share a step.
template <int kTokens, int kUnits>
ALWAYS_INLINE void add_nf3_units(const uint8_t* codes, int64_t units, int64_t unit, const int16_t* const* inputs,
                                 V::Floats* total) {
    const uint8_t* const tables = codes + units * kNf3UnitBytes;
    constexpr int kVectors = kUnits * 2 * kNf3Shorts;
    // a lane sums at most eight products of 15 and 13 bits in 32
    constexpr int kSummed = kVectors < 4 ? kVectors : 4;
    V::Shorts values[kVectors];
    for (int i = 0; i < 2 * kUnits; i++) {
        const uint8_t* const at = codes + (unit + i / 2) * kNf3UnitBytes;
        if (i % 2 == 0) V::prefetch(at + kPrefetchBytes);
        nf3_shorts(at, i % 2, kNf3Values[nf3_table(tables, unit + i / 2, i % 2)], values + i * kNf3Shorts);
    }
    for (int t = 0; t < kTokens; t++) {
        const int16_t* const input = inputs[t] + unit * kNf3Unit;
        const V::Floats step = V::set1(reinterpret_cast<const float*>(inputs[t] + units * kNf3Unit)[unit]);
        for (int first = 0; first < kVectors; first += kSummed) {
            V::Ints sums = V::dot(values[first], V::shorts(input + first * 2 * V::kLanes));
            for (int i = first + 1; i < first + kSummed; i++) {
                sums = V::dot(sums, values[i], V::shorts(input + i * 2 * V::kLanes));
            }
            total[t] = V::fma(V::to_floats(sums), step, total[t]);
        }
    }
}

template <int kTokens>
ALWAYS_INLINE void add_nf3_integers(const PackedWeight& weight, const uint8_t* codes, const int16_t* const* inputs,
                                    V::Floats* total) {
    constexpr int kUnits = V::kLanes >= 16 ? 2 : 1;
    const int64_t units = nf3_units(weight);
    int64_t u = 0;
    for (; u + kUnits <= units; u += kUnits) add_nf3_units<kTokens, kUnits>(codes, units, u, inputs, total);
    for (; u < units; u++) add_nf3_units<kTokens, 1>(codes, units, u, inputs, total);
}

template <int kTokens>
ALWAYS_INLINE void add_nf3_floats(const PackedWeight& weight, const uint8_t* codes, const float* const* inputs,
                                  V::Floats* total) {
    const int64_t units = nf3_units(weight);
    const uint8_t* const tables = codes + units * kNf3UnitBytes;
    for (int64_t g = 0; g < 2 * units; g++) {
        float values[kNf3Group];
        const int half = static_cast<int>(g % 2);
        nf3_floats(codes + g / 2 * kNf3UnitBytes, half, nf3_table(tables, g / 2, half), values);
        for (int t = 0; t < kTokens; t++) {
            for (int i = 0; i < kNf3Group; i += V::kLanes) {
                total[t] = V::fma(V::load(values + i), V::load(inputs[t] + g * kNf3Group + i), total[t]);
            }
        }
    }
}

template <int kTokens>
void multiply_nf3(const PackedWeight& weight, const PreparedInput& x, int64_t row, int64_t token, const Matrix& out) {
    const uint8_t* const codes = weight.codes + row * weight.row_bytes;
    const int16_t* integers[kTokens];
    const float* floats[kTokens];
    V::Floats total[kTokens];
    for (int t = 0; t < kTokens; t++) {
        const uint8_t* const data = x.data + (token + t) * x.stride_bytes;
        integers[t] = reinterpret_cast<const int16_t*>(data);
        floats[t] = reinterpret_cast<const float*>(data);
        total[t] = V::zero();
    }
    if (nf3_uses_integers(x.x_dtype)) {
        add_nf3_integers<kTokens>(weight, codes, integers, total);
    } else {
        add_nf3_floats<kTokens>(weight, codes, floats, total);
    }
    const float scale = weight.cols > 0 ? scale_at(weight, row) * kNf3Factor : 0.0f;
    for (int t = 0; t < kTokens; t++) {
        store_from_float(out.data, out.dtype, (token + t) * out.stride + row, V::sum(total[t]) * scale);
    }
}

inline void linear_nf3_rows(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                            const Matrix& out) {
    for (int64_t row = row_begin; row < row_end; row++) {
        int64_t token = 0;
        for (; token + 4 <= x.num_tokens; token += 4) multiply_nf3<4>(weight, x, row, token, out);
        for (; token < x.num_tokens; token++) multiply_nf3<1>(weight, x, row, token, out);
    }
}
