// Few-row products of nf3 with AVX-512's VBMI, which puts the codes of a whole unit together at once, and VNNI: the same
// bits as of nf3_linear.inl with AVX-512, from the same prepared activations.
#include <cstddef>
#include <cstring>
#include <type_traits>

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

// As in linear.inl. Asked for in the order of addresses, whichever row a byte belongs to: the hardware, which reads on
// further ahead than a core's first cache can wait for, follows no more than two rows at once.
constexpr int64_t kAheadBytes = 16384;

// Decoding is bound by loads and by the two ports that permute. Broadcasting 16 bytes takes both, so tables are spread
// over whole registers here once, and what several rows need is kept in registers.
struct Decoder {
    __m512i shifts, windows, low_bits;
    alignas(64) int16_t tables[kNf3Tables][kNf3Group];  // each four times over: an index may have more than three bits

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
        low_bits = _mm512_set1_epi8(3);
        for (int t = 0; t < kNf3Tables; t++) {
            const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf3Values[t]));
            _mm512_store_si512(tables[t], _mm512_broadcast_i32x4(table));
        }
    }

    // The codes of a unit: in the bytes of lane i those of codes i and 32 + i, below bits of no meaning.
    ALWAYS_INLINE __m512i codes(const uint8_t* unit) const {
        const __m512i pairs = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
        int64_t high_bits;
        std::memcpy(&high_bits, unit + 16, 8);
        const __m512i high = _mm512_multishift_epi64_epi8(windows, _mm512_set1_epi64(high_bits));
        // the lowest two bits of each byte from the one, the others from the other
        return _mm512_ternarylogic_epi64(low_bits, _mm512_srlv_epi16(pairs, shifts), high, 0xCA);
    }

    // What the codes of the halves stand for, from the byte that names their tables.
    ALWAYS_INLINE void look_up(__m512i codes, size_t numbers, __m512i* entries) const {
        entries[0] = _mm512_permutexvar_epi16(codes, _mm512_load_si512(tables[numbers & 15]));
        entries[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), _mm512_load_si512(tables[numbers >> 4]));
    }
};

// A vector that is used more than once: else each use would be a load.
ALWAYS_INLINE __m512i in_register(const int16_t* p) {
    __m512i v = _mm512_load_si512(p);
    __asm__("" : "+v"(v));
    return v;
}

// The sums of kHalves half units in integers: at most eight products of 15 and 13 bits in a lane.
template <int kHalves>
ALWAYS_INLINE __m512i dot(const __m512i* entries, const __m512i* inputs) {
    __m512i sums = _mm512_madd_epi16(entries[0], inputs[0]);
    for (int i = 1; i < kHalves; i++) sums = _mm512_dpwssd_epi32(sums, entries[i], inputs[i]);
    return sums;
}

// The sums of four vectors, each in the order of _mm512_reduce_add_ps.
ALWAYS_INLINE __m128 sums_of_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    const auto quarter = [](__m512 v) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    };
    __m128 first = quarter(a), second = quarter(b), third = quarter(c), fourth = quarter(d);
    _MM_TRANSPOSE4_PS(first, second, third, fourth);
    return _mm_add_ps(_mm_add_ps(first, third), _mm_add_ps(second, fourth));
}

