// Products with many rows of bf16 activations: the weight is dequantised to bf16 a small block at a time, in a cache
// that one core has to itself, and multiplied there.
#pragma once
#include <cstddef>
#include <cstdint>

#include "expert_mlp.h"
#include "packed.h"

// So many tokens go through the weight at a time; more would not fit beside a block of it in a core's own cache.
constexpr int64_t kManyTokens = 256;
// Rows of the weight that are summed at a time, at most, and those of them that are dequantised at a time.
constexpr int64_t kManyRows = 384, kManyRowsStep = 48;

// Some tokens' activations [tokens, cols] in bf16: token t is row rows[t] of x, or row t without rows.
struct Tokens {
    Matrix x;
    const int64_t* rows;
    int64_t count;
    int64_t cols;
};

// A weight and the panels of the tokens that it is multiplied with; a bias may be null.
struct Product {
    const KernelSet& kernels;
    const PackedWeight* weight;
    const void* bias;
    int32_t bias_dtype;
    const uint8_t* panels;
    int64_t num_tokens;
};

// Where results go: token t to row rows[t] of `matrix`, or row t without rows.
struct RowsOut {
    Matrix matrix;
    const int64_t* rows;
};

struct ManyRowsKernels {
    // Room that the panels of some tokens take, in bytes; a multiple of 64.
    int64_t (*panel_bytes)(int64_t num_tokens, int64_t cols);
    int64_t (*num_panels)(int64_t cols);
    // One panel of activations, in the order in which products read them.
    void (*fill_panel)(const Tokens& tokens, int64_t panel, uint8_t* panels);
    // out[token, row] for at most kManyRows rows; each number depends on its token and its row alone.
    void (*multiply_rows)(const Product&, int64_t row_begin, int64_t row_end, const RowsOut& out);
    // out[token, i] for i in a range of at most kManyRows, or half as many where there are gates and ups: the first
    // product of an expert, and its activation.
    void (*multiply_up)(const Product&, const ExpertMlp&, const Activation&, int64_t begin, int64_t end,
                        const RowsOut& out);
};

// Null where instructions for products of bf16 are lacking, or where matrix units (AMX) make torch's product the faster.
const ManyRowsKernels* many_rows_kernels();
