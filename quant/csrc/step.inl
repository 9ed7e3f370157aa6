// The dense part of a decode step over the vector type V in scope: norms, products with raw weights, attention.
// Every sum runs in an order that follows from the shapes alone: not from threads, addresses or what is beside it.

struct F32Lanes {
    using Type = float;
    static ALWAYS_INLINE V::Floats load(const float* p) { return V::load(p); }
    static ALWAYS_INLINE float one(float value) { return value; }
};
struct Bf16Lanes {
    using Type = uint16_t;
    static ALWAYS_INLINE V::Floats load(const uint16_t* p) { return V::bf16(p); }
    static ALWAYS_INLINE float one(uint16_t value) { return bf16_to_float(value); }
};
struct F16Lanes {
    using Type = uint16_t;
    static ALWAYS_INLINE V::Floats load(const uint16_t* p) { return V::f16(p); }
    static ALWAYS_INLINE float one(uint16_t value) { return f16_to_float(value); }
};

template <class Body>
ALWAYS_INLINE void with_dtype(int32_t dtype, Body body) {
    if (dtype == DTYPE_F32) {
        body(F32Lanes{});
    } else if (dtype == DTYPE_BF16) {
        body(Bf16Lanes{});
    } else {
        body(F16Lanes{});
    }
}

template <class Lanes>
ALWAYS_INLINE float dot(const float* x, const typename Lanes::Type* w, int64_t count) {
    V::Floats sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 4 * V::kLanes <= count; i += 4 * V::kLanes) {
        for (int j = 0; j < 4; j++) {
            sums[j] = V::fma(Lanes::load(w + i + j * V::kLanes), V::load(x + i + j * V::kLanes), sums[j]);
        }
    }
    for (; i + V::kLanes <= count; i += V::kLanes) sums[0] = V::fma(Lanes::load(w + i), V::load(x + i), sums[0]);
    float total = (V::sum(sums[0]) + V::sum(sums[1])) + (V::sum(sums[2]) + V::sum(sums[3]));
    for (; i < count; i++) total += Lanes::one(w[i]) * x[i];
    return total;
}

inline void raw_rows(const RawWeight& weight, const float* x, int64_t num_tokens, int64_t row_begin, int64_t row_end,
                     float* out) {
    with_dtype(weight.dtype, [&](auto lanes) {
        using Lanes = decltype(lanes);
        const auto* data = static_cast<const typename Lanes::Type*>(weight.data);
        for (int64_t row = row_begin; row < row_end; row++) {
            for (int64_t t = 0; t < num_tokens; t++) {
                out[t * weight.rows + row] = dot<Lanes>(x + t * weight.cols, data + row * weight.cols, weight.cols);
            }
        }
    });
}

inline void rms_norm(const RmsNorm& norm, float* x, int32_t dtype) {
    const float scale = 1.0f / std::sqrt(dot<F32Lanes>(x, x, norm.width) / static_cast<float>(norm.width) + norm.epsilon);
    const float offset = norm.offset;
    with_dtype(norm.weight_dtype, [&](auto lanes) {
        using Lanes = decltype(lanes);
        const auto* weight = static_cast<const typename Lanes::Type*>(norm.weight);
        if (dtype == DTYPE_F32) {
            for (int64_t i = 0; i < norm.width; i++) x[i] = x[i] * scale * (Lanes::one(weight[i]) + offset);
        } else if (dtype == DTYPE_BF16) {
            if (norm.rounds_first) {
                for (int64_t i = 0; i < norm.width; i++) x[i] = bf16_to_float(float_to_bf16(x[i] * scale));
                for (int64_t i = 0; i < norm.width; i++) x[i] *= (Lanes::one(weight[i]) + offset);
            } else {
                for (int64_t i = 0; i < norm.width; i++) x[i] = (Lanes::one(weight[i]) + offset) * (x[i] * scale);
            }
            for (int64_t i = 0; i < norm.width; i++) x[i] = bf16_to_float(float_to_bf16(x[i]));
        } else {
            for (int64_t i = 0; i < norm.width; i++) {
                const float scaled = norm.rounds_first ? f16_to_float(float_to_f16(x[i] * scale)) : x[i] * scale;
                x[i] = f16_to_float(float_to_f16((Lanes::one(weight[i]) + offset) * scaled));
            }
        }
    });
}

// x -> e^x for x <= 0, within 2e-7 of it: 2^n times a polynomial (Taylor's) of what is left, at most half a power of 2.
// Plain operations that compilers turn into vectors.
ALWAYS_INLINE float exp_of_negative(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    const float power = x * 1.44269504f < -126.0f ? -126.0f : x * 1.44269504f;
    const float shifted = power + kRound;
    const float rest = (power - (shifted - kRound)) * 0.693147181f;
    float value = 1.0f / 720.0f;
    value = value * rest + 1.0f / 120.0f;
    value = value * rest + 1.0f / 24.0f;
    value = value * rest + 1.0f / 6.0f;
    value = value * rest + 0.5f;
    value = value * rest + 1.0f;
    value = value * rest + 1.0f;
    const uint32_t exponent = (float_bits(shifted) - float_bits(kRound)) << 23;
    return x < -87.0f ? 0.0f : bits_float(float_bits(value) + exponent);
}

