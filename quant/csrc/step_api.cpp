// The C interface to the dense part of a decode step, called from quant/step.py.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "export.h"
#include "pool.h"
#include "scalar.h"
#include "step.h"

EXPORT int moe_offload_linear(int isa, const PackedWeight* weight, const Matrix* x, int64_t num_tokens,
                              const Matrix* out, int num_threads);

namespace {

constexpr int64_t kPieceWeights = 1 << 17;
// Below so many products, waking a thread costs more than it brings.
constexpr int64_t kWorthSharing = 1 << 18;
constexpr int kOutOfMemory = -1;

const StepKernels& kernels_of(int isa) { return *kernel_set_of(isa).step; }

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

float rounded(float value, int32_t dtype) {
    if (dtype == DTYPE_F32) return value;
    return dtype == DTYPE_BF16 ? bf16_to_float(float_to_bf16(value)) : f16_to_float(float_to_f16(value));
}

void multiply_raw(const StepKernels& kernels, const RawWeight& weight, const float* x, int64_t num_tokens, float* out,
                  int num_threads) {
    auto body = [&](int64_t begin, int64_t end) { kernels.raw_rows(weight, x, num_tokens, begin, end, out); };
    const int64_t rows = std::max<int64_t>(1, kPieceWeights / std::max<int64_t>(1, weight.cols));
    parallel_for(weight.rows, rows, weight.rows * weight.cols < kWorthSharing ? 1 : num_threads, body);
}

// out [rows] of one token, in fp32, rounded to `dtype` with the bias in it; `x` twice, as it is stored and in fp32.
int project(int isa, const Projection& projection, const void* stored, const float* x, int32_t dtype, float* out,
            int num_threads) {
    int64_t rows = projection.packed.rows;
    if (projection.raw.data != nullptr) {
        rows = projection.raw.rows;
        multiply_raw(kernels_of(isa), projection.raw, x, 1, out, num_threads);
    } else {
        const Matrix input{const_cast<void*>(stored), projection.packed.cols, dtype};
        const Matrix output{out, rows, DTYPE_F32};
        if (moe_offload_linear(isa, &projection.packed, &input, 1, &output, num_threads) != 0) return kOutOfMemory;
    }
    if (projection.bias != nullptr) {
        for (int64_t i = 0; i < rows; i++) out[i] += load_as_float(projection.bias, projection.bias_dtype, i);
    }
    if (dtype == DTYPE_BF16) {
        for (int64_t i = 0; i < rows; i++) out[i] = bf16_to_float(float_to_bf16(out[i]));
    } else if (dtype == DTYPE_F16) {
        for (int64_t i = 0; i < rows; i++) out[i] = f16_to_float(float_to_f16(out[i]));
    }
    return 0;
}

void normalise(const StepKernels& kernels, const RmsNorm& norm, float* x, int64_t count, int32_t dtype) {
    if (norm.weight == nullptr) return;
    for (int64_t start = 0; start < count; start += norm.width) kernels.rms_norm(norm, x + start, dtype);
}

// Rotary embedding of the first `width` numbers of each head, which turn in pairs (i, i + width / 2); rounded after
// each operation, as tensors in `dtype` are. `cos` and `sin` are [width].
void rotate(float* x, int64_t num_heads, int64_t head_dim, const float* cos, const float* sin, int64_t width,
            int32_t dtype) {
    const int64_t half = width / 2;
    for (int64_t head = 0; head < num_heads; head++) {
        float* first = x + head * head_dim;
        float* second = first + half;
        for (int64_t i = 0; i < half; i++) {
            const float a = first[i], b = second[i];
            first[i] = rounded(rounded(a * cos[i], dtype) + rounded(-b * sin[i], dtype), dtype);
            second[i] = rounded(rounded(b * cos[half + i], dtype) + rounded(a * sin[half + i], dtype), dtype);
        }
    }
}

}  // namespace

// out [num_tokens, rows] = x [num_tokens, cols] @ weight.T + bias, summed in fp32 and rounded once. Both are contiguous.
EXPORT int moe_offload_raw_linear(int isa, const RawWeight* weight, const void* bias, int bias_dtype, const void* x,
                                  int64_t num_tokens, int dtype, void* out, int num_threads) {
    const int64_t rows = weight->rows, cols = weight->cols;
    std::unique_ptr<float[]> room(new (std::nothrow) float[static_cast<size_t>(num_tokens * (rows + cols))]);
    if (!room) return kOutOfMemory;
    float* result = room.get() + num_tokens * cols;
    load_row(x, dtype, 0, num_tokens * cols, room.get());
    multiply_raw(kernels_of(isa), *weight, room.get(), num_tokens, result, num_threads);
    if (bias != nullptr) {
        for (int64_t t = 0; t < num_tokens; t++) {
            for (int64_t i = 0; i < rows; i++) result[t * rows + i] += load_as_float(bias, bias_dtype, i);
        }
    }
    store_row(result, num_tokens * rows, out, dtype, 0);
    return 0;
}

