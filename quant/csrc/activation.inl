// What stands between an expert's first product and its last, in fp32; operation for operation as
// quant/activation.py, except for the exponential, which is a polynomial that compilers turn into vectors.

// e^x within 2 units in the last place: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
ALWAYS_INLINE float exponential(float x) {
    x = x < 88.0f ? x : 88.0f;
    x = x > -87.0f ? x : -87.0f;
    // adding 1.5 * 2^23 leaves no bits below one, which rounds to nearest
    const float shifted = x * 1.44269504088896341f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_float((float_bits(shifted) - 0x4B400000u + 127u) << 23);
}

// Arguments far below zero end at x * e^x with e^x at its smallest, not at zero: nothing that a product would notice.
ALWAYS_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <int kFunction>
ALWAYS_INLINE float activated(float x, float alpha) {
    if constexpr (kFunction == FUNCTION_SIGMOID) return x * sigmoid(alpha * x);
    // 1 + tanh(u) is 2 sigmoid(2u)
    if constexpr (kFunction == FUNCTION_GELU_TANH) {
        return x * sigmoid(2.0f * 0.797884560802865f * (x + 0.044715f * x * x * x));
    }
    if constexpr (kFunction == FUNCTION_GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    const float positive = x < 0.0f ? 0.0f : x;
    return kFunction == FUNCTION_RELU ? positive : positive * positive;
}

template <int kFunction, int kStride>
void activate_as(const Activation& activation, const float* gate, int64_t count, const float* up, float* out) {
    const float alpha = activation.alpha, gate_limit = activation.gate_limit;
    const float activated_limit = activation.activated_limit;
    const float up_limit = activation.up_limit, up_shift = activation.up_shift;
    if (up == nullptr) {
        for (int64_t i = 0; i < count; i++) out[i] = activated<kFunction>(gate[i * kStride], alpha);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        float g = gate[i * kStride], u = up[i * kStride];
        g = g > gate_limit ? gate_limit : g;
        g = activated<kFunction>(g, alpha);
        g = g > activated_limit ? activated_limit : g;
        u = u > up_limit ? up_limit : u;
        u = u < -up_limit ? -up_limit : u;
        out[i] = g * (u + up_shift);
    }
}

template <int kStride>
void activate_strided(const Activation& activation, const float* gate, int64_t count, const float* up, float* out) {
    switch (activation.function) {
        case FUNCTION_SIGMOID: return activate_as<FUNCTION_SIGMOID, kStride>(activation, gate, count, up, out);
        case FUNCTION_GELU_TANH: return activate_as<FUNCTION_GELU_TANH, kStride>(activation, gate, count, up, out);
        case FUNCTION_GELU: return activate_as<FUNCTION_GELU, kStride>(activation, gate, count, up, out);
        case FUNCTION_RELU: return activate_as<FUNCTION_RELU, kStride>(activation, gate, count, up, out);
        default: return activate_as<FUNCTION_RELU_SQUARED, kStride>(activation, gate, count, up, out);
    }
}

inline void activate(const Activation& activation, const float* gate, int64_t count, const float* up, const Matrix& out,
                     int64_t first) {
    constexpr int64_t kRun = 256;
    const int64_t stride = activation.gating == GATING_INTERLEAVED ? 2 : 1;
    for (int64_t begin = 0; begin < count; begin += kRun) {
        const int64_t run = count - begin < kRun ? count - begin : kRun;
        const float* gates = gate + begin * stride;
        const float* ups = up == nullptr ? nullptr : up + begin * stride;
        float results[kRun];
        if (stride == 2) {
            activate_strided<2>(activation, gates, run, ups, results);
        } else {
            activate_strided<1>(activation, gates, run, ups, results);
        }
        for (int64_t i = 0; i < run; i++) store_from_float(out.data, out.dtype, first + begin + i, results[i]);
    }
}
