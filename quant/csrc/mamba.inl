// A Mamba 2 layer of one token, over the vector type V in scope.

// state = state * decay + step * x * input, for each number of x.
inline void mamba_rule(const Mamba& m, const float* x, const float* input, const float* output, float step, float decay,
                       float* state, float* out) {
    const int64_t cols = m.state_size;
    const V::Floats factor = V::set1(decay);
    for (int64_t row = 0; row < m.head_dim; row++) {
        float* at = state + row * cols;
        const float taken = step * x[row];
        const V::Floats some = V::set1(taken);
        V::Floats sums = V::zero();
        int64_t col = 0;
        for (; col + V::kLanes <= cols; col += V::kLanes) {
            const V::Floats now = V::fma(factor, V::load(at + col), V::mul(some, V::load(input + col)));
            V::store(at + col, now);
            sums = V::fma(now, V::load(output + col), sums);
        }
        float sum = V::sum(sums);
        for (; col < cols; col++) {
            at[col] = at[col] * decay + taken * input[col];
            sum += at[col] * output[col];
        }
        out[row] = sum;
    }
}

inline void apply_silu(const float* gate, int64_t count, float* x) {
    for (int64_t i = 0; i < count; i++) x[i] *= silu(gate[i]);
}
