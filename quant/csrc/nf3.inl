// The three-bit format nf3, but for its products: see quant/three_bit.py for the bytes.

// The number of the table of a half of a unit.
ALWAYS_INLINE int nf3_table(const uint8_t* tables, int64_t unit, int half) { return tables[unit] >> (4 * half) & 15; }

// ---- quantising, operation for operation as quant/reference.py ----------------------------------------------------

template <int kSize>
ALWAYS_INLINE float halving_sum(const float* values) {
    if constexpr (kSize == 1) {
        return values[0];
    } else {
        float sums[kSize / 2];
        for (int i = 0; i < kSize / 2; i++) sums[i] = values[i] + values[i + kSize / 2];
        return halving_sum<kSize / 2>(sums);
    }
}

inline float halving_sum(float* values, int64_t size) {
    for (int64_t half = size / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; i++) values[i] += values[i + half];
    }
    return values[0];
}

// A table and the bounds between its values, as floats. Folds and not loops over bounds: compilers make vectors of them.
struct Nf3Table {
    float values[8];
    float bounds[7];

    // by value: a load that depends on a comparison would be a branch
    static ALWAYS_INLINE float higher(float value, float bound, float above, float below) {
        return value > bound ? above : below;
    }
    template <size_t... kBound>
    ALWAYS_INLINE void nearest(const float* scaled, float* result, std::index_sequence<kBound...>) const {
        for (int i = 0; i < kNf3Group; i++) {
            const float value = scaled[i];
            float found = values[0];
            ((found = higher(value, bounds[kBound], values[kBound + 1], found)), ...);
            result[i] = found;
        }
    }
    ALWAYS_INLINE void nearest(const float* scaled, float* result) const {
        nearest(scaled, result, std::make_index_sequence<7>());
    }
};

struct Nf3Tables {
    Nf3Table at[kNf3Tables];

    Nf3Tables() {
        for (int t = 0; t < kNf3Tables; t++) {
            for (int j = 0; j < 8; j++) at[t].values[j] = kNf3Values[t][j] * kNf3Factor;
            for (int j = 0; j < 7; j++) at[t].bounds[j] = (at[t].values[j + 1] + at[t].values[j]) / 2;
        }
    }
};

// The table of least squared error for `count` of 32 scaled values.
inline int pick_nf3_table(const Nf3Tables& tables, const float* scaled, int64_t count) {
    float weights[kNf3Group];
    for (int i = 0; i < kNf3Group; i++) weights[i] = i < count ? 1.0f : 0.0f;
    float least = INFINITY;
    int best = 0;
    for (int t = 0; t < kNf3Tables; t++) {
        float errors[kNf3Group];
        tables.at[t].nearest(scaled, errors);
        for (int i = 0; i < kNf3Group; i++) {
            const float difference = (scaled[i] - errors[i]) * weights[i];
            errors[i] = difference * difference;
        }
        const float error = halving_sum<kNf3Group>(errors);
        best = error < least ? t : best;
        least = error < least ? error : least;
    }
    return best;
}

inline void pack_nf3_half(const int32_t* codes, int half, uint8_t* unit) {
    uint32_t high = 0;
    for (int w = 0; w < 8; w++) {
        unit[2 * w + half] = static_cast<uint8_t>((codes[w] & 3) | (codes[w + 8] & 3) << 2 | (codes[w + 16] & 3) << 4 |
                                                  (codes[w + 24] & 3) << 6);
    }
    for (int i = 0; i < kNf3Group; i++) high |= static_cast<uint32_t>(codes[i] >> 2) << i;
    for (int b = 0; b < 4; b++) unit[16 + 4 * half + b] = static_cast<uint8_t>(high >> (8 * b));
}

inline int quantize_nf3_rows(const PackedWeight& weight, const Matrix& source, int64_t row_begin, int64_t row_end) {
    static const Nf3Tables tables;
    if (weight.cols == 0) return STATUS_OK;  // such rows have no scale
    const int64_t units = nf3_units(weight), groups = 2 * units;
    int64_t tree = 1;
    while (tree < groups) tree *= 2;
    std::unique_ptr<float[]> storage(new float[static_cast<size_t>(groups * kNf3Group + 2 * tree)]);
    float *row_values = storage.get(), *products = row_values + groups * kNf3Group, *squares = products + tree;
    for (int64_t row = row_begin; row < row_end; row++) {
        uint8_t* const codes = weight.codes + row * weight.row_bytes;
        uint8_t* const row_tables = codes + units * kNf3UnitBytes;
        for (int64_t g = 0; g < tree; g++) squares[g] = products[g] = 0.0f;
        for (int64_t g = 0; g < groups; g++) {
            Block<kNf3Group> block;
            load_block(source, row, g * kNf3Group, weight.cols - g * kNf3Group, block);
            if (!block.finite()) return STATUS_NONFINITE;
            std::memcpy(row_values + g * kNf3Group, block.values, sizeof(block.values));
            for (int i = 0; i < kNf3Group; i++) block.values[i] *= block.values[i];
            squares[g] = halving_sum<kNf3Group>(block.values);
        }
        uint16_t scale_f16 = float_to_f16(std::sqrt(halving_sum(squares, tree) / static_cast<float>(weight.cols)));
        for (int pass = 0; pass < 2; pass++) {
            if (scale_f16 == 0x7C00) return STATUS_SCALE_OVERFLOW;
            const float scale = f16_to_float(scale_f16);
            const float inverse = scale_f16 != 0 ? 1.0f / scale : 0.0f;
            for (int64_t g = 0; g < tree; g++) squares[g] = products[g] = 0.0f;
            for (int64_t g = 0; g < groups; g++) {
                const float* const values = row_values + g * kNf3Group;
                const int64_t count = weight.cols - g * kNf3Group;
                float scaled[kNf3Group];
                for (int i = 0; i < kNf3Group; i++) scaled[i] = values[i] * inverse;
                const int number = pick_nf3_table(tables, scaled, count);
                const Nf3Table& table = tables.at[number];
                if (pass == 0) {
                    float nearest[kNf3Group], product[kNf3Group];
                    table.nearest(scaled, nearest);
                    for (int i = 0; i < kNf3Group; i++) {
                        nearest[i] = i < count ? nearest[i] : 0.0f;
                        product[i] = values[i] * nearest[i];
                        nearest[i] *= nearest[i];
                    }
                    products[g] = halving_sum<kNf3Group>(product);
                    squares[g] = halving_sum<kNf3Group>(nearest);
                } else {
                    int32_t chosen[kNf3Group];
                    count_bounds<kNf3Group>(scaled, 1.0f, table.bounds, chosen, std::make_index_sequence<7>());
                    pack_nf3_half(chosen, static_cast<int>(g % 2), codes + g / 2 * kNf3UnitBytes);
                    uint8_t& both = row_tables[g / 2];
                    both = static_cast<uint8_t>(g % 2 == 0 ? number : both | number << 4);
                }
            }
            if (pass == 0) {
                const float product = halving_sum(products, tree), square = halving_sum(squares, tree);
                if (product > 0.0f && square > 0.0f) scale_f16 = float_to_f16(product / square);
            }
        }
        static_cast<uint16_t*>(weight.scales)[row] = scale_f16;
    }
    return STATUS_OK;
}

