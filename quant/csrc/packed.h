// What a packed weight is, and the interface between the C API and the kernels of each instruction set.
// The byte layout is specified in quant/layout.py and docs/pack-format.md.
#pragma once
#include <cstdint>

#include "activation.h"

enum Code : int32_t { CODE_NF4 = 0, CODE_INT4 = 1, CODE_E2M1 = 2, CODE_FP4 = 3, CODE_INT8 = 4, CODE_E4M3 = 5,
                      CODE_NF3 = 6 };
// Numbers themselves, without scales, whose blocks are 1 x 64: products take them, and nothing quantises to them.
enum RawCode : int32_t { CODE_BF16 = 16, CODE_F16 = 17 };
enum ScaleType : int32_t { SCALE_F16 = 0, SCALE_F32 = 1, SCALE_E8M0 = 2 };
enum DType : int32_t { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2 };
enum Status : int32_t { STATUS_OK = 0, STATUS_NONFINITE = 1, STATUS_SCALE_OVERFLOW = 2 };

// One packed [rows, cols] weight; scales are [ceil(rows / block_rows), ceil(cols / block_cols)].
// A layer's experts are arrays of these, so a call for a whole layer needs no other description.
struct PackedWeight {
    uint8_t* codes;
    void* scales;
    int64_t rows;
    int64_t cols;
    int64_t row_bytes;
    int64_t block_rows;
    int64_t block_cols;
    int32_t code;
    int32_t scale_type;
};

// A matrix of activations or weights in a float dtype; stride in elements.
struct Matrix {
    void* data;
    int64_t stride;
    int32_t dtype;
};

// A part of a weight; col_begin is a multiple of 64.
struct Region {
    int64_t row_begin;
    int64_t row_end;
    int64_t col_begin;
    int64_t col_end;
};

// What few-row products take: each token's activations as a kernel set's `prepare` made them for a weight of that code,
// shape of blocks and number of columns; opaque to everybody else. Made once, they serve every such weight.
struct PreparedInput {
    const uint8_t* data;   // token t at data + t * stride_bytes, 64-byte aligned
    int64_t stride_bytes;  // prepared_bytes(weight, x_dtype), or more
    int64_t num_tokens;
    int32_t x_dtype;  // DType of the activations before
};

struct StepKernels;  // step.h

struct KernelSet {
    const char* name;
    int (*quantize_rows)(const PackedWeight&, const Matrix& source, int64_t row_begin, int64_t row_end);
    void (*dequantize_region)(const PackedWeight&, const Region&, const Matrix& out);
    // of one token, a multiple of 64
    int64_t (*prepared_bytes)(const PackedWeight&, int32_t x_dtype);
    void (*prepare)(const PackedWeight&, const Matrix& x, int64_t token, void* prepared);
    // out[token, row] for rows in the range; each row's result depends on that row and token alone
    void (*linear_rows)(const PackedWeight&, const PreparedInput&, int64_t row_begin, int64_t row_end,
                        const Matrix& out);
    uint64_t (*read_bytes)(const uint8_t* data, int64_t num_bytes);
    // out[first + i], i < count, from the gates and ups there; up is null where there are gates alone
    void (*activate)(const Activation&, const float* gate, int64_t count, const float* up, const Matrix& out,
                     int64_t first);
    const StepKernels* step;
};

// That of a number as moe_offload_isa takes it.
const KernelSet& kernel_set_of(int isa);

// Null where the machine or the build lacks the instructions.
const KernelSet* portable_kernels();
const KernelSet* avx2_kernels();
const KernelSet* avx512_base_kernels();
const KernelSet* avx512_vnni_kernels();
// With what more of AVX-512 this machine has: VNNI, and VBMI for nf3; the base set where that is nothing.
const KernelSet* avx512_kernels();
const KernelSet* neon_kernels();
