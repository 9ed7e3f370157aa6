// AVX-512 (F, BW, VL, DQ), 16 lanes.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "nf3.h"
#include "packed.h"
#include "scalar.h"
#include "step.h"
#include "tables.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__) && defined(MOE_OFFLOAD_VNNI)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(MOE_OFFLOAD_VNNI)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace {

struct V {
    static constexpr int kLanes = 16;
    static constexpr int kRows = 2;
    static constexpr int kShortRows = 4;  // short rows of one token that are begun at once
    static constexpr bool kLooksUpWords = true;  // tables of bf16
    using Floats = __m512;
    using Words = __m512i;
    using Table = __m512;
    using Shorts = __m512i;
    using Ints = __m512i;
    using ShortTable = __m512i;

    static ALWAYS_INLINE Floats zero() { return _mm512_setzero_ps(); }
    static ALWAYS_INLINE Floats set1(float value) { return _mm512_set1_ps(value); }
    static ALWAYS_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static ALWAYS_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static ALWAYS_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static ALWAYS_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static ALWAYS_INLINE float sum(Floats v) { return _mm512_reduce_add_ps(v); }
    // the same of several vectors, in the same order
    static ALWAYS_INLINE void sums(const Floats (&v)[kShortRows], float* out) {
        __m128 quarters[kShortRows];
        for (int i = 0; i < kShortRows; i++) {
            const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
            quarters[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        }
        _MM_TRANSPOSE4_PS(quarters[0], quarters[1], quarters[2], quarters[3]);
        _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(quarters[0], quarters[2]), _mm_add_ps(quarters[1], quarters[3])));
    }
    static ALWAYS_INLINE Floats gather(const float* p, const int32_t* index) {
        return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
    }
    static ALWAYS_INLINE void prefetch(const uint8_t* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    }

    static ALWAYS_INLINE Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static ALWAYS_INLINE Words words(const uint8_t* p, int64_t num_bytes) {
        return _mm512_maskz_loadu_epi8(~0ull >> (64 - num_bytes), p);
    }
    static ALWAYS_INLINE Words bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    template <int kBits>
    static ALWAYS_INLINE Words shift_right(Words v) {
        return _mm512_srli_epi32(v, kBits);
    }
    static ALWAYS_INLINE Table table(const float* values) { return _mm512_loadu_ps(values); }
    // vpermps looks at the low four bits of each index only: no mask
    static ALWAYS_INLINE Floats lookup(const Table& table, Words index) { return _mm512_permutexvar_ps(index, table); }

    static ALWAYS_INLINE Floats int8(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    // e4m3 bits in the places of fp16's: the value times 2^-8, numbers below the normal ones included
    static ALWAYS_INLINE Floats e4m3(const uint8_t* p) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(-0x4080)));
    }
    static ALWAYS_INLINE Floats bf16(const uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static ALWAYS_INLINE Floats f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static ALWAYS_INLINE Floats f16(const uint16_t* p, int64_t count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
    }
    // 2^(exponent - 127), by its bits; the smallest lies below the normal numbers
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p) {
        return e8m0(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    // ones past the end: numbers below the normal ones would be slow
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p, int64_t count) {
        return e8m0(_mm_mask_loadu_epi8(_mm_set1_epi8(127), static_cast<__mmask16>((1u << count) - 1), p));
    }
    static ALWAYS_INLINE Floats e8m0(__m128i exponents) {
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(exponents), 23);
        return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(1 << 22)));
    }
    // vcvtneps2bf16 would flush numbers below the normal ones, so rounding is done on the bits
    static ALWAYS_INLINE void store_bf16(uint16_t* p, Floats v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(v), 16)));
    }
    // the same of 32 numbers
    static ALWAYS_INLINE void store_bf16(uint16_t* p, Floats low, Floats high) {
        const __m512i odd_words = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29,
                                                   27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        _mm512_storeu_si512(p, _mm512_permutex2var_epi16(bf16_bits(low), odd_words, bf16_bits(high)));
    }
    // in the upper half of each lane
    static ALWAYS_INLINE __m512i bf16_bits(Floats v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    }
    // sixteen numbers as bf16, twice: then an index's fifth bit does not matter
    static ALWAYS_INLINE Words word_table(Floats v) {
        const __m512i odd_words = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25,
                                                   23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        return _mm512_permutexvar_epi16(odd_words, bf16_bits(v));
    }
    // what the low nibbles of 32 bytes stand for, and the high ones
    static ALWAYS_INLINE void store_words(uint16_t* low, uint16_t* high, Words table, const uint8_t* p) {
        const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        _mm512_storeu_si512(low, _mm512_permutexvar_epi16(wide, table));
        _mm512_storeu_si512(high, _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table));
    }
    // the same of 16 bytes
    static ALWAYS_INLINE void store_words(uint16_t* low, Words table, const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(wide), _mm256_srli_epi16(wide, 4), 1);
        _mm512_storeu_si512(low, _mm512_permutexvar_epi16(both, table));
    }
    static ALWAYS_INLINE Floats set1_f16(uint16_t half) { return _mm512_cvtph_ps(_mm256_set1_epi16(half)); }
    static ALWAYS_INLINE void store_f16(uint16_t* p, Floats v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    static ALWAYS_INLINE ShortTable short_table(const int16_t* values) {
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    }
    // vpermw looks at the low five bits of each index: the table is there twice, and no mask is needed
    static ALWAYS_INLINE void lookup_nibbles(const ShortTable& table, Words words, Shorts* values) {
        values[0] = _mm512_permutexvar_epi16(words, table);
        values[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
        values[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
        values[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
    }
    static int nibble_at(int step, int lane) { return 4 * lane + step; }
    static constexpr bool kLooksUpNf3 = true;
    // lane i takes code i of the half: word i % 8 shifted to pair i / 8, and bit i of the mask of high bits
    static ALWAYS_INLINE void lookup_nf3(const uint8_t* unit, int half, const int16_t* table, Shorts* values) {
        const __m512i shifts = _mm512_add_epi16(
            _mm512_set1_epi16(static_cast<short>(8 * half)),
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi16(2), _mm_setzero_si128())),
                               _mm256_set_m128i(_mm_set1_epi16(6), _mm_set1_epi16(4)), 1));
        const __m512i pairs = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
        __mmask32 high;
        std::memcpy(&high, unit + 16 + 4 * half, 4);
        const __m512i low = _mm512_and_si512(_mm512_srlv_epi16(pairs, shifts), _mm512_set1_epi16(3));
        const __m512i index = _mm512_mask_add_epi16(low, high, low, _mm512_set1_epi16(4));
        values[0] = _mm512_permutexvar_epi16(
            index, _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))));
    }
    static ALWAYS_INLINE Shorts shorts(const int16_t* p) { return _mm512_loadu_si512(p); }
    static ALWAYS_INLINE Shorts widen_int8(const uint8_t* p) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static ALWAYS_INLINE Ints dot(Shorts a, Shorts b) { return _mm512_madd_epi16(a, b); }
    static ALWAYS_INLINE Ints dot(Ints sums, Shorts a, Shorts b) {
#if defined(MOE_OFFLOAD_VNNI)
        return _mm512_dpwssd_epi32(sums, a, b);  // the same sums in one instruction
#else
        return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
    }
    static ALWAYS_INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
    // to[i] = from[order[i]]; two vectors of two registers each are looked at, and bit 6 picks between them
    template <int kCount>
    static ALWAYS_INLINE void permute(const int16_t* from, const uint16_t* order, int16_t* to) {
        static_assert(kCount == 128, "four vectors");
        const __m512i a = shorts(from), b = shorts(from + 32), c = shorts(from + 64), d = shorts(from + 96);
        for (int i = 0; i < kCount; i += 32) {
            const __m512i index = _mm512_loadu_si512(order + i);
            const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
            const __m512i low = _mm512_permutex2var_epi16(a, index, b);
            _mm512_storeu_si512(to + i, _mm512_mask_blend_epi16(upper, low, _mm512_permutex2var_epi16(c, index, d)));
        }
    }

    // the scales of kGroups groups over the lanes that hold each
    template <int kGroups>
    static ALWAYS_INLINE Floats spread(const float* scales) {
        static_assert(kGroups == 1 || kGroups == 2 || kGroups == 4, "groups of 64 or 32 codes");
        if constexpr (kGroups == 1) {
            return _mm512_set1_ps(scales[0]);
        } else if constexpr (kGroups == 2) {
            return _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
        } else {
            const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
            return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
        }
    }
};

#include "kernels.inl"

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define RUNS                                                                        \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&     \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))

#if defined(MOE_OFFLOAD_VNNI)
const KernelSet* avx512_vnni_kernels() {
    static const bool runs = RUNS && __builtin_cpu_supports("avx512vnni");
    return runs ? &kernel_set("avx512") : nullptr;
}
#else
const KernelSet* avx512_base_kernels() {
    static const bool runs = RUNS;
    return runs ? &kernel_set("avx512-base") : nullptr;
}
#endif

#elif defined(MOE_OFFLOAD_VNNI)

const KernelSet* avx512_vnni_kernels() { return nullptr; }

#else

const KernelSet* avx512_base_kernels() { return nullptr; }

#endif