// ---- dequantising -------------------------------------------------------------------------------------------------

// What the 32 codes of one half of a unit stand for in a table, in order.
ALWAYS_INLINE void unpack_nf3_half(const uint8_t* unit, int half, const int16_t* values, int16_t* entries) {
    uint32_t high = 0;
    for (int b = 0; b < 4; b++) high |= static_cast<uint32_t>(unit[16 + 4 * half + b]) << (8 * b);
    for (int k = 0; k < 4; k++) {
        for (int w = 0; w < 8; w++) {
            const uint32_t low = static_cast<uint32_t>(unit[2 * w + half]) >> (2 * k) & 3;
            entries[8 * k + w] = values[low | (high >> (8 * k + w) & 1) << 2];
        }
    }
}

constexpr int kNf3Shorts = kNf3Group / (2 * V::kLanes) > 0 ? kNf3Group / (2 * V::kLanes) : 1;  // vectors of a half unit

template <class Vectors = V>
ALWAYS_INLINE void nf3_shorts(const uint8_t* unit, int half, const int16_t* table, typename Vectors::Shorts* values) {
    if constexpr (Vectors::kLooksUpNf3) {
        Vectors::lookup_nf3(unit, half, table, values);
    } else {
        int16_t entries[kNf3Group];
        unpack_nf3_half(unit, half, table, entries);
        for (int s = 0; s < kNf3Shorts; s++) values[s] = Vectors::shorts(entries + s * 2 * V::kLanes);
    }
}

// The same as floats.
ALWAYS_INLINE void nf3_floats(const uint8_t* unit, int half, int number, float* values) {
    V::Shorts shorts[kNf3Shorts];
    int16_t entries[kNf3Group];
    nf3_shorts(unit, half, kNf3Values[number], shorts);
    std::memcpy(entries, shorts, sizeof(entries));
    for (int i = 0; i < kNf3Group; i++) values[i] = static_cast<float>(entries[i]);
}

// Columns of the region begin at a multiple of 32.
inline void dequantize_nf3(const PackedWeight& weight, const Region& region, const Matrix& out) {
    if (weight.cols == 0) return;
    const int64_t units = nf3_units(weight);
    float tables_f32[kNf3Tables * 8];
    for (int i = 0; i < kNf3Tables * 8; i++) tables_f32[i] = static_cast<float>(kNf3Values[i / 8][i % 8]) * kNf3Factor;
    for (int64_t row = region.row_begin; row < region.row_end; row++) {
        const uint8_t* const codes = weight.codes + row * weight.row_bytes;
        const uint8_t* const tables = codes + units * kNf3UnitBytes;
        const float scale = scale_at(weight, row);
        const int64_t start = (row - region.row_begin) * out.stride - region.col_begin;
        int16_t scaled[kNf3Tables * 8];  // the tables times the scale, if the dtype has 16 bits
        for (int i = 0; i < kNf3Tables * 8 && out.dtype != DTYPE_F32; i += V::kLanes) {
            store_lanes(scaled, out.dtype, i, V::mul(V::load(tables_f32 + i), V::set1(scale)));
        }
        for (int64_t col = region.col_begin; col < region.col_end; col += kNf3Group) {
            const int64_t unit = col / kNf3Unit, count = region.col_end - col;
            const int half = static_cast<int>(col / kNf3Group % 2);
            const uint8_t* const at = codes + unit * kNf3UnitBytes;
            const int number = nf3_table(tables, unit, half);
            if (out.dtype == DTYPE_F32) {
                float values[kNf3Group];
                nf3_floats(at, half, number, values);
                for (int i = 0; i < kNf3Group; i++) values[i] = values[i] * kNf3Factor * scale;
                std::memcpy(static_cast<float*>(out.data) + start + col, values,
                            static_cast<size_t>(count < kNf3Group ? count : kNf3Group) * 4);
            } else {
                V::Shorts values[kNf3Shorts];
                nf3_shorts(at, half, scaled + number * 8, values);
                int16_t* const to = static_cast<int16_t*>(out.data) + start + col;
                if (count >= kNf3Group) {
                    std::memcpy(to, values, sizeof(values));
                } else {
                    std::memcpy(to, values, static_cast<size_t>(count) * 2);
                }
            }
        }
    }
}
