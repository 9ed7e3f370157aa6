// x @ weight.T for few rows of x, straight from codes.
//
// A row of the weight times a token is one chain of operations whose order depends on the columns alone: not on which
// rows or tokens are computed beside it, on threads, or on addresses. Hence the same bits whatever the batch or slot.

// Where a scale serves several interleaved groups, or is fp32: rare, and kept out of the loops. The weight by value: a
// reference would keep what the loops use in memory.
template <int kLanes>
NEVER_INLINE V::Floats shared_group_scales(PackedWeight weight, int64_t row, int64_t group, int64_t num_groups,
                                           int64_t groups_per_scale) {
    float scales[kLanes] = {};
    const int64_t first = row * (num_groups / groups_per_scale);
    for (int64_t i = 0; i < kLanes && i < num_groups - group; i++) {
        scales[i] = scale_at(weight, first + (group + i) / groups_per_scale);
    }
    return V::load(scales);
}

// The scales in fp32 of one row's interleaved groups [group, group + V::kLanes), finite past the last.
ALWAYS_INLINE V::Floats group_scales(const PackedWeight& weight, int64_t row, int64_t group, int64_t num_groups,
                                     int64_t groups_per_scale) {
    const int64_t count = num_groups - group;
    const int64_t at = row * num_groups + group;
    if (groups_per_scale == 1 && weight.scale_type == SCALE_F16) {
        const uint16_t* half = static_cast<const uint16_t*>(weight.scales) + at;
        return count >= V::kLanes ? V::f16(half) : V::f16(half, count);
    }
    if (groups_per_scale == 1 && weight.scale_type == SCALE_E8M0) {
        const uint8_t* exponents = static_cast<const uint8_t*>(weight.scales) + at;
        return count >= V::kLanes ? V::e8m0(exponents) : V::e8m0(exponents, count);
    }
    return shared_group_scales<V::kLanes>(weight, row, group, num_groups, groups_per_scale);
}

// How many interleaved groups a row has, and how many share a scale.
inline int64_t groups_of(const PackedWeight& weight) {
    return weight.row_bytes * (is_four_bit(weight) ? 2 : 1) / interleave_of(weight);
}
inline int64_t groups_per_scale_of(const PackedWeight& weight) { return weight.block_cols / interleave_of(weight); }

// How far ahead of its use a byte is asked for: where the tile of rows after this one, or a later one, has it, since the
// hardware follows one row but does not foresee the next tile. Addresses past the weight are harmless.
constexpr int64_t kPrefetchBytes = 16384;

template <int kRows>
ALWAYS_INLINE int64_t prefetch_distance(const PackedWeight& weight) {
    const int64_t tile_bytes = kRows * (weight.row_bytes > 0 ? weight.row_bytes : 1);
    return kRows == 1 ? kPrefetchBytes : ceil_div(kPrefetchBytes, tile_bytes) * tile_bytes;
}

#include "linear_floats.inl"
#include "linear_integers.inl"
#include "linear_raw.inl"

inline int64_t prepared_bytes(const PackedWeight& weight, int32_t x_dtype) {
    if (weight.code == CODE_NF3) return nf3_prepared_bytes(weight, x_dtype);
    const int64_t bytes = uses_integers(weight, x_dtype) ? integer_input(weight).num_bytes : float_cols(weight) * 4;
    return ceil_div(bytes, 64) * 64;
}

inline void prepare(const PackedWeight& weight, const Matrix& x, int64_t token, void* prepared) {
    if (weight.code == CODE_NF3) return prepare_nf3(weight, x, token, prepared);
    if (uses_integers(weight, x.dtype)) return prepare_integers(weight, x, token, prepared);
    prepare_floats(weight, x, token, prepared);
}

inline void linear_rows(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                        const Matrix& out) {
    if (weight.code == CODE_NF3) return linear_nf3_rows(weight, x, row_begin, row_end, out);
    if (uses_integers(weight, x.x_dtype)) return linear_rows_integers(weight, x, row_begin, row_end, out);
    if (is_raw(weight)) return linear_rows_raw(weight, x, row_begin, row_end, out);
    linear_rows_floats(weight, x, row_begin, row_end, out);
}

inline uint64_t read_bytes(const uint8_t* data, int64_t num_bytes) {
    uint64_t sums[8] = {};
    int64_t i = 0;
    for (; i + 64 <= num_bytes; i += 64) {
        uint64_t words[8];
        std::memcpy(words, data + i, 64);
        for (int j = 0; j < 8; j++) sums[j] ^= words[j];
    }
    uint64_t sum = 0;
    for (; i < num_bytes; i++) sum ^= data[i];
    for (const uint64_t part : sums) sum ^= part;
    return sum;
}
