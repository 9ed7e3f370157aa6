// Products of bf16 with AVX-512: lanes are tokens, and each pair of a row's weights is broadcast to all of them, so that
// weights are used in the order in which dequantising leaves them. A number's sum runs over the columns in their order,
// whatever is computed beside it.
#include "many_rows.h"

#include "scalar.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace {

constexpr int kLanes = 16;
// Columns of a panel. Those of 64 tokens are more than a first-level cache holds, which costs less than loading and storing
// sums more often.
constexpr int64_t kPanelCols = 512;
// Tokens of one tile of sums, in vectors.
constexpr int kMaxVectors = 4;
// Elements from one row of dequantised weights to the next, such that rows do not fall on the same lines of the cache.
constexpr int64_t kWeightStride = kPanelCols + 32;

int64_t padded_tokens(int64_t num_tokens) { return ceil_div(num_tokens, kLanes) * kLanes; }

int64_t panel_pairs(int64_t cols, int64_t begin) {
    return ceil_div(cols - begin < kPanelCols ? cols - begin : kPanelCols, 2);
}

int64_t panel_bytes(int64_t num_tokens, int64_t cols) { return padded_tokens(num_tokens) * ceil_div(cols, 2) * 4; }

int64_t num_panels(int64_t cols) { return ceil_div(cols, kPanelCols); }

