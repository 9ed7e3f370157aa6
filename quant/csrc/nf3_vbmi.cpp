// Few-row products of nf3 with AVX-512's byte permutes (VBMI) and 16-bit dot products (VNNI): all sixteen tables lie in
// registers, and two permutes look up 64 codes at once, whatever tables these use.
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

// The low and the high bytes of the tables' entries, by 8 * table + code.
struct ByteTables {
    alignas(64) uint8_t low[128];
    alignas(64) uint8_t high[128];

    ByteTables() {
        for (int i = 0; i < 128; i++) {
            const uint16_t entry = static_cast<uint16_t>(kNf3Values[i / 8][i % 8]);
            low[i] = static_cast<uint8_t>(entry & 255);
            high[i] = static_cast<uint8_t>(entry >> 8);
        }
    }
};

struct Decoder {
    __m512i low[2], high[2];
    __m512i gather, shifts, windows;

    explicit Decoder(const ByteTables& tables) {
        for (int i = 0; i < 2; i++) {
            low[i] = _mm512_load_si512(tables.low + 64 * i);
            high[i] = _mm512_load_si512(tables.high + 64 * i);
        }
        // eight bytes hold the codes 8k to 8k + 7 of a half: the bytes of that half, then two bits of each
        const __m128i even = _mm_set_epi8(14, 12, 10, 8, 6, 4, 2, 0, 14, 12, 10, 8, 6, 4, 2, 0);
        gather = _mm512_inserti64x4(_mm512_broadcast_i32x4(even),
                                    _mm256_broadcastsi128_si256(_mm_add_epi8(even, _mm_set1_epi8(1))), 1);
        shifts = _mm512_set_epi64(6, 4, 2, 0, 6, 4, 2, 0);
        // of eight bytes, the low four bits of the last in the places of 8 * table, and its high four
        windows = _mm512_inserti64x4(_mm512_set1_epi8(53), _mm256_set1_epi8(57), 1);
    }

    // The entries of a unit in two vectors: of each 16 codes the first eight in one, the others in the other. Seven bytes
    // before `table` are read too; codes are there.
    ALWAYS_INLINE void decode(const uint8_t* unit, const uint8_t* table, __m512i* entries) const {
        const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
        const __m512i low_bits = _mm512_and_si512(
            _mm512_srlv_epi64(_mm512_shuffle_epi8(bytes, gather), shifts), _mm512_set1_epi8(3));
        int64_t tables_before;
        std::memcpy(&tables_before, table - 7, 8);
        const __m512i number = _mm512_multishift_epi64_epi8(windows, _mm512_set1_epi64(tables_before));
        __mmask64 high_bits;
        std::memcpy(&high_bits, unit + 16, 8);
        // low_bits | (number & 0x78): permutes ignore the highest bit of an index
        const __m512i some = _mm512_ternarylogic_epi64(low_bits, number, _mm512_set1_epi8(0x78), 0xF8);
        const __m512i index = _mm512_mask_add_epi8(some, high_bits, some, _mm512_set1_epi8(4));
        const __m512i low_bytes = _mm512_permutex2var_epi8(low[0], index, low[1]);
        const __m512i high_bytes = _mm512_permutex2var_epi8(high[0], index, high[1]);
        entries[0] = _mm512_unpacklo_epi8(low_bytes, high_bytes);
        entries[1] = _mm512_unpackhi_epi8(low_bytes, high_bytes);
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
        for (int r = 0; r < kRows; r++) {
            const uint8_t* const row_codes = codes + r * row_bytes;
            const uint8_t* const unit = row_codes + u * kNf3UnitBytes;
            _mm_prefetch(reinterpret_cast<const char*>(unit + ahead), _MM_HINT_T0);
            __m512i entries[2];
            decoder.decode(unit, row_codes + units * kNf3UnitBytes + u, entries);
            for (int t = 0; t < kTokens; t++) {
                const int16_t* const input = inputs[t] + u * kNf3Unit;
                // a lane sums four products of 15 and 13 bits
                const __m512i sums = _mm512_dpwssd_epi32(_mm512_madd_epi16(entries[0], _mm512_loadu_si512(input)),
                                                         entries[1], _mm512_loadu_si512(input + 32));
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(steps[t][u]), total[r][t]);
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

bool is_here(const PackedWeight& weight, int32_t x_dtype) {
    return weight.code == CODE_NF3 && nf3_uses_integers(x_dtype) && weight.cols > 0;
}

void linear_rows(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                 const Matrix& out) {
    if (!is_here(weight, x.x_dtype)) return avx512_vnni_kernels()->linear_rows(weight, x, row_begin, row_end, out);
    static const ByteTables tables;
    const Decoder decoder(tables);
    constexpr int kRows = 2;
    int64_t row = row_begin;
    for (; row + kRows <= row_end; row += kRows) multiply_rows<kRows>(weight, decoder, x, row, out);
    for (; row < row_end; row++) multiply_rows<1>(weight, decoder, x, row, out);
}

// As the other kernels prepare activations, in the order in which a unit's entries are met here.
void prepare(const PackedWeight& weight, const Matrix& x, int64_t token, void* prepared) {
    avx512_vnni_kernels()->prepare(weight, x, token, prepared);
    if (!is_here(weight, x.dtype)) return;
    int16_t* const integers = static_cast<int16_t*>(prepared);
    for (int64_t i = 0; i < nf3_units(weight) * kNf3Unit; i += kNf3Unit) {
        const __m512i low = _mm512_loadu_si512(integers + i), high = _mm512_loadu_si512(integers + i + 32);
        const __m512i first = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0);
        const __m512i other = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
        _mm512_storeu_si512(integers + i, _mm512_permutex2var_epi64(low, first, high));
        _mm512_storeu_si512(integers + i + 32, _mm512_permutex2var_epi64(low, other, high));
    }
}

KernelSet with_permutes() {
    KernelSet kernels = *avx512_vnni_kernels();
    kernels.prepare = prepare;
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
    static const KernelSet kernels = with_permutes();
    return &kernels;
}

#else

const KernelSet* avx512_kernels() { return avx512_base_kernels(); }

#endif
