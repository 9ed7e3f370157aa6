// Products with weights kept in bf16 or fp16, in fp32: a row as it lies, two sums for each token that take vectors by
// turns.

inline bool is_raw(const PackedWeight& weight) { return weight.code == CODE_BF16 || weight.code == CODE_F16; }

struct Bf16Weights {
    static ALWAYS_INLINE V::Floats load(const uint16_t* p) { return V::bf16(p); }
};
struct F16Weights {
    static ALWAYS_INLINE V::Floats load(const uint16_t* p) { return V::f16(p); }
};

template <class Weights, int kTokens>
ALWAYS_INLINE void multiply_raw(const PackedWeight& weight, const PreparedInput& x, int64_t row, int64_t token,
                                const Matrix& out) {
    const uint16_t* const values = reinterpret_cast<const uint16_t*>(weight.codes + row * weight.row_bytes);
    const int64_t cols = weight.cols;
    const float* inputs[kTokens];
    for (int t = 0; t < kTokens; t++) {
        inputs[t] = reinterpret_cast<const float*>(x.data + (token + t) * x.stride_bytes);
    }
    Sums<2, kTokens> sums;
    sums.clear();
    const auto add = [&](int sum, const uint16_t* from, int64_t col) {
        const V::Floats lanes = Weights::load(from);
        for (int t = 0; t < kTokens; t++) sums.at[sum][t] = V::fma(lanes, V::load(inputs[t] + col), sums.at[sum][t]);
    };
    int64_t col = 0;
    for (; col + 2 * V::kLanes <= cols; col += 2 * V::kLanes) {
        V::prefetch(reinterpret_cast<const uint8_t*>(values + col) + kPrefetchBytes);
        add(0, values + col, col);
        add(1, values + col + V::kLanes, col + V::kLanes);
    }
    for (; col < cols; col += V::kLanes) {
        const int64_t rest = cols - col < V::kLanes ? cols - col : V::kLanes;
        uint16_t last[V::kLanes] = {};
        std::memcpy(last, values + col, static_cast<size_t>(rest) * 2);
        add(0, last, col);
    }
    for (int t = 0; t < kTokens; t++) {
        const float sum = V::sum(sums.at[0][t]) + V::sum(sums.at[1][t]);
        store_from_float(out.data, out.dtype, (token + t) * out.stride + row, sum);
    }
}

template <class Weights>
void linear_rows_raw_of(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                        const Matrix& out) {
    for (int64_t row = row_begin; row < row_end; row++) {
        int64_t token = 0;
        for (; token + 4 <= x.num_tokens; token += 4) multiply_raw<Weights, 4>(weight, x, row, token, out);
        for (; token + 2 <= x.num_tokens; token += 2) multiply_raw<Weights, 2>(weight, x, row, token, out);
        for (; token < x.num_tokens; token++) multiply_raw<Weights, 1>(weight, x, row, token, out);
    }
}

inline void linear_rows_raw(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                            const Matrix& out) {
    if (weight.code == CODE_BF16) return linear_rows_raw_of<Bf16Weights>(weight, x, row_begin, row_end, out);
    linear_rows_raw_of<F16Weights>(weight, x, row_begin, row_end, out);
}
