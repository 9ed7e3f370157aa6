// A gated delta net of one token, over the vector type V in scope.

// state = state * decay + key x delta, where delta = (value - what the decayed state answers to key) * beta.
inline void delta_rule(const DeltaNet& net, const float* query, const float* key, const float* value, float decay,
                       float beta, float* state, float* out) {
    const int64_t rows = net.key_dim, cols = net.value_dim;
    for (int64_t col = 0; col < cols; col++) out[col] = 0.0f;
    add_rows_of<F32Lanes>(state, rows, cols, key, out);
    const V::Floats factor = V::set1(decay), rate = V::set1(beta), minus_decay = V::set1(-decay);
    int64_t col = 0;
    for (; col + V::kLanes <= cols; col += V::kLanes) {
        const V::Floats error = V::fma(minus_decay, V::load(out + col), V::load(value + col));
        const V::Floats delta = V::mul(error, rate);
        V::Floats answer = V::zero();
        for (int64_t row = 0; row < rows; row++) {
            float* at = state + row * cols + col;
            const V::Floats now = V::fma(V::set1(key[row]), delta, V::mul(factor, V::load(at)));
            V::store(at, now);
            answer = V::fma(V::set1(query[row]), now, answer);
        }
        V::store(out + col, answer);
    }
    for (; col < cols; col++) {
        const float delta = (value[col] - decay * out[col]) * beta;
        float answer = 0.0f;
        for (int64_t row = 0; row < rows; row++) {
            float& at = state[row * cols + col];
            at = at * decay + key[row] * delta;
            answer += query[row] * at;
        }
        out[col] = answer;
    }
}

inline void gated_norm(const DeltaNet& net, const float* gate, float* x) {
    rms_norm(net.norm, x, net.dtype);
    for (int64_t i = 0; i < net.norm.width; i++) x[i] *= silu(gate[i]);
    round_row(x, net.norm.width, net.dtype);
}
