// The C interface to a decode step of a Mamba 2 layer, called from quant/mamba_step.py.
#include <cmath>
#include <memory>
#include <new>

#include "export.h"
#include "pool.h"
#include "step_parts.h"

// One token through a Mamba 2 layer: x and out [hidden]. `past` [channels, kernel_size] holds the convolution's last
// tokens, `state` [num_heads, head_dim, state_size] in fp32 what was taken in; both are brought up to date.
EXPORT int moe_offload_mamba(int isa, const Mamba* mamba, const void* x, void* past, float* state, void* out,
                             int num_threads) {
    const Mamba& m = *mamba;
    const StepKernels& kernels = step_kernels_of(isa);
    const int64_t hidden = cols_of(m.input), inner = m.num_heads * m.head_dim, width = m.num_groups * m.state_size;
    const int64_t channels = inner + 2 * width;
    const int64_t room_size = hidden + rows_of(m.input) + channels + 2 * inner;
    std::unique_ptr<float[]> room(new (std::nothrow) float[static_cast<size_t>(room_size)]);
    if (!room) return kOutOfMemory;
    float* input = room.get();  // becomes the output, which is as long
    float* gate = input + hidden;
    float* steps = gate + inner + channels;
    float* mixed = steps + m.num_heads;  // after the convolution
    float* result = mixed + channels;
    float* stored = result + inner;  // in the dtype, for packed weights
    load_row(x, m.dtype, 0, hidden, input);
    if (project(isa, m.input, x, input, m.dtype, gate, num_threads) != 0) return kOutOfMemory;
    convolve(kernels, m.convolution, gate + inner, channels, past, mixed, num_threads);
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; head++) {
            const float bias = rounded(load_as_float(m.step_bias, m.step_bias_dtype, head), m.dtype);
            const float step = rounded(softplus(rounded(steps[head] + bias, m.dtype)), m.dtype);
            const float decay = std::exp(-step * std::exp(load_as_float(m.decay_log, m.decay_log_dtype, head)));
            const float skip = load_as_float(m.skip, m.skip_dtype, head);
            const int64_t at = head * m.head_dim;
            const float* reads = mixed + inner + head * m.num_groups / m.num_heads * m.state_size;
            kernels.mamba_rule(m, mixed + at, reads, reads + width, step, decay, state + at * m.state_size, result + at);
            for (int64_t i = at; i < at + m.head_dim; i++) result[i] += mixed[i] * skip;
            round_row(result + at, m.head_dim, m.dtype);
            kernels.apply_silu(gate + at, m.head_dim, result + at);
        }
    };
    parallel_for(m.num_heads, 1, inner * m.state_size < kWorthSharing ? 1 : num_threads, body);
    RmsNorm norm = m.norm;
    for (int64_t start = 0; start < inner; start += norm.width) {
        kernels.rms_norm(norm, result + start, m.dtype);
        norm.weight = static_cast<const uint8_t*>(norm.weight) + norm.width * (norm.weight_dtype == DTYPE_F32 ? 4 : 2);
    }
    store_row(result, inner, stored, m.dtype, 0);
    if (project(isa, m.output, stored, result, m.dtype, input, num_threads) != 0) return kOutOfMemory;
    store_row(input, hidden, out, m.dtype, 0);
    return 0;
}