ALWAYS_INLINE void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        pairs[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        pairs[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        pairs[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        pairs[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(pairs[i], pairs[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(pairs[i], pairs[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(pairs[i + 4], pairs[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(pairs[i + 4], pairs[i + 12], 0xdd);
    }
}

// Of 64 tokens at a time, then of those left over: pair after pair of columns, and in each pair token after token.
void fill_panel(const Tokens& tokens, int64_t panel, uint8_t* panels) {
    const int64_t begin = panel * kPanelCols;
    const int64_t cols = tokens.cols - begin < kPanelCols ? tokens.cols - begin : kPanelCols;
    const int64_t pairs = ceil_div(cols, 2);
    const int64_t padded = padded_tokens(tokens.count);
    const uint16_t* x = static_cast<const uint16_t*>(tokens.x.data);
    uint8_t* to = panels + begin / 2 * padded * 4;
    for (int64_t token = 0; token < padded; token += kLanes) {
        const int64_t first = token / (kMaxVectors * kLanes) * (kMaxVectors * kLanes);
        const int64_t width = padded - first < kMaxVectors * kLanes ? padded - first : kMaxVectors * kLanes;
        uint8_t* block = to + (first * pairs + token - first) * 4;
        for (int64_t col = 0; col < cols; col += 2 * kLanes) {
            const int64_t rest = cols - col;
            const __mmask32 mask = rest >= 32 ? ~__mmask32{0} : (__mmask32{1} << rest) - 1;
            __m512i rows[kLanes];
            for (int i = 0; i < kLanes; i++) {
                const int64_t t = token + i;
                rows[i] = t < tokens.count
                              ? _mm512_maskz_loadu_epi16(
                                    mask, x + (tokens.rows ? tokens.rows[t] : t) * tokens.x.stride + begin + col)
                              : _mm512_setzero_si512();
            }
            transpose(rows);
            const int64_t count = ceil_div(rest < 32 ? rest : 32, 2);
            for (int64_t i = 0; i < count; i++) _mm512_storeu_si512(block + (col / 2 + i) * width * 4, rows[i]);
        }
    }
}

// kRows rows of weights times kVectors * 16 tokens, added to sums [rows, stride] or, at first, put there.
template <int kVectors, int kRows>
void multiply_tile(const uint16_t* weights, const uint8_t* panel, int64_t pairs, float* sums, int64_t stride,
                   bool is_first) {
    __m512 at[kRows][kVectors];
    for (int r = 0; r < kRows; r++) {
        for (int v = 0; v < kVectors; v++) {
            at[r][v] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride + v * kLanes);
        }
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512bh x[kVectors];
        for (int v = 0; v < kVectors; v++) x[v] = (__m512bh)_mm512_loadu_si512(panel + v * 64);
#pragma GCC unroll 24
        for (int r = 0; r < kRows; r++) {
            int32_t two;
            std::memcpy(&two, weights + r * kWeightStride, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) at[r][v] = _mm512_dpbf16_ps(at[r][v], x[v], weight);
        }
        panel += kVectors * 64;
        weights += 2;
    }
    for (int r = 0; r < kRows; r++) {
        for (int v = 0; v < kVectors; v++) _mm512_storeu_ps(sums + r * stride + v * kLanes, at[r][v]);
    }
}

// 16 tokens' numbers of 16 rows, to where they belong.
void store_sums(__m512i (&rows)[16], int64_t num_tokens, __mmask16 mask, int64_t token, int64_t row,
                const RowsOut& out) {
    transpose(rows);
    const Matrix& matrix = out.matrix;
    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t index = (out.rows ? out.rows[token + t] : token + t) * matrix.stride + row;
        const __m512 values = _mm512_castsi512_ps(rows[t]);
        if (matrix.dtype == DTYPE_F32) {
            _mm512_mask_storeu_ps(static_cast<float*>(matrix.data) + index, mask, values);
        } else {
            const __m256i half = matrix.dtype == DTYPE_BF16 ? (__m256i)_mm512_cvtneps_pbh(values)
                                                            : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(matrix.data) + index, mask, half);
        }
    }
}

// Inlined always: for GCC, a function that prefetches and does no more has no effect, and calls of it are left out.
ALWAYS_INLINE void prefetch_bytes(const void* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
}

// What is dequantised next: a panel's share of some rows, and their scales if those begin with it. It is asked for row by
// row while this block is multiplied: asked for at once, most of it came too late.
struct NextBlock {
    const uint8_t* codes;
    int64_t row_bytes;
    int64_t panel_bytes;
    int64_t num_rows;
    const uint8_t* scales;
    int64_t scale_bytes;  // of a row of blocks
    int64_t block_rows;

    ALWAYS_INLINE void prefetch(int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end && row < num_rows; row++) {
            prefetch_bytes(codes + row * row_bytes, panel_bytes);
            if (scales != nullptr && row % block_rows == 0) {
                prefetch_bytes(scales + row / block_rows * scale_bytes, scale_bytes);
            }
        }
    }
};

// Of the rows from `row` on that are dequantised at once, the panel that begins at col.
NextBlock block_at(const PackedWeight& weight, int64_t row, int64_t col) {
    const int64_t panel_bytes = weight.row_bytes * kPanelCols / weight.cols;
    const int64_t num_rows = row + kManyRowsStep < weight.rows ? kManyRowsStep : weight.rows - row;
    const uint8_t* codes = weight.codes + row * weight.row_bytes + weight.row_bytes * col / weight.cols;
    if (col > 0 || weight.code == CODE_BF16 || weight.code == CODE_F16) {
        return {codes, weight.row_bytes, panel_bytes, num_rows, nullptr, 0, 1};
    }
    const int64_t one_scale = weight.scale_type == SCALE_F32 ? 4 : weight.scale_type == SCALE_F16 ? 2 : 1;
    const int64_t scale_bytes = ceil_div(weight.cols, weight.block_cols) * one_scale;
    const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + row / weight.block_rows * scale_bytes;
    return {codes, weight.row_bytes, panel_bytes, num_rows, scales, scale_bytes, weight.block_rows};
}

// `next` may be null.
template <int kVectors>
void multiply_tiles(const uint16_t* weights, int64_t num_rows, const uint8_t* panel, int64_t pairs, float* sums,
                    int64_t stride, bool is_first, const NextBlock* next) {
    constexpr int kRows = 24 / kVectors;  // what fits in registers; kManyRowsStep is a multiple for every kVectors
    for (int64_t row = 0; row < num_rows; row += kRows) {
        if (next != nullptr) next->prefetch(row, row + kRows);
        multiply_tile<kVectors, kRows>(weights + row * kWeightStride, panel, pairs, sums + row * stride, stride,
                                       is_first);
    }
}

// Rows of sums beyond those asked for are written, up to a whole tile.
constexpr int64_t kMostTileRows = 24;

// What one thread works in.
struct Workspace {
    alignas(64) uint16_t weights[kManyRowsStep * kWeightStride];
    alignas(64) float sums[(kManyRows + kMostTileRows) * kManyTokens];
};

Workspace& workspace() {
    static thread_local Workspace instance;
    return instance;
}

// Adds a panel's share of rows [row_begin, row_end) to `sums`, or puts it there if the panel is the first; `next` is
// asked for meanwhile.
void sum_block(const Product& product, int64_t row_begin, int64_t row_end, int64_t col, const NextBlock& next,
               float* sums) {
    const PackedWeight& weight = *product.weight;
    uint16_t* weights = workspace().weights;
    const int64_t end = col + kPanelCols < weight.cols ? col + kPanelCols : weight.cols;
    product.kernels.dequantize_region(weight, {row_begin, row_end, col, end}, {weights, kWeightStride, DTYPE_BF16});
    if (end % 2 != 0) {
        for (int64_t row = 0; row < row_end - row_begin; row++) weights[row * kWeightStride + end - col] = 0;
    }
    const int64_t padded = padded_tokens(product.num_tokens), pairs = panel_pairs(weight.cols, col);
    const uint8_t* panel = product.panels + col / 2 * padded * 4;
    for (int64_t token = 0; token < padded; token += kMaxVectors * kLanes) {
        const int64_t vectors = (padded - token) / kLanes;
        const auto multiply = vectors >= 4   ? multiply_tiles<4>
                              : vectors == 3 ? multiply_tiles<3>
                              : vectors == 2 ? multiply_tiles<2>
                                             : multiply_tiles<1>;
        multiply(weights, row_end - row_begin, panel + token * pairs * 4, pairs, sums + token, padded, col == 0,
                 token == 0 ? &next : nullptr);
    }
}

// Sums of rows [row_begin, row_end), plus the bias of each, to workspace().sums from row `to_row` on. Each panel goes
// through all of the rows: the activations' panels together are more than a core's own cache holds.
void sum_rows(const Product& product, int64_t row_begin, int64_t row_end, int64_t to_row) {
    const PackedWeight& weight = *product.weight;
    const int64_t num_rows = row_end - row_begin;
    const int64_t padded = padded_tokens(product.num_tokens);
    float* sums = workspace().sums + to_row * padded;
    if (weight.cols == 0) std::memset(sums, 0, static_cast<size_t>(num_rows * padded * 4));
    for (int64_t col = 0; col < weight.cols; col += kPanelCols) {
        for (int64_t row = row_begin; row < row_end; row += kManyRowsStep) {
            const int64_t end = row + kManyRowsStep < row_end ? row + kManyRowsStep : row_end;
            const NextBlock next = end < row_end                   ? block_at(weight, end, col)
                                   : col + kPanelCols < weight.cols ? block_at(weight, row_begin, col + kPanelCols)
                                                                    : block_at(weight, row_end, 0);
            sum_block(product, row, end, col, next, sums + (row - row_begin) * padded);
        }
    }
    if (product.bias == nullptr) return;
    for (int64_t row = 0; row < num_rows; row++) {
        const float bias = load_as_float(product.bias, product.bias_dtype, row_begin + row);
        for (int64_t token = 0; token < padded; token++) sums[row * padded + token] += bias;
    }
}

// The first rows of workspace().sums, to columns of `out` from `to_col` on.
void store_rows(int64_t num_rows, int64_t num_tokens, int64_t to_col, const RowsOut& out) {
    const int64_t padded = padded_tokens(num_tokens);
    const float* sums = workspace().sums;
    for (int64_t row = 0; row < num_rows; row += kLanes) {
        const int64_t rest = num_rows - row;
        const __mmask16 mask = static_cast<__mmask16>(rest >= kLanes ? 0xFFFF : (1 << rest) - 1);
        for (int64_t token = 0; token < num_tokens; token += kLanes) {
            __m512i rows[kLanes];
            for (int i = 0; i < kLanes; i++) {
                rows[i] = _mm512_loadu_si512(sums + (row + (i < rest ? i : 0)) * padded + token);
            }
            const int64_t count = num_tokens - token < kLanes ? num_tokens - token : kLanes;
            store_sums(rows, count, mask, token, to_col + row, out);
        }
    }
}

void multiply_rows(const Product& product, int64_t row_begin, int64_t row_end, const RowsOut& out) {
    sum_rows(product, row_begin, row_end, 0);
    store_rows(row_end - row_begin, product.num_tokens, row_begin, out);
}

// Rows [begin, end) of an expert's stacked first weights, to workspace().sums from `to_row` on.
void sum_up_rows(Product product, const ExpertMlp& expert, int64_t begin, int64_t end, int64_t to_row) {
    int64_t first_row = 0;
    for (int p = 0; p < expert.num_up; p++) {
        product.weight = &expert.up[p];
        const int64_t from = begin > first_row ? begin - first_row : 0;
        const int64_t rows = expert.up[p].rows;
        const int64_t to = end - first_row < rows ? end - first_row : rows;
        if (expert.up_bias != nullptr) {
            const int64_t bytes = expert.bias_dtype == DTYPE_F32 ? 4 : 2;
            product.bias = static_cast<const uint8_t*>(expert.up_bias) + first_row * bytes;
        }
        if (from < to) sum_rows(product, from, to, to_row + first_row + from - begin);
        first_row += rows;
    }
}

void multiply_up(const Product& product, const ExpertMlp& expert, const Activation& activation, int64_t begin,
                 int64_t end, const RowsOut& out) {
    const int64_t count = end - begin;
    const int64_t padded = padded_tokens(product.num_tokens);
    float* sums = workspace().sums;
    Activation by_rows = activation;
    int64_t step = 1, up_row = kManyRows / 2;
    if (activation.gating == GATING_INTERLEAVED) {
        by_rows.gating = GATING_HALVES;  // a gate's tokens lie side by side, and so do its up's
        sum_up_rows(product, expert, 2 * begin, 2 * end, 0);
        step = 2, up_row = 1;
    } else {
        sum_up_rows(product, expert, begin, end, 0);
        if (activation.gating == GATING_HALVES) {
            sum_up_rows(product, expert, expert.down.cols + begin, expert.down.cols + end, up_row);
        }
    }
    const bool is_gated = activation.gating != GATING_NONE;
    for (int64_t i = 0; i < count; i++) {
        const float* gate = sums + i * step * padded;
        product.kernels.activate(by_rows, gate, padded, is_gated ? gate + up_row * padded : nullptr,
                                 {sums + i * padded, 0, DTYPE_F32}, 0);
    }
    store_rows(count, product.num_tokens, begin, out);
}

bool has_matrix_units() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1) != 0;  // AMX-BF16
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const ManyRowsKernels* many_rows_kernels() {
    static const ManyRowsKernels kernels = {panel_bytes, num_panels, fill_panel, multiply_rows, multiply_up};
    static const bool runs = __builtin_cpu_supports("avx512bf16") && avx512_kernels() != nullptr && !has_matrix_units();
    return runs ? &kernels : nullptr;
}

#else

const ManyRowsKernels* many_rows_kernels() { return nullptr; }

#endif
