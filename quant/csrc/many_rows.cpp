// The part of the C interface that is about many rows of activations.
#include "many_rows.h"

#include <algorithm>

#include "export.h"
#include "pool.h"
#include "scalar.h"
#include "scratch.h"

namespace {

thread_local Scratch scratch;

// body(begin, end) for ranges of at most `at_most` rows: the larger, the seldomer the activations are read anew; as small
// as lets threads share the work evenly.
template <class Body>
void for_rows(int64_t rows, int64_t at_most, int num_threads, const Body& body) {
    const int64_t share = rows / (8 * (num_threads > 0 ? num_threads : 1));
    const int64_t steps = ceil_div(share, kManyRowsStep);
    const int64_t piece_rows = std::min(at_most, (steps > 1 ? steps : 1) * kManyRowsStep);
    auto piece = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += piece_rows) body(row, std::min(row + piece_rows, end));
    };
    parallel_for(rows, piece_rows, num_threads, piece);
}

void fill_panels(const ManyRowsKernels& many, const Tokens& tokens, uint8_t* panels, int num_threads) {
    auto fill = [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; panel++) many.fill_panel(tokens, panel, panels);
    };
    parallel_for(many.num_panels(tokens.cols), 1, num_threads, fill);
}

// Tokens that go through at once: as many in each batch, but for the last.
int64_t batch_tokens(int64_t num_tokens) {
    const int64_t batches = ceil_div(num_tokens, kManyTokens);
    return batches > 0 ? ceil_div(ceil_div(num_tokens, batches), 16) * 16 : 0;
}

Matrix rows_from(const Matrix& matrix, int64_t row) {
    const int64_t bytes = matrix.dtype == DTYPE_F32 ? 4 : 2;
    return {static_cast<uint8_t*>(matrix.data) + row * matrix.stride * bytes, matrix.stride, matrix.dtype};
}

}  // namespace

// Whether the functions below can be called here, and are the better way to multiply many rows in bf16.
EXPORT int moe_offload_multiplies_many(int isa) {
    return many_rows_kernels() != nullptr && &kernel_set_of(isa) == avx512_kernels();
}

// out [num_tokens, rows] = x [num_tokens, cols] @ weight.T with x and the weight in bf16; -1 if memory is refused.
EXPORT int moe_offload_linear_many(int isa, const PackedWeight* weight, const Matrix* x, int64_t num_tokens,
                                   const Matrix* out, int num_threads) {
    const ManyRowsKernels& many = *many_rows_kernels();
    const int64_t batch = batch_tokens(num_tokens);
    uint8_t* panels = scratch.reserve(many.panel_bytes(batch, weight->cols));
    if (panels == nullptr) return -1;
    for (int64_t first = 0; first < num_tokens; first += batch) {
        const int64_t count = num_tokens - first < batch ? num_tokens - first : batch;
        fill_panels(many, {rows_from(*x, first), nullptr, count, weight->cols}, panels, num_threads);
        const Product product{kernel_set_of(isa), weight, nullptr, DTYPE_F32, panels, count};
        const RowsOut to{rows_from(*out, first), nullptr};
        for_rows(weight->rows, kManyRows, num_threads,
                 [&](int64_t begin, int64_t end) { many.multiply_rows(product, begin, end, to); });
    }
    return 0;
}

// One expert's MLP of rows x_rows [num_tokens] of x in bf16, to rows out_rows of out; the activations between its
// products are rounded to bf16. -1 if memory is refused.
EXPORT int moe_offload_expert_many(int isa, const Activation* activation, const ExpertMlp* expert, const Matrix* x,
                                   const int64_t* x_rows, int64_t num_tokens, const Matrix* out,
                                   const int64_t* out_rows, int num_threads) {
    const ManyRowsKernels& many = *many_rows_kernels();
    const KernelSet& kernels = kernel_set_of(isa);
    const int64_t hidden = expert->up[0].cols, inner = expert->down.cols;
    const int64_t batch = batch_tokens(num_tokens);
    const int64_t activated_bytes = ceil_div(batch * inner * 2, 64) * 64;
    uint8_t* memory = scratch.reserve(activated_bytes + many.panel_bytes(batch, hidden > inner ? hidden : inner));
    if (memory == nullptr) return -1;
    uint8_t* panels = memory + activated_bytes;
    const Matrix activated{memory, inner, DTYPE_BF16};
    const int64_t up_rows = activation->gating == GATING_NONE ? kManyRows : kManyRows / 2;
    for (int64_t first = 0; first < num_tokens; first += batch) {
        const int64_t count = num_tokens - first < batch ? num_tokens - first : batch;
        fill_panels(many, {*x, x_rows + first, count, hidden}, panels, num_threads);
        const Product up{kernels, nullptr, nullptr, expert->bias_dtype, panels, count};
        for_rows(inner, up_rows, num_threads, [&](int64_t begin, int64_t end) {
            many.multiply_up(up, *expert, *activation, begin, end, {activated, nullptr});
        });
        fill_panels(many, {activated, nullptr, count, inner}, panels, num_threads);
        const Product down{kernels, &expert->down, expert->down_bias, expert->bias_dtype, panels, count};
        for_rows(expert->down.rows, kManyRows, num_threads, [&](int64_t begin, int64_t end) {
            many.multiply_rows(down, begin, end, {*out, out_rows + first});
        });
    }
    return 0;
}
