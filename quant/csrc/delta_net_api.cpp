// The C interface to a decode step of a gated delta net, called from quant/delta_net.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "export.h"
#include "pool.h"
#include "step_parts.h"

namespace {

constexpr float kNormEpsilon = 1e-6f;  // of queries and keys

// What the projections of a token give: [channels], [num_value_heads * value_dim], and two of [num_value_heads].
struct Inputs {
    float *mixed, *gate, *beta, *decay;
};

void copy(const float*& from, int64_t count, float* to) {
    std::memcpy(to, from, static_cast<size_t>(count) * 4);
    from += count;
}

// From what is together by key heads.
void ungroup(const DeltaNet& n, const float* mixed, const float* betas, const Inputs& to) {
    const int64_t group = n.num_value_heads / n.num_key_heads, keys = n.num_key_heads * n.key_dim;
    for (int64_t head = 0; head < n.num_key_heads; head++) {
        const int64_t first_value = head * group * n.value_dim;
        copy(mixed, n.key_dim, to.mixed + head * n.key_dim);
        copy(mixed, n.key_dim, to.mixed + keys + head * n.key_dim);
        copy(mixed, group * n.value_dim, to.mixed + 2 * keys + first_value);
        copy(mixed, group * n.value_dim, to.gate + first_value);
        copy(betas, group, to.beta + head * group);
        copy(betas, group, to.decay + head * group);
    }
}

// To length `length`, in place.
void normalise_head(float* x, int64_t count, float length) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
    const float factor = length / std::sqrt(sum + kNormEpsilon);
    for (int64_t i = 0; i < count; i++) x[i] *= factor;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace

// One token through a gated delta net: x and out [hidden]. `past` [channels, kernel_size] holds the convolution's last
// tokens, `state` [num_value_heads, key_dim, value_dim] in fp32 what was learnt; both are brought up to date.
EXPORT int moe_offload_delta_net(int isa, const DeltaNet* net, const void* x, void* past, float* state, void* out,
                                 int num_threads) {
    const DeltaNet& n = *net;
    const StepKernels& kernels = step_kernels_of(isa);
    const int64_t hidden = cols_of(n.mixed), values = n.num_value_heads * n.value_dim;
    const int64_t keys = n.num_key_heads * n.key_dim, channels = 2 * keys + values;
    const int64_t grouped = n.is_grouped ? channels + values + 2 * n.num_value_heads : 0;
    const int64_t room_size = hidden + grouped + 2 * channels + 3 * values + 2 * n.num_value_heads;
    std::unique_ptr<float[]> room(new (std::nothrow) float[static_cast<size_t>(room_size)]);
    if (!room) return kOutOfMemory;
    float* input = room.get();  // becomes the output, which is as long
    const Inputs made{input + hidden + grouped, input + hidden + grouped + 2 * channels,
                      input + hidden + grouped + 2 * channels + values,
                      input + hidden + grouped + 2 * channels + values + n.num_value_heads};
    float* mixed = made.mixed + channels;  // after the convolution
    float* answers = made.decay + n.num_value_heads;
    float* stored = answers + values;  // in the dtype, for packed weights
    load_row(x, n.dtype, 0, hidden, input);
    const auto make = [&](const Projection& p, float* to) {
        return project(isa, p, x, input, n.dtype, to, num_threads) == 0;
    };
    if (n.is_grouped) {
        float *together = input + hidden, *betas = together + channels + values;
        if (!make(n.mixed, together) || !make(n.beta, betas)) return kOutOfMemory;
        ungroup(n, together, betas, made);
    } else if (!make(n.mixed, made.mixed) || !make(n.gate, made.gate) || !make(n.beta, made.beta) ||
               !make(n.decay, made.decay)) {
        return kOutOfMemory;
    }
    convolve(kernels, n.convolution, made.mixed, channels, past, mixed, num_threads);
    for (int64_t head = 0; head < n.num_key_heads; head++) {
        normalise_head(mixed + head * n.key_dim, n.key_dim, 1.0f / std::sqrt(static_cast<float>(n.key_dim)));
        normalise_head(mixed + keys + head * n.key_dim, n.key_dim, 1.0f);
    }
    const int64_t group = n.num_value_heads / n.num_key_heads;
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; head++) {
            const float beta = rounded(sigmoid(made.beta[head]), n.dtype);
            const float slope = std::exp(load_as_float(n.decay_log, n.decay_log_dtype, head));
            const float bias = load_as_float(n.decay_bias, n.decay_bias_dtype, head);
            const float decay = std::exp(-slope * softplus(made.decay[head] + bias));
            const float* query = mixed + head / group * n.key_dim;
            const int64_t at = head * n.value_dim;
            kernels.delta_rule(n, query, query + keys, mixed + 2 * keys + at, decay, beta,
                               state + at * n.key_dim, answers + at);
            round_row(answers + at, n.value_dim, n.dtype);
            kernels.gated_norm(n, made.gate + at, answers + at);
        }
    };
    parallel_for(n.num_value_heads, 1, values * n.key_dim < kWorthSharing ? 1 : num_threads, body);
    store_row(answers, values, stored, n.dtype, 0);
    if (project(isa, n.output, stored, answers, n.dtype, input, num_threads) != 0) return kOutOfMemory;
    store_row(input, hidden, out, n.dtype, 0);
    return 0;
}
