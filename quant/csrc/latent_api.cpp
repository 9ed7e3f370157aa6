// The C interface to a decode step of multi-head latent attention, called from quant/latent_step.py.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "export.h"
#include "pool.h"
#include "scratch.h"
#include "step_parts.h"

namespace {

// Rows of a packed weight that are floats at a time.
constexpr int64_t kRowsAtOnce = 8;
// As many heads as are computed side by side, of which more do not make a piece of work quicker.
constexpr int64_t kMostHeads = 4;

thread_local Scratch scratch;

// Applies the two halves of the weight that makes keys and values of latents, one head at a time.
class Expansion {
   public:
    Expansion(int isa, const LatentAttention& a) : kernels_(kernel_set_of(isa)), a_(a) {}

    // out [rank] = query [nope_dim] @ the head's rows for keys
    bool query_to_latent(int64_t head, const float* query, float* out) const {
        const int64_t first = head * (a_.nope_dim + a_.value_dim);
        std::fill_n(out, a_.rank, 0.0f);
        if (const RawWeight& raw = a_.expand.raw; raw.data != nullptr) {
            const auto* data = static_cast<const uint8_t*>(raw.data);
            const int64_t row_bytes = a_.rank * (raw.dtype == DTYPE_F32 ? 4 : 2);
            kernels_.step->add_rows(data + first * row_bytes, raw.dtype, a_.nope_dim, a_.rank, query, out);
            return true;
        }
        uint8_t* room = scratch.reserve(kRowsAtOnce * a_.rank * 4);
        if (room == nullptr) return false;
        for (int64_t row = 0; row < a_.nope_dim; row += kRowsAtOnce) {
            const int64_t count = std::min(kRowsAtOnce, a_.nope_dim - row);
            kernels_.dequantize_region(a_.expand.packed, {first + row, first + row + count, 0, a_.rank},
                                       {room, a_.rank, DTYPE_F32});
            kernels_.step->add_rows(room, DTYPE_F32, count, a_.rank, query + row, out);
        }
        return true;
    }

    // The head's part of out [num_heads * (nope_dim + value_dim)], rows for values: those rows @ latent [rank]
    bool latent_to_values(int64_t head, const float* latent, float* out) const {
        const int64_t end = (head + 1) * (a_.nope_dim + a_.value_dim), begin = end - a_.value_dim;
        if (a_.expand.raw.data != nullptr) {
            kernels_.step->raw_rows(a_.expand.raw, latent, 1, begin, end, out);
            return true;
        }
        const PackedWeight& weight = a_.expand.packed;
        const int64_t num_bytes = kernels_.prepared_bytes(weight, DTYPE_F32);
        uint8_t* prepared = scratch.reserve(num_bytes);
        if (prepared == nullptr) return false;
        kernels_.prepare(weight, {const_cast<float*>(latent), a_.rank, DTYPE_F32}, 0, prepared);
        kernels_.linear_rows(weight, {prepared, num_bytes, 1, DTYPE_F32}, begin, end, {out, weight.rows, DTYPE_F32});
        return true;
    }

   private:
    const KernelSet& kernels_;
    const LatentAttention& a_;
};

// Pairs (2i, 2i + 1) to (i, i + half), in place.
void separate_pairs(float* x, int64_t width, float* room) {
    std::memcpy(room, x, static_cast<size_t>(width) * 4);
    for (int64_t i = 0; i < width / 2; i++) {
        x[i] = room[2 * i];
        x[width / 2 + i] = room[2 * i + 1];
    }
}

// Pairs (2i, 2i + 1) turned where they are; `turns` has a cosine and a sine for each.
void rotate_pairs(float* x, int64_t width, const float* turns, int32_t dtype) {
    for (int64_t i = 0; i < width; i += 2) {
        const float real = x[i], imaginary = x[i + 1];
        x[i] = rounded(real * turns[i] - imaginary * turns[i + 1], dtype);
        x[i + 1] = rounded(real * turns[i + 1] + imaginary * turns[i], dtype);
    }
}

// What rotates of one or more heads, `stride` apart. `tables`: cosines and sines as rotate takes them, or turns.
void rotate_part(const LatentAttention& a, float* x, int64_t num_heads, int64_t stride, const float* tables,
                 float* room) {
    for (int64_t head = 0; head < num_heads; head++) {
        if (a.rotary == ROTARY_PAIRS) rotate_pairs(x + head * stride, a.rope_dim, tables, a.dtype);
        if (a.rotary == ROTARY_PAIRS_TO_HALVES) separate_pairs(x + head * stride, a.rope_dim, room);
    }
    if (a.rotary == ROTARY_HALVES || a.rotary == ROTARY_PAIRS_TO_HALVES) {
        rotate(x, num_heads, stride, tables, tables + a.rope_dim, a.rope_dim, a.dtype);
    }
}

void scale(float* x, int64_t count, float factor, int32_t dtype) {
    if (factor == 1.0f) return;
    for (int64_t i = 0; i < count; i++) x[i] *= factor;
    round_row(x, count, dtype);
}

}  // namespace

