// The C interface that quant/kernels.py loads with ctypes (which releases the GIL for the time of a call).
#include <atomic>
#include <memory>
#include <new>

#include "export.h"
#include "packed.h"
#include "pool.h"

namespace {

// Pieces of work of about this many weights: some microseconds.
constexpr int64_t kPieceWeights = 1 << 16;
// So many activations are prepared at a time, to bound memory.
constexpr int64_t kTokensAtOnce = 16;

const KernelSet* const* kernel_sets() {
    static const KernelSet* const sets[] = {portable_kernels(), avx2_kernels(), avx512_kernels(), neon_kernels(),
                                            avx512_base_kernels() != avx512_kernels() ? avx512_base_kernels() : nullptr};
    return sets;
}

int64_t piece_rows(const PackedWeight& weight, int64_t multiple_of) {
    const int64_t rows = kPieceWeights / ((weight.cols > 0 ? weight.cols : 1) * multiple_of);
    return (rows > 0 ? rows : 1) * multiple_of;
}

}  // namespace

const KernelSet& kernel_set_of(int isa) { return *kernel_sets()[isa]; }

// The name of instruction set `isa` (0 portable, 1 avx2, 2 avx512, 3 neon, 4 avx512-base), or null if it cannot
// run here or, as the last may be, is the same as another.
EXPORT const char* moe_offload_isa(int isa) {
    if (isa < 0 || isa > 4 || kernel_sets()[isa] == nullptr) return nullptr;
    return kernel_sets()[isa]->name;
}

EXPORT int moe_offload_quantize(int isa, const PackedWeight* weight, const Matrix* source, int num_threads) {
    const KernelSet& kernels = *kernel_sets()[isa];
    std::atomic<int> status{STATUS_OK};
    auto body = [&](int64_t begin, int64_t end) {
        const int result = kernels.quantize_rows(*weight, *source, begin, end);
        if (result != STATUS_OK) status.fetch_or(result);
    };
    parallel_for(weight->rows, piece_rows(*weight, weight->block_rows), num_threads, body);
    return status.load();
}

// Rows [row_begin, row_end) of the weight to out [row_end - row_begin, cols].
EXPORT void moe_offload_dequantize(int isa, const PackedWeight* weight, int64_t row_begin, int64_t row_end,
                                   const Matrix* out, int num_threads) {
    const KernelSet& kernels = *kernel_sets()[isa];
    const int64_t out_bytes = out->dtype == DTYPE_F32 ? 4 : 2;
    auto body = [&](int64_t begin, int64_t end) {
        Matrix rows = *out;
        rows.data = static_cast<uint8_t*>(out->data) + begin * out->stride * out_bytes;
        kernels.dequantize_region(*weight, {row_begin + begin, row_begin + end, 0, weight->cols}, rows);
    };
    parallel_for(row_end - row_begin, piece_rows(*weight, 1), num_threads, body);
}

// out [num_tokens, rows] = x [num_tokens, cols] @ weight.T; -1 if memory for the prepared activations is refused.
EXPORT int moe_offload_linear(int isa, const PackedWeight* weight, const Matrix* x, int64_t num_tokens,
                              const Matrix* out, int num_threads) {
    const KernelSet& kernels = *kernel_sets()[isa];
    const int64_t stride = kernels.prepared_bytes(*weight, x->dtype);
    const int64_t batch = num_tokens < kTokensAtOnce ? num_tokens : kTokensAtOnce;
    // 64-byte aligned inside, so that no vector of activations straddles two cache lines
    std::unique_ptr<uint8_t[]> storage(new (std::nothrow) uint8_t[static_cast<size_t>(batch * stride + 64)]);
    if (!storage) return -1;
    uint8_t* prepared = storage.get() + (64 - reinterpret_cast<uintptr_t>(storage.get()) % 64);
    for (int64_t first = 0; first < num_tokens; first += batch) {
        const int64_t count = num_tokens - first < batch ? num_tokens - first : batch;
        for (int64_t t = 0; t < count; t++) kernels.prepare(*weight, *x, first + t, prepared + t * stride);
        const PreparedInput input{prepared, stride, count, x->dtype};
        Matrix tokens_out = *out;
        tokens_out.data = static_cast<uint8_t*>(out->data) + first * out->stride * (out->dtype == DTYPE_F32 ? 4 : 2);
        auto body = [&](int64_t begin, int64_t end) { kernels.linear_rows(*weight, input, begin, end, tokens_out); };
        parallel_for(weight->rows, piece_rows(*weight, 4), num_threads, body);
    }
    return 0;
}

// The same with plain arguments: `shape` is the weight but for its addresses; out [num_tokens, rows] is contiguous.
EXPORT int moe_offload_linear_at(int isa, const PackedWeight* shape, void* codes, void* scales, void* x,
                                 int64_t x_stride, int x_dtype, int64_t num_tokens, void* out, int out_dtype,
                                 int num_threads) {
    PackedWeight weight = *shape;
    weight.codes = static_cast<uint8_t*>(codes);
    weight.scales = scales;
    const Matrix input{x, x_stride, x_dtype}, output{out, weight.rows, out_dtype};
    return moe_offload_linear(isa, &weight, &input, num_tokens, &output, num_threads);
}

// Reads every byte once, as the products do: the bandwidth that they are measured against.
EXPORT uint64_t moe_offload_read(int isa, const uint8_t* data, int64_t num_bytes, int num_threads) {
    const KernelSet& kernels = *kernel_sets()[isa];
    std::atomic<uint64_t> sum{0};
    auto body = [&](int64_t begin, int64_t end) { sum.fetch_add(kernels.read_bytes(data + begin, end - begin)); };
    parallel_for(num_bytes, 1 << 20, num_threads, body);
    return sum.load();
}