// Scores to weights that add up to one, or to less where a sink takes its share.
inline void softmax(float* scores, int64_t count, const float* sink) {
    float largest = sink != nullptr ? *sink : scores[0];
    for (int64_t i = 0; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < count; i++) scores[i] = exp_of_negative(scores[i] - largest);
    V::Floats sums = V::zero();
    const V::Floats one = V::set1(1.0f);
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) sums = V::fma(V::load(scores + i), one, sums);
    float total = V::sum(sums);
    for (; i < count; i++) total += scores[i];
    if (sink != nullptr) total += exp_of_negative(*sink - largest);
    const float factor = 1.0f / total;
    for (int64_t j = 0; j < count; j++) scores[j] *= factor;
}

// Positions at a time whose values stay in the nearest cache while all their columns are summed.
constexpr int64_t kAttendTile = 128;

// body(head, kHeads) for heads that share keys: as many at once as registers hold, so that a key is read for all of them.
template <class Body>
ALWAYS_INLINE void by_heads(int64_t num_heads, Body body) {
    int64_t head = 0;
    for (; num_heads - head >= 4; head += 4) body(head, std::integral_constant<int, 4>{});
    for (; num_heads - head >= 2; head += 2) body(head, std::integral_constant<int, 2>{});
    if (head < num_heads) body(head, std::integral_constant<int, 1>{});
}

// out [kHeads, dim] = scores [kHeads, count] @ values [count, dim]
template <class Lanes, int kHeads>
void sum_values(const float* scores, const typename Lanes::Type* values, int64_t count, int64_t dim, float* out) {
    for (int64_t i = 0; i < kHeads * dim; i++) out[i] = 0.0f;
    for (int64_t tile = 0; tile < count; tile += kAttendTile) {
        const int64_t end = tile + kAttendTile < count ? tile + kAttendTile : count;
        int64_t col = 0;
        for (; col + 2 * V::kLanes <= dim; col += 2 * V::kLanes) {
            V::Floats low[kHeads], high[kHeads];
            for (int h = 0; h < kHeads; h++) {
                low[h] = V::load(out + h * dim + col);
                high[h] = V::load(out + h * dim + col + V::kLanes);
            }
            for (int64_t j = tile; j < end; j++) {
                const V::Floats first = Lanes::load(values + j * dim + col);
                const V::Floats second = Lanes::load(values + j * dim + col + V::kLanes);
                for (int h = 0; h < kHeads; h++) {
                    const V::Floats weight = V::set1(scores[h * count + j]);
                    low[h] = V::fma(weight, first, low[h]);
                    high[h] = V::fma(weight, second, high[h]);
                }
            }
            for (int h = 0; h < kHeads; h++) {
                V::store(out + h * dim + col, low[h]);
                V::store(out + h * dim + col + V::kLanes, high[h]);
            }
        }
        for (; col < dim; col++) {
            for (int h = 0; h < kHeads; h++) {
                float sum = out[h * dim + col];
                for (int64_t j = tile; j < end; j++) sum += scores[h * count + j] * Lanes::one(values[j * dim + col]);
                out[h * dim + col] = sum;
            }
        }
    }
}

template <class Lanes, int kHeads>
void attend_heads(const Attention& a, int64_t first_head, const float* query, const typename Lanes::Type* keys,
                  const typename Lanes::Type* values, int64_t count, float* scores, float* out) {
    const int64_t dim = a.head_dim;
    for (int64_t j = 0; j < count; j++) {
        for (int h = 0; h < kHeads; h++) {
            scores[h * count + j] = dot<Lanes>(query + h * dim, keys + j * dim, dim) * a.scaling;
        }
    }
    for (int h = 0; h < kHeads; h++) {
        float sink = 0.0f;
        if (a.sinks != nullptr) sink = load_as_float(a.sinks, a.sinks_dtype, first_head + h);
        softmax(scores + h * count, count, a.sinks != nullptr ? &sink : nullptr);
    }
    sum_values<Lanes, kHeads>(scores, values, count, dim, out);
}

inline void apply_gate(const float* gate, int64_t count, int32_t dtype, float* x) {
    if (dtype == DTYPE_F32) {
        for (int64_t i = 0; i < count; i++) x[i] *= sigmoid(gate[i]);
    } else if (dtype == DTYPE_BF16) {
        for (int64_t i = 0; i < count; i++) x[i] *= bf16_to_float(float_to_bf16(sigmoid(gate[i])));
    } else {
        for (int64_t i = 0; i < count; i++) x[i] *= f16_to_float(float_to_f16(sigmoid(gate[i])));
    }
    round_row(x, count, dtype);
}

inline void attend(const Attention& a, int64_t kv_head, const float* query, const void* keys, const void* values,
                   int64_t begin, int64_t end, float* scores, float* out) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    with_dtype(a.dtype, [&](auto lanes) {
        using Lanes = decltype(lanes);
        const auto* k = static_cast<const typename Lanes::Type*>(keys) + begin * a.head_dim;
        const auto* v = static_cast<const typename Lanes::Type*>(values) + begin * a.head_dim;
        by_heads(group, [&](int64_t head, auto heads) {
            attend_heads<Lanes, decltype(heads)::value>(a, kv_head * group + head, query + head * a.head_dim, k, v,
                                                        end - begin, scores, out + head * a.head_dim);
        });
    });
}