// Rows [row, row + kRows) times tokens [token, token + kTokens).
template <int kRows, int kTokens>
ALWAYS_INLINE void multiply(const PackedWeight& weight, const Decoder& decoder, const PreparedInput& x, int64_t row,
                            int64_t token, const Matrix& out) {
    constexpr int kPairBytes = 2 * kNf3UnitBytes, kLine = 64;
    const int64_t units = nf3_units(weight), row_bytes = weight.row_bytes;
    const uint8_t* const codes = weight.codes + row * row_bytes;
    const uint8_t* const tables = codes + units * kNf3UnitBytes;
    const uint8_t* ahead = codes + kAheadBytes;
    const int16_t* inputs[kTokens];
    const float* steps[kTokens];
    __m512 total[kRows][kTokens];
    for (int t = 0; t < kTokens; t++) {
        inputs[t] = reinterpret_cast<const int16_t*>(x.data + (token + t) * x.stride_bytes);
        steps[t] = reinterpret_cast<const float*>(inputs[t] + units * kNf3Unit);
        for (int r = 0; r < kRows; r++) total[r][t] = _mm512_setzero_ps();
    }
    // units [unit, unit + kUnits), which share a step
    const auto add = [&](auto num_units, const __m512i* row_codes, int r, int64_t unit,
                         const __m512i (&input)[kTokens][4]) {
        constexpr int kUnits = decltype(num_units)::value;
        __m512i entries[2 * kUnits];
        for (int i = 0; i < kUnits; i++) {
            decoder.look_up(row_codes[i], tables[r * row_bytes + unit + i], entries + 2 * i);
        }
        for (int t = 0; t < kTokens; t++) {
            const __m512 sums = _mm512_cvtepi32_ps(dot<2 * kUnits>(entries, input[t]));
            total[r][t] = _mm512_fmadd_ps(sums, _mm512_set1_ps(steps[t][unit]), total[r][t]);
        }
    };
    const int64_t paired = units / 2 * 2;
    __m512i pairs[kRows][2];  // decoded one pair ahead of their use, so that few instructions wait for others
    const auto decode = [&](int r, int64_t unit) {
        const uint8_t* const at = codes + r * row_bytes + unit * kNf3UnitBytes;
        for (int i = 0; i < 2; i++) pairs[r][i] = decoder.codes(at + i * kNf3UnitBytes);
    };
    if (paired > 0) {
        for (int r = 0; r < kRows; r++) decode(r, 0);
    }
    for (int64_t u = 0; u < paired; u += 2) {
        __m512i input[kTokens][4];
        for (int t = 0; t < kTokens; t++) {
            for (int i = 0; i < 4; i++) input[t][i] = in_register(inputs[t] + u * kNf3Unit + i * kNf3Group);
        }
        for (int i = 0; i < kRows * kPairBytes; i += kLine) _mm_prefetch(ahead + i, _MM_HINT_T0);
        ahead += kRows * kPairBytes;
        const int64_t next = u + 2 < paired ? u + 2 : u;
        for (int r = 0; r < kRows; r++) {
            add(std::integral_constant<int, 2>{}, pairs[r], r, u, input);
            decode(r, next);
        }
    }
    if (paired < units) {
        for (int r = 0; r < kRows; r++) {
            __m512i input[kTokens][4];
            for (int t = 0; t < kTokens; t++) {
                for (int i = 0; i < 2; i++) input[t][i] = in_register(inputs[t] + paired * kNf3Unit + i * kNf3Group);
            }
            const __m512i last = decoder.codes(codes + r * row_bytes + paired * kNf3UnitBytes);
            add(std::integral_constant<int, 1>{}, &last, r, paired, input);
        }
    }
    for (; ahead < codes + kAheadBytes + kRows * row_bytes; ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T0);
    float sums[kRows][kTokens];
    if constexpr (kRows == 4 && kTokens == 1) {
        _mm_storeu_ps(&sums[0][0], sums_of_lanes(total[0][0], total[1][0], total[2][0], total[3][0]));
    } else {
        for (int r = 0; r < kRows; r++) {
            for (int t = 0; t < kTokens; t++) sums[r][t] = _mm512_reduce_add_ps(total[r][t]);
        }
    }
    const uint16_t* const scales = static_cast<const uint16_t*>(weight.scales) + row;
    for (int r = 0; r < kRows; r++) {
        const float scale = _cvtsh_ss(scales[r]) * kNf3Factor;
        for (int t = 0; t < kTokens; t++) {
            store_from_float(out.data, out.dtype, (token + t) * out.stride + row + r, sums[r][t] * scale);
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

// Rows at a time: as many as leave registers for their sums.
template <int kRows>
int64_t multiply_tiles(const PackedWeight& weight, const Decoder& decoder, const PreparedInput& x, int64_t row,
                       int64_t row_end, const Matrix& out) {
    for (; row + kRows <= row_end; row += kRows) multiply_rows<kRows>(weight, decoder, x, row, out);
    return row;
}

void linear_rows(const PackedWeight& weight, const PreparedInput& x, int64_t row_begin, int64_t row_end,
                 const Matrix& out) {
    if (weight.code != CODE_NF3 || !nf3_uses_integers(x.x_dtype) || weight.cols == 0) {
        return avx512_vnni_kernels()->linear_rows(weight, x, row_begin, row_end, out);
    }
    const Decoder decoder;
    int64_t row = row_begin;
    row = x.num_tokens == 1 ? multiply_tiles<4>(weight, decoder, x, row, row_end, out)
                            : multiply_tiles<2>(weight, decoder, x, row, row_end, out);
    multiply_tiles<1>(weight, decoder, x, row, row_end, out);
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
