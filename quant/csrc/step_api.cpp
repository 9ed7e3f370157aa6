// The C interface to the dense part of a decode step, called from quant/step.py.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "export.h"
#include "pool.h"
#include "step_parts.h"

// Numbers whose norms take about as long as waking a thread.
constexpr int64_t kNormPiece = 1 << 16;

// out [num_tokens, rows] = x [num_tokens, cols] @ weight.T + bias, summed in fp32 and rounded once. Both are contiguous.
EXPORT int moe_offload_raw_linear(int isa, const RawWeight* weight, const void* bias, int bias_dtype, const void* x,
                                  int64_t num_tokens, int dtype, void* out, int num_threads) {
    const int64_t rows = weight->rows, cols = weight->cols;
    std::unique_ptr<float[]> room(new (std::nothrow) float[static_cast<size_t>(num_tokens * (rows + cols))]);
    if (!room) return kOutOfMemory;
    float* result = room.get() + num_tokens * cols;
    load_row(x, dtype, 0, num_tokens * cols, room.get());
    multiply_raw(step_kernels_of(isa), *weight, room.get(), num_tokens, result, num_threads);
    if (bias != nullptr) {
        for (int64_t t = 0; t < num_tokens; t++) {
            for (int64_t i = 0; i < rows; i++) result[t * rows + i] += load_as_float(bias, bias_dtype, i);
        }
    }
    store_row(result, num_tokens * rows, out, dtype, 0);
    return 0;
}

// Each of num_rows contiguous rows of x, normalised.
EXPORT int moe_offload_rms_norm(int isa, const RmsNorm* norm, const void* x, int64_t num_rows, int dtype, void* out,
                                int num_threads) {
    const StepKernels& kernels = step_kernels_of(isa);
    std::atomic<bool> has_memory{true};
    auto body = [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> row(new (std::nothrow) float[static_cast<size_t>(norm->width)]);
        if (!row) has_memory = false;
        for (int64_t r = begin; r < end && row; r++) {
            load_row(x, dtype, r * norm->width, norm->width, row.get());
            kernels.rms_norm(*norm, row.get(), dtype);
            store_row(row.get(), norm->width, out, dtype, r * norm->width);
        }
    };
    parallel_for(num_rows, std::max<int64_t>(1, kNormPiece / norm->width), num_threads, body);
    return has_memory ? 0 : kOutOfMemory;
}

// One token through an attention module: x and out [hidden], cos and sin [width] or [width / 2] (`table`). Its key and
// value go to `position` of keys and values [num_kv_heads, capacity, head_dim]; it attends to [begin, position].
EXPORT int moe_offload_attention(int isa, const Attention* attention, const void* x, const void* cos, const void* sin,
                                 int64_t width, int64_t table, void* keys, void* values, int64_t capacity,
                                 int64_t begin, int64_t position, void* out, int num_threads) {
    const Attention& a = *attention;
    const StepKernels& kernels = step_kernels_of(isa);
    const int64_t hidden = cols_of(a.query), query_size = a.num_heads * a.head_dim, kv_size = a.num_kv_heads * a.head_dim;
    const int64_t count = position + 1 - begin, group = a.num_heads / a.num_kv_heads;
    const int64_t gated_size = a.is_gated ? 3 * query_size : 0;
    const int64_t room_size =
        hidden + 2 * query_size + 2 * kv_size + 2 * width + a.num_heads * count + query_size + gated_size;
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
    float* gate = scores + a.num_heads * count;
    float* gated = gate + query_size;  // queries and gates as they come
    load_row(x, a.dtype, 0, hidden, input);
    if (project(isa, a.query, x, input, a.dtype, a.is_gated ? gated : query, num_threads) != 0 ||
        project(isa, a.key, x, input, a.dtype, key, num_threads) != 0 ||
        project(isa, a.value, x, input, a.dtype, value, num_threads) != 0) {
        return kOutOfMemory;
    }
    for (int64_t head = 0; a.is_gated && head < a.num_heads; head++) {
        std::copy_n(gated + 2 * head * a.head_dim, a.head_dim, query + head * a.head_dim);
        std::copy_n(gated + (2 * head + 1) * a.head_dim, a.head_dim, gate + head * a.head_dim);
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
    round_row(attended, query_size, a.dtype);
    if (a.is_gated) kernels.apply_gate(gate, query_size, a.dtype, attended);
    store_row(attended, query_size, stored, a.dtype, 0);
    if (project(isa, a.output, stored, attended, a.dtype, input, num_threads) != 0) return kOutOfMemory;
    store_row(input, hidden, out, a.dtype, 0);
    return 0;
}
