// A convolution over the last tokens of each channel, over the vector type V in scope.

ALWAYS_INLINE float silu(float x) { return x * sigmoid(x); }

inline void convolve(const Convolution& c, const float* x, int64_t begin, int64_t end, void* state, float* out) {
    with_dtype(c.dtype, [&](auto lanes) {
        using Lanes = decltype(lanes);
        using Type = typename Lanes::Type;
        const int64_t size = c.kernel_size;
        for (int64_t channel = begin; channel < end; channel++) {
            const auto* weight = static_cast<const Type*>(c.weight) + channel * size;
            auto* past = static_cast<Type*>(state) + channel * size;
            float sum = c.bias != nullptr ? Lanes::one(static_cast<const Type*>(c.bias)[channel]) : 0.0f;
            for (int64_t i = 0; i + 1 < size; i++) {
                past[i] = past[i + 1];
                sum += Lanes::one(weight[i]) * Lanes::one(past[i]);
            }
            store_from_float(past, c.dtype, size - 1, x[channel]);
            out[channel] = sum + Lanes::one(weight[size - 1]) * x[channel];
        }
    });
    round_row(out + begin, end - begin, c.dtype);
    for (int64_t channel = begin; channel < end; channel++) out[channel] = silu(out[channel]);
    round_row(out + begin, end - begin, c.dtype);
}
