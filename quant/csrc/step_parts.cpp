#include "step_parts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "export.h"
#include "pool.h"

EXPORT int moe_offload_linear(int isa, const PackedWeight* weight, const Matrix* x, int64_t num_tokens,
                              const Matrix* out, int num_threads);

namespace {

constexpr int64_t kPieceWeights = 1 << 17;
constexpr int64_t kPieceChannels = 1024;
constexpr float kSoftplusLinear = 20.0f;  // above it softplus(x) is x

}  // namespace

const StepKernels& step_kernels_of(int isa) { return *kernel_set_of(isa).step; }

void load_row(const void* from, int32_t dtype, int64_t start, int64_t count, float* to) {
    if (dtype == DTYPE_F32) {
        std::memcpy(to, static_cast<const float*>(from) + start, static_cast<size_t>(count) * 4);
    } else if (dtype == DTYPE_BF16) {
        const uint16_t* half = static_cast<const uint16_t*>(from) + start;
        for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(half[i]);
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = load_as_float(from, dtype, start + i);
    }
}

void store_row(const float* from, int64_t count, void* to, int32_t dtype, int64_t start) {
    if (dtype == DTYPE_F32) {
        std::memcpy(static_cast<float*>(to) + start, from, static_cast<size_t>(count) * 4);
    } else if (dtype == DTYPE_BF16) {
        uint16_t* half = static_cast<uint16_t*>(to) + start;
        for (int64_t i = 0; i < count; i++) half[i] = float_to_bf16(from[i]);
    } else {
        for (int64_t i = 0; i < count; i++) store_from_float(to, dtype, start + i, from[i]);
    }
}

void multiply_raw(const StepKernels& kernels, const RawWeight& weight, const float* x, int64_t num_tokens, float* out,
                  int num_threads) {
    auto body = [&](int64_t begin, int64_t end) { kernels.raw_rows(weight, x, num_tokens, begin, end, out); };
    const int64_t rows = std::max<int64_t>(1, kPieceWeights / std::max<int64_t>(1, weight.cols));
    parallel_for(weight.rows, rows, weight.rows * weight.cols < kWorthSharing ? 1 : num_threads, body);
}

int project(int isa, const Projection& projection, const void* stored, const float* x, int32_t dtype, float* out,
            int num_threads) {
    int64_t rows = projection.packed.rows;
    if (projection.raw.data != nullptr) {
        rows = projection.raw.rows;
        multiply_raw(step_kernels_of(isa), projection.raw, x, 1, out, num_threads);
    } else {
        const Matrix input{const_cast<void*>(stored), projection.packed.cols, dtype};
        const Matrix output{out, rows, DTYPE_F32};
        if (moe_offload_linear(isa, &projection.packed, &input, 1, &output, num_threads) != 0) return kOutOfMemory;
    }
    if (projection.bias != nullptr) {
        for (int64_t i = 0; i < rows; i++) out[i] += load_as_float(projection.bias, projection.bias_dtype, i);
    }
    round_row(out, rows, dtype);
    return 0;
}

void normalise(const StepKernels& kernels, const RmsNorm& norm, float* x, int64_t count, int32_t dtype) {
    if (norm.weight == nullptr) return;
    for (int64_t start = 0; start < count; start += norm.width) kernels.rms_norm(norm, x + start, dtype);
}

void rotate(float* x, int64_t num_heads, int64_t stride, const float* cos, const float* sin, int64_t width,
            int32_t dtype) {
    const int64_t half = width / 2;
    for (int64_t head = 0; head < num_heads; head++) {
        float* first = x + head * stride;
        float* second = first + half;
        for (int64_t i = 0; i < half; i++) {
            const float a = first[i], b = second[i];
            first[i] = rounded(rounded(a * cos[i], dtype) + rounded(-b * sin[i], dtype), dtype);
            second[i] = rounded(rounded(b * cos[half + i], dtype) + rounded(a * sin[half + i], dtype), dtype);
        }
    }
}

void convolve(const StepKernels& kernels, const Convolution& convolution, const float* x, int64_t channels, void* past,
              float* out, int num_threads) {
    auto body = [&](int64_t begin, int64_t end) { kernels.convolve(convolution, x, begin, end, past, out); };
    parallel_for(channels, kPieceChannels, num_threads, body);
}

float softplus(float x) { return x > kSoftplusLinear ? x : std::log1p(std::exp(x)); }
