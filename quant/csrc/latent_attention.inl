// Multi-head latent attention of one token, over the vector type V in scope, on latents as they are cached. For one token
// the rows that make keys and values of a latent are applied to the query and to the result instead (the same sums in
// another order), so that the past is not expanded: rank + rope_dim numbers of each cached token are read for all heads.

template <class Lanes>
void add_rows_of(const typename Lanes::Type* rows, int64_t count, int64_t cols, const float* x, float* out) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) {
        const auto* w = rows + row * cols;
        const V::Floats a = V::set1(x[row]), b = V::set1(x[row + 1]), c = V::set1(x[row + 2]), d = V::set1(x[row + 3]);
        int64_t col = 0;
        for (; col + V::kLanes <= cols; col += V::kLanes) {
            V::Floats sum = V::fma(a, Lanes::load(w + col), V::load(out + col));
            sum = V::fma(b, Lanes::load(w + cols + col), sum);
            sum = V::fma(c, Lanes::load(w + 2 * cols + col), sum);
            V::store(out + col, V::fma(d, Lanes::load(w + 3 * cols + col), sum));
        }
        for (; col < cols; col++) {
            for (int i = 0; i < 4; i++) out[col] += x[row + i] * Lanes::one(w[i * cols + col]);
        }
    }
    for (; row < count; row++) {
        const auto* w = rows + row * cols;
        const V::Floats factor = V::set1(x[row]);
        int64_t col = 0;
        for (; col + V::kLanes <= cols; col += V::kLanes) {
            V::store(out + col, V::fma(factor, Lanes::load(w + col), V::load(out + col)));
        }
        for (; col < cols; col++) out[col] += x[row] * Lanes::one(w[col]);
    }
}

inline void add_rows(const void* rows, int32_t dtype, int64_t count, int64_t cols, const float* x, float* out) {
    with_dtype(dtype, [&](auto lanes) {
        using Lanes = decltype(lanes);
        add_rows_of<Lanes>(static_cast<const typename Lanes::Type*>(rows), count, cols, x, out);
    });
}

// Sums of kHeads queries against kTokens rows: one chain each, over the columns of one matrix and then of another.
template <int kHeads, int kTokens>
struct ScoreSums {
    V::Floats lanes[kHeads][kTokens];
    float rest[kHeads][kTokens];

    ALWAYS_INLINE void clear() {
        for (int h = 0; h < kHeads; h++) {
            for (int t = 0; t < kTokens; t++) {
                lanes[h][t] = V::zero();
                rest[h][t] = 0.0f;
            }
        }
    }

    template <class Lanes>
    ALWAYS_INLINE void add(const float* query, int64_t stride, const typename Lanes::Type* rows, int64_t cols) {
        int64_t col = 0;
        for (; col + V::kLanes <= cols; col += V::kLanes) {
            V::Floats keys[kTokens];
            for (int t = 0; t < kTokens; t++) keys[t] = Lanes::load(rows + t * cols + col);
            for (int h = 0; h < kHeads; h++) {
                const V::Floats part = V::load(query + h * stride + col);
                for (int t = 0; t < kTokens; t++) lanes[h][t] = V::fma(part, keys[t], lanes[h][t]);
            }
        }
        for (; col < cols; col++) {
            for (int h = 0; h < kHeads; h++) {
                for (int t = 0; t < kTokens; t++) {
                    rest[h][t] += query[h * stride + col] * Lanes::one(rows[t * cols + col]);
                }
            }
        }
    }
};

template <class Lanes, int kHeads, int kTokens>
ALWAYS_INLINE void latent_scores(const LatentAttention& a, const LatentQuery& query, const typename Lanes::Type* latents,
                                 const typename Lanes::Type* keys, int64_t count, float* scores) {
    ScoreSums<kHeads, kTokens> sums;
    sums.clear();
    sums.template add<Lanes>(query.latent, a.rank, latents, a.rank);
    sums.template add<Lanes>(query.rotated, query.rotated_stride, keys, a.rope_dim);
    for (int h = 0; h < kHeads; h++) {
        for (int t = 0; t < kTokens; t++) {
            scores[h * count + t] = (V::sum(sums.lanes[h][t]) + sums.rest[h][t]) * a.scaling;
        }
    }
}

template <class Lanes, int kHeads>
void attend_latents_of(const LatentAttention& a, const LatentQuery& query, const typename Lanes::Type* latents,
                       const typename Lanes::Type* keys, int64_t count, float* scores, float* out) {
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
        latent_scores<Lanes, kHeads, 2>(a, query, latents + j * a.rank, keys + j * a.rope_dim, count, scores + j);
    }
    if (j < count) {
        latent_scores<Lanes, kHeads, 1>(a, query, latents + j * a.rank, keys + j * a.rope_dim, count, scores + j);
    }
    for (int h = 0; h < kHeads; h++) softmax(scores + h * count, count, nullptr);
    sum_values<Lanes, kHeads>(scores, latents, count, a.rank, out);
}

inline void attend_latents(const LatentAttention& a, int64_t num_heads, const LatentQuery& query, const void* latents,
                           const void* keys, int64_t count, float* scores, float* out) {
    with_dtype(a.dtype, [&](auto lanes) {
        using Lanes = decltype(lanes);
        using Type = typename Lanes::Type;
        by_heads(num_heads, [&](int64_t head, auto heads) {
            const LatentQuery some{query.latent + head * a.rank, query.rotated + head * query.rotated_stride,
                                   query.rotated_stride};
            attend_latents_of<Lanes, decltype(heads)::value>(a, some, static_cast<const Type*>(latents),
                                                             static_cast<const Type*>(keys), count,
                                                             scores + head * count, out + head * a.rank);
        });
    });
}
