// One expert's MLP for one token, some rows of its weights at a time, in the order in which they come from a disk.
//
// Every number is what moe_layer.cpp makes of it: rows are products of their own, and what lies between the products is
// computed for all of them at once.
#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "expert_mlp.h"
#include "export.h"
#include "packed.h"
#include "pool.h"
#include "scalar.h"

namespace {

// To wake another thread takes longer than to compute with fewer weights than this; it also is a piece of work.
constexpr int64_t kWeightsPerPiece = 1 << 19;

int64_t align_up(int64_t num_bytes) { return ceil_div(num_bytes, 64) * 64; }

// An expert between two calls: x prepared for each first weight, the first product in fp32, the activated row in x's
// dtype, and that prepared for the last product.
class Expert {
   public:
    Expert(const KernelSet& kernels, const Activation& activation, const Matrix& x, const ExpertMlp& mlp)
        : kernels_(kernels), activation_(activation), x_(x), mlp_(mlp) {
        int64_t offset = 0;
        for (int p = 0; p < mlp.num_up; p++) {
            input_offset_[p] = offset;
            offset += align_up(kernels.prepared_bytes(mlp.up[p], x.dtype));
            num_first_ += mlp.up[p].rows;
        }
        first_offset_ = offset;
        activated_offset_ = first_offset_ + align_up(num_first_ * 4);
        prepared_offset_ = activated_offset_ + align_up(mlp.down.cols * 4);
        num_bytes_ = prepared_offset_ + align_up(kernels.prepared_bytes(mlp.down, x.dtype));
    }

    int64_t num_bytes() const { return num_bytes_; }

    void up(uint8_t* memory, int64_t begin, int64_t end, int num_threads) const {
        float* const first = reinterpret_cast<float*>(memory + first_offset_);
        int64_t first_row = 0;
        for (int p = 0; p < mlp_.num_up; p++) {
            const PackedWeight& weight = mlp_.up[p];
            if (begin == 0) kernels_.prepare(weight, x_, 0, memory + input_offset_[p]);
            const int64_t from = std::max<int64_t>(0, begin - first_row), to = std::min(weight.rows, end - first_row);
            if (from < to) multiply(weight, memory + input_offset_[p], from, to, first + first_row, num_threads);
            first_row += weight.rows;
        }
        if (mlp_.up_bias != nullptr) {
            for (int64_t row = begin; row < end; row++) {
                first[row] += load_as_float(mlp_.up_bias, mlp_.bias_dtype, row);
            }
        }
        if (end == num_first_) between(memory, first);
    }

    void down(uint8_t* memory, int64_t begin, int64_t end, float* out, int num_threads) const {
        multiply(mlp_.down, memory + prepared_offset_, begin, end, out, num_threads);
        if (mlp_.down_bias == nullptr) return;
        for (int64_t row = begin; row < end; row++) out[row] += load_as_float(mlp_.down_bias, mlp_.bias_dtype, row);
    }

   private:
    void between(uint8_t* memory, const float* gate) const {
        const int64_t inner = mlp_.down.cols;
        const float* up = nullptr;
        if (activation_.gating == GATING_HALVES) up = gate + inner;
        if (activation_.gating == GATING_INTERLEAVED) up = gate + 1;
        uint8_t* const activated = memory + activated_offset_;
        kernels_.activate(activation_, gate, inner, up, {activated, 0, x_.dtype}, 0);
        kernels_.prepare(mlp_.down, {activated, inner, x_.dtype}, 0, memory + prepared_offset_);
    }

    void multiply(const PackedWeight& weight, const uint8_t* input, int64_t begin, int64_t end, float* out,
                  int num_threads) const {
        const PreparedInput prepared{input, kernels_.prepared_bytes(weight, x_.dtype), 1, x_.dtype};
        const int64_t grain = std::max<int64_t>(16, kWeightsPerPiece / std::max<int64_t>(1, weight.cols) / 16 * 16);
        auto body = [&](int64_t from, int64_t to) {
            kernels_.linear_rows(weight, prepared, begin + from, begin + to, {out, 0, DTYPE_F32});
        };
        parallel_for(end - begin, grain, num_threads, body);
    }

    const KernelSet& kernels_;
    const Activation& activation_;
    const Matrix& x_;
    const ExpertMlp& mlp_;
    int64_t num_first_ = 0, num_bytes_ = 0;
    int64_t input_offset_[kMaxPieces] = {}, first_offset_ = 0, activated_offset_ = 0, prepared_offset_ = 0;
};

}  // namespace

// Bytes that an expert needs between calls of moe_offload_expert_rows, at a multiple of 64.
EXPORT int64_t moe_offload_expert_rows_bytes(int isa, const Activation* activation, int32_t dtype,
                                             const ExpertMlp* mlp) {
    const Matrix x{nullptr, 0, dtype};
    return Expert(kernel_set_of(isa), *activation, x, *mlp).num_bytes();
}

// Rows [up_begin, up_end) of the stacked first weights for x, then rows [down_begin, down_end) of the last one into
// out [down.rows] in fp32. Over some calls with the same memory each range goes from 0 up without gaps; rows of the last
// weight come after all of the first.
EXPORT void moe_offload_expert_rows(int isa, const Activation* activation, const void* x, int32_t dtype,
                                    const ExpertMlp* mlp, uint8_t* memory, int64_t up_begin, int64_t up_end,
                                    int64_t down_begin, int64_t down_end, float* out, int num_threads) {
    const Matrix input{const_cast<void*>(x), 0, dtype};
    const Expert expert(kernel_set_of(isa), *activation, input, *mlp);
    if (up_begin < up_end) expert.up(memory, up_begin, up_end, num_threads);
    if (down_begin < down_end) expert.down(memory, down_begin, down_end, out, num_threads);
}