// One token through a latent attention module: x and out [hidden]. `cos` and `sin` are [rope_dim]; for ROTARY_PAIRS `cos`
// is [rope_dim / 2] complex numbers in fp32. The token's latent and rotated key go to `position` of latents
// [capacity, rank] and keys [capacity, rope_dim]; it attends to [0, position].
EXPORT int moe_offload_latent_attention(int isa, const LatentAttention* attention, const void* x, const void* cos,
                                        const void* sin, void* latents, void* keys, int64_t position, void* out,
                                        int num_threads) {
    const LatentAttention& a = *attention;
    const StepKernels& kernels = step_kernels_of(isa);
    const int64_t hidden = cols_of(a.latent), head_dim = a.nope_dim + a.rope_dim, down_size = rows_of(a.query_down);
    const int64_t query_size = a.num_heads * head_dim, value_size = a.num_heads * a.value_dim;
    const int64_t latent_size = a.num_heads * a.rank, count = position + 1;
    const int64_t stored_size = std::max(down_size, value_size);
    const int64_t room_size = hidden + down_size + query_size + stored_size + a.rank + a.rope_dim + 3 * a.rope_dim +
                              2 * latent_size + a.num_heads * count + rows_of(a.expand) + value_size;
    std::unique_ptr<float[]> room(new (std::nothrow) float[static_cast<size_t>(room_size)]);
    if (!room) return kOutOfMemory;
    float* input = room.get();  // becomes the output, which is as long
    float* down = input + hidden;
    float* query = down + down_size;
    float* stored = query + query_size;  // in the dtype, for packed weights
    float* latent = stored + stored_size;
    float* tables = latent + a.rank + a.rope_dim;
    float* pairs = tables + 2 * a.rope_dim;
    float* query_latents = pairs + a.rope_dim;
    float* mixed = query_latents + latent_size;
    float* scores = mixed + latent_size;
    float* expanded = scores + a.num_heads * count;
    float* attended = expanded + rows_of(a.expand);

    load_row(x, a.dtype, 0, hidden, input);
    if (down_size > 0) {
        if (project(isa, a.query_down, x, input, a.dtype, down, num_threads) != 0) return kOutOfMemory;
        normalise(kernels, a.query_norm, down, down_size, a.dtype);
        store_row(down, down_size, stored, a.dtype, 0);
        if (project(isa, a.query, stored, down, a.dtype, query, num_threads) != 0) return kOutOfMemory;
    } else if (project(isa, a.query, x, input, a.dtype, query, num_threads) != 0) {
        return kOutOfMemory;
    }
    if (project(isa, a.latent, x, input, a.dtype, latent, num_threads) != 0) return kOutOfMemory;
    normalise(kernels, a.latent_norm, latent, a.rank, a.dtype);
    scale(query, query_size, a.query_factor, a.dtype);
    scale(latent, a.rank, a.latent_factor, a.dtype);
    if (a.rotary == ROTARY_PAIRS) {
        std::memcpy(tables, cos, static_cast<size_t>(a.rope_dim) * 4);
    } else if (a.rotary != ROTARY_NONE) {
        load_row(cos, a.dtype, 0, a.rope_dim, tables);
        load_row(sin, a.dtype, 0, a.rope_dim, tables + a.rope_dim);
    }
    rotate_part(a, query + a.nope_dim, a.num_heads, head_dim, tables, pairs);
    rotate_part(a, latent + a.rank, 1, a.rope_dim, tables, pairs);
    store_row(latent, a.rank, latents, a.dtype, position * a.rank);
    store_row(latent + a.rank, a.rope_dim, keys, a.dtype, position * a.rope_dim);

    const Expansion expansion(isa, a);
    std::atomic<bool> failed{false};
    auto body = [&](int64_t first, int64_t last) {
        bool done = true;
        for (int64_t head = first; head < last && done; head++) {
            done = expansion.query_to_latent(head, query + head * head_dim, query_latents + head * a.rank);
        }
        const LatentQuery some{query_latents + first * a.rank, query + first * head_dim + a.nope_dim, head_dim};
        kernels.attend_latents(a, last - first, some, latents, keys, count, scores + first * count,
                               mixed + first * a.rank);
        for (int64_t head = first; head < last && done; head++) {
            done = expansion.latent_to_values(head, mixed + head * a.rank, expanded);
            const float* values = expanded + (head + 1) * (a.nope_dim + a.value_dim) - a.value_dim;
            std::memcpy(attended + head * a.value_dim, values, static_cast<size_t>(a.value_dim) * 4);
        }
        if (!done) failed.store(true);
    };
    const int64_t products = latent_size * (a.nope_dim + a.value_dim + 2 * count);
    const int threads = products < kWorthSharing ? 1 : std::max(num_threads, 1);
    const int64_t heads_each = std::max<int64_t>(1, std::min(kMostHeads, a.num_heads / (2 * threads)));
    parallel_for(a.num_heads, heads_each, threads, body);
    if (failed.load()) return kOutOfMemory;
    round_row(attended, value_size, a.dtype);
    store_row(attended, value_size, stored, a.dtype, 0);
    if (project(isa, a.output, stored, attended, a.dtype, input, num_threads) != 0) return kOutOfMemory;
    store_row(input, hidden, out, a.dtype, 0);
    return 0;
}
