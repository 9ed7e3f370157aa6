// The part of the C interface that is about many rows of activations.
#include "many_rows.h"

#include <memory>
#include <new>

#include "export.h"
#include "pool.h"
#include "scalar.h"

namespace {

// Panels are kept from call to call, since fresh pages cost as much as filling them.
uint8_t* panel_storage(int64_t num_bytes) {
    static thread_local std::unique_ptr<uint8_t[]> storage;
    static thread_local int64_t size = 0;
    if (num_bytes > size) {
        storage.reset(new (std::nothrow) uint8_t[static_cast<size_t>(num_bytes + 64)]);
        size = storage ? num_bytes : 0;
        if (!storage) return nullptr;
    }
    const auto address = reinterpret_cast<uintptr_t>(storage.get());
    return storage.get() + (64 - address % 64) % 64;
}

// Rows of a piece of work: some that follow one another, so that what comes next can be prefetched; enough pieces for
// threads to share the work evenly.
int64_t piece_rows(int64_t rows, int num_threads) {
    const int64_t blocks = rows / (kManyRows * 8 * (num_threads > 0 ? num_threads : 1));
    return (blocks < 1 ? 1 : blocks > 4 ? 4 : blocks) * kManyRows;
}

}  // namespace

// Whether moe_offload_linear_many can be called here, and is the better way to multiply many rows in bf16.
EXPORT int moe_offload_multiplies_many(int isa) {
    return many_rows_kernels() != nullptr && &kernel_set_of(isa) == avx512_kernels();
}

// out [num_tokens, rows] = x [num_tokens, cols] @ weight.T with x and the weight in bf16; -1 if memory is refused.
EXPORT int moe_offload_linear_many(int isa, const PackedWeight* weight, const Matrix* x, int64_t num_tokens,
                                   const Matrix* out, int num_threads) {
    const ManyRowsKernels& many = *many_rows_kernels();
    const KernelSet& kernels = kernel_set_of(isa);
    const int64_t batches = ceil_div(num_tokens, kManyTokens);
    const int64_t batch = batches > 0 ? ceil_div(ceil_div(num_tokens, batches), 16) * 16 : 0;
    uint8_t* panels = panel_storage(many.panel_bytes(batch, weight->cols));
    if (panels == nullptr) return -1;
    for (int64_t first = 0; first < num_tokens; first += batch) {
        const int64_t count = num_tokens - first < batch ? num_tokens - first : batch;
        Matrix rows = *x;
        rows.data = static_cast<uint8_t*>(x->data) + first * x->stride * 2;
        const Tokens tokens{rows, nullptr, count, weight->cols};
        auto fill = [&](int64_t begin, int64_t end) {
            for (int64_t panel = begin; panel < end; panel++) many.fill_panel(tokens, panel, panels);
        };
        parallel_for(many.num_panels(weight->cols), 1, num_threads, fill);
        Matrix batch_out = *out;
        batch_out.data = static_cast<uint8_t*>(out->data) + first * out->stride * (out->dtype == DTYPE_F32 ? 4 : 2);
        auto multiply = [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row += kManyRows) {
                const int64_t row_end = row + kManyRows < end ? row + kManyRows : end;
                many.multiply_rows(*weight, kernels, panels, count, row, row_end, batch_out);
            }
        };
        parallel_for(weight->rows, piece_rows(weight->rows, num_threads), num_threads, multiply);
    }
    return 0;
}