// Each of num_rows contiguous rows of x, normalised.
EXPORT int moe_offload_rms_norm(int isa, const RmsNorm* norm, const void* x, int64_t num_rows, int dtype, void* out) {
    const StepKernels& kernels = kernels_of(isa);
    std::unique_ptr<float[]> row(new (std::nothrow) float[static_cast<size_t>(norm->width)]);
    if (!row) return kOutOfMemory;
    for (int64_t r = 0; r < num_rows; r++) {
        load_row(x, dtype, r * norm->width, norm->width, row.get());
        kernels.rms_norm(*norm, row.get(), dtype);
        store_row(row.get(), norm->width, out, dtype, r * norm->width);
    }
    return 0;
}

// One token through an attention module: x and out [hidden], cos and sin [width] or [width / 2] (`table`). Its key and
// value go to `position` of keys and values [num_kv_heads, capacity, head_dim]; it attends to [begin, position].
EXPORT int moe_offload_attention(int isa, const Attention* attention, const void* x, const void* cos, const void* sin,
                                 int64_t width, int64_t table, void* keys, void* values, int64_t capacity,
                                 int64_t begin, int64_t position, void* out, int num_threads) {
    const Attention& a = *attention;
    const StepKernels& kernels = kernels_of(isa);
    const auto cols_of = [](const Projection& p) { return p.raw.data != nullptr ? p.raw.cols : p.packed.cols; };
    const int64_t hidden = cols_of(a.query), query_size = a.num_heads * a.head_dim, kv_size = a.num_kv_heads * a.head_dim;
    const int64_t count = position + 1 - begin, group = a.num_heads / a.num_kv_heads;
    const int64_t room_size = hidden + 2 * query_size + 2 * kv_size + 2 * width + a.num_heads * count + query_size;
    std::unique_ptr<float[]> room(new (std::nothrow) float[static_cast<size_t>(room_size)]);
    if (!room) return kOutOfMemory;
    float* input = room.get();  // becomes the output, which is as long
    float* query = input + hidden;
    float* attended = query + query_size;
    float* stored = attended + query_size;  // in the dtype, for packed weights
    float* key = stored + query_size;
    float* value = key + kv_size;
    float* cosines = value + kv_size;
    float* sines = cosines + width;
    float* scores = sines + width;
    load_row(x, a.dtype, 0, hidden, input);
    if (project(isa, a.query, x, input, a.dtype, query, num_threads) != 0 ||
        project(isa, a.key, x, input, a.dtype, key, num_threads) != 0 ||
        project(isa, a.value, x, input, a.dtype, value, num_threads) != 0) {
        return kOutOfMemory;
    }
    normalise(kernels, a.query_norm, query, query_size, a.dtype);
    normalise(kernels, a.key_norm, key, kv_size, a.dtype);
    for (int64_t start = 0; start < width; start += table) {
        load_row(cos, a.dtype, 0, table, cosines + start);
        load_row(sin, a.dtype, 0, table, sines + start);
    }
    rotate(query, a.num_heads, a.head_dim, cosines, sines, width, a.dtype);
    rotate(key, a.num_kv_heads, a.head_dim, cosines, sines, width, a.dtype);
    for (int64_t head = 0; head < a.num_kv_heads; head++) {
        const int64_t at = (head * capacity + position) * a.head_dim;
        store_row(key + head * a.head_dim, a.head_dim, keys, a.dtype, at);
        store_row(value + head * a.head_dim, a.head_dim, values, a.dtype, at);
    }
    const int64_t head_bytes = capacity * a.head_dim * (a.dtype == DTYPE_F32 ? 4 : 2);
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; head++) {
            const int64_t from = head * group * a.head_dim;
            kernels.attend(a, head, query + from, static_cast<const uint8_t*>(keys) + head * head_bytes,
                           static_cast<const uint8_t*>(values) + head * head_bytes, begin, position + 1,
                           scores + head * group * count, attended + from);
        }
    };
    parallel_for(a.num_kv_heads, 1, query_size * count < kWorthSharing ? 1 : num_threads, body);
    for (int64_t i = 0; i < query_size; i++) attended[i] = rounded(attended[i], a.dtype);
    store_row(attended, query_size, stored, a.dtype, 0);
    if (project(isa, a.output, stored, attended, a.dtype, input, num_threads) != 0) return kOutOfMemory;
    store_row(input, hidden, out, a.dtype, 0);
    return 0;
}
