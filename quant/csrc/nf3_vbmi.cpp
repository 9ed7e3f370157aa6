// Few-row products of nf3 with AVX-512's VBMI, which puts the codes of a whole unit together at once, and VNNI: the same
// bits as of nf3_linear.inl with AVX-512, from the same prepared activations.
#include <cstddef>
#include <cstring>

#include "nf3.h"
#include "packed.h"
#include "scalar.h"
#include "tables.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace {

// As in linear.inl.
constexpr int64_t kAheadBytes = 16384;

struct Decoder {
    __m512i shifts, windows;

    Decoder() {
        // word w of a unit holds the codes 8k + w of both halves: lane 8k + w shifts those to its bytes' lowest bits
        alignas(64) uint16_t shift[32];
        // of the 64 high bits, those of codes i and 32 + i go to bit 2 of the bytes of lane i
        alignas(64) uint8_t window[64];
        for (int i = 0; i < kNf3Group; i++) {
            shift[i] = static_cast<uint16_t>(i / 8 * 2);
            window[2 * i] = static_cast<uint8_t>((i - 2) & 63);
            window[2 * i + 1] = static_cast<uint8_t>(i + 30);
        }
        shifts = _mm512_load_si512(shift);
        windows = _mm512_load_si512(window);
    }

    // The entries of the halves of a unit. Tables are there four times over, so an index may have more than three bits.
    ALWAYS_INLINE void decode(const uint8_t* unit, size_t tables, __m512i* entries) const {
        const __m512i pairs = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
        int64_t high_bits;
        std::memcpy(&high_bits, unit + 16, 8);
        const __m512i high = _mm512_multishift_epi64_epi8(windows, _mm512_set1_epi64(high_bits));
        // the lowest two bits of each byte from the one, the others from the other
        const __m512i index =
            _mm512_ternarylogic_epi64(_mm512_set1_epi8(3), _mm512_srlv_epi16(pairs, shifts), high, 0xCA);
        entries[0] = _mm512_permutexvar_epi16(index, table(tables & 15));
        entries[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), table(tables >> 4));
    }
    static ALWAYS_INLINE __m512i table(size_t number) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf3Values[number])));
    }
};

// Rows [row, row + kRows) times tokens [token, token + kTokens).
template <int kRows, int kTokens>
ALWAYS_INLINE void multiply(const PackedWeight& weight, const Decoder& decoder, const PreparedInput& x, int64_t row,
                            int64_t token, const Matrix& out) {
    const int64_t units = nf3_units(weight), row_bytes = weight.row_bytes;
    const uint8_t* const codes = weight.codes + row * row_bytes;
    const int64_t ahead = ceil_div(kAheadBytes, kRows * row_bytes) * kRows * row_bytes;
    const int16_t* inputs[kTokens];
    const float* steps[kTokens];
    for (int t = 0; t < kTokens; t++) {
        inputs[t] = reinterpret_cast<const int16_t*>(x.data + (token + t) * x.stride_bytes);
        steps[t] = reinterpret_cast<const float*>(inputs[t] + units * kNf3Unit);
    }
    __m512 total[kRows][kTokens];
    for (int r = 0; r < kRows; r++) {
        for (int t = 0; t < kTokens; t++) total[r][t] = _mm512_setzero_ps();
    }
    for (int64_t u = 0; u < units; u++) {
        __m512i entries[kRows][2];
        for (int r = 0; r < kRows; r++) {
            const uint8_t* const row_codes = codes + r * row_bytes;
            const uint8_t* const unit = row_codes + u * kNf3UnitBytes;
            _mm_prefetch(reinterpret_cast<const char*>(unit + ahead), _MM_HINT_T0);
            decoder.decode(unit, row_codes[units * kNf3UnitBytes + u], entries[r]);
        }
        for (int t = 0; t < kTokens; t++) {
            const __m512i first = _mm512_loadu_si512(inputs[t] + u * kNf3Unit);
            const __m512i second = _mm512_loadu_si512(inputs[t] + u * kNf3Unit + kNf3Group);
            const __m512 step = _mm512_set1_ps(steps[t][u]);
            for (int r = 0; r < kRows; r++) {
                // a lane sums four products of 15 and 13 bits
                const __m512i sums = _mm512_dpwssd_epi32(_mm512_madd_epi16(entries[r][0], first), entries[r][1], second);
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), step, total[r][t]);
            }
        }
    }
    for (int r = 0; r < kRows; r++) {
        const float scale = scale_at(weight, row + r) * kNf3Factor;
        for (int t = 0; t < kTokens; t++) {
            store_from_float(out.data, out.dtype, (token + t) * out.stride + row + r,
                             _mm512_reduce_add_ps(total[r][t]) * scale);
        }
    }
}

template <int kRows>
ALWAYS_INLINE void multiply_rows(const PackedWeight& weight, const Decoder& decoder, const PreparedInput& x,
                                 int64_t row, const Matrix& out) {
    int64_t token = 0;
    for (; token + 4 <= x.num_tokens; token += 4) multiply<kRows, 4>(weight, decoder, x, row, token, out);
    for (; token + 2 <= x.num_tokens; token += 2) multiply<kRows, 2>(weight, decoder, x, row, token, out);
    for (; token < x.num_tokens; token++) multiply<kRows, 1>(weight, decoder, x, row, token, out);
}

void linear_rows(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                 const Matrix& out) {
    if (weight.code != CODE_NF3 || !nf3_uses_integers(x.x_dtype) || weight.cols == 0) {
        return avx512_vnni_kernels()->linear_rows(weight, x, row_begin, row_end, out);
    }
    const Decoder decoder;
    constexpr int kRows = 2;
    int64_t row = row_begin;
    for (; row + kRows <= row_end; row += kRows) multiply_rows<kRows>(weight, decoder, x, row, out);
    for (; row < row_end; row++) multiply_rows<1>(weight, decoder, x, row, out);
}

KernelSet with_whole_units() {
    KernelSet kernels = *avx512_vnni_kernels();
    kernels.linear_rows = linear_rows;
    return kernels;
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const KernelSet* avx512_kernels() {
    if (avx512_vnni_kernels() == nullptr) return avx512_base_kernels();
    if (!__builtin_cpu_supports("avx512vbmi")) return avx512_vnni_kernels();
    static const KernelSet kernels = with_whole_units();
    return &kernels;
}

#else

const KernelSet* avx512_kernels() { return avx512_base_kernels(); }

#endif
