// What the calls of a decode step are made of: rows between dtypes, a linear layer of one token, a rotary embedding.
#pragma once
#include <cstdint>

#include "packed.h"
#include "scalar.h"
#include "step.h"

// Below so many products, waking a thread costs more than it brings.
constexpr int64_t kWorthSharing = 1 << 18;
constexpr int kOutOfMemory = -1;

const StepKernels& step_kernels_of(int isa);

// `count` numbers from the `start`th of `from`, or to that of `to`.
void load_row(const void* from, int32_t dtype, int64_t start, int64_t count, float* to);
void store_row(const float* from, int64_t count, void* to, int32_t dtype, int64_t start);

// How many numbers a linear layer takes, and how many it gives; 0 of one that a module does not have.
inline int64_t cols_of(const Projection& p) { return p.raw.data != nullptr ? p.raw.cols : p.packed.cols; }
inline int64_t rows_of(const Projection& p) { return p.raw.data != nullptr ? p.raw.rows : p.packed.rows; }

// out [num_tokens, rows] = x [num_tokens, cols] @ weight.T, in fp32.
void multiply_raw(const StepKernels& kernels, const RawWeight& weight, const float* x, int64_t num_tokens, float* out,
                  int num_threads);

// out [rows] of one token, in fp32, rounded to `dtype` with the bias in it; `x` twice, as it is stored and in fp32.
// kOutOfMemory if memory is refused.
int project(int isa, const Projection& projection, const void* stored, const float* x, int32_t dtype, float* out,
            int num_threads);

// Each norm.width of the numbers, in place; nothing where there is no norm.
void normalise(const StepKernels& kernels, const RmsNorm& norm, float* x, int64_t count, int32_t dtype);

// Rotary embedding of the first `width` numbers of each head, which turn in pairs (i, i + width / 2); rounded after
// each operation, as tensors in `dtype` are. `cos` and `sin` are [width]; heads lie `stride` apart.
void rotate(float* x, int64_t num_heads, int64_t stride, const float* cos, const float* sin, int64_t width,
            int32_t dtype);

// out [channels] of one token, which `past` [channels, kernel_size] takes in.
void convolve(const StepKernels& kernels, const Convolution& convolution, const float* x, int64_t channels, void* past,
              float* out, int num_threads);

// log(1 + e^x), as torch has it.
float softplus(float x);
