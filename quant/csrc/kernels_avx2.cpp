// AVX2 with FMA and F16C, 8 lanes.
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

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

struct V {
    static constexpr int kLanes = 8;
    static constexpr int kRows = 1;
    static constexpr int kShortRows = 1;
    static constexpr bool kLooksUpWords = false;  // tables of bf16
    using Floats = __m256;
    using Words = __m256i;
    struct Table {
        __m256 low, high;
    };
    using Shorts = __m256i;
    using Ints = __m256i;
    struct ShortTable {
        __m256i low, high;  // bytes
    };

    static ALWAYS_INLINE Floats zero() { return _mm256_setzero_ps(); }
    static ALWAYS_INLINE Floats set1(float value) { return _mm256_set1_ps(value); }
    static ALWAYS_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static ALWAYS_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static ALWAYS_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static ALWAYS_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static ALWAYS_INLINE float sum(Floats v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static ALWAYS_INLINE Floats gather(const float* p, const int32_t* index) {
        return _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
    }
    static ALWAYS_INLINE void prefetch(const uint8_t* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
    }

    static ALWAYS_INLINE Words words(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static ALWAYS_INLINE Words words(const uint8_t* p, int64_t num_bytes) {
        uint8_t some[32] = {};
        std::memcpy(some, p, static_cast<size_t>(num_bytes));
        return words(some);
    }
    static ALWAYS_INLINE Words bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    template <int kBits>
    static ALWAYS_INLINE Words shift_right(Words v) {
        return _mm256_srli_epi32(v, kBits);
    }
    static ALWAYS_INLINE Table table(const float* values) {
        return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
    }
    // vpermps looks at the low three bits; the fourth, moved to the sign, picks between the halves
    static ALWAYS_INLINE Floats lookup(const Table& table, Words index) {
        const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
        const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }

    static ALWAYS_INLINE Floats int8(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    // e4m3 bits in the places of fp16's: the value times 2^-8, numbers below the normal ones included
    static ALWAYS_INLINE Floats e4m3(const uint8_t* p) {
        const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(-0x4080)));
    }
    static ALWAYS_INLINE Floats bf16(const uint16_t* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static ALWAYS_INLINE Floats f16(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static ALWAYS_INLINE Floats f16(const uint16_t* p, int64_t count) {
        uint16_t some[kLanes] = {};
        std::memcpy(some, p, static_cast<size_t>(count) * 2);
        return f16(some);
    }
    // 2^(exponent - 127), by its bits; the smallest lies below the normal numbers
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p) {
        const __m256i exponents = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(exponents, 23), _mm256_set1_epi32(1 << 22)));
    }
    // ones past the end: numbers below the normal ones would be slow
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p, int64_t count) {
        uint8_t some[kLanes];
        std::memset(some, 127, sizeof(some));
        std::memcpy(some, p, static_cast<size_t>(count));
        return e8m0(some);
    }
    static ALWAYS_INLINE void store_bf16(uint16_t* p, Floats v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i high = _mm256_srli_epi32(rounded, 16);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static ALWAYS_INLINE void store_f16(uint16_t* p, Floats v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    static ALWAYS_INLINE ShortTable short_table(const int16_t* values) {
        uint8_t low[16], high[16];
        for (int i = 0; i < 16; i++) {
            low[i] = static_cast<uint8_t>(values[i] & 0xFF);
            high[i] = static_cast<uint8_t>(values[i] >> 8 & 0xFF);
        }
        return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)))};
    }
    // low nibbles, then high ones; of each the even eights of bytes, then the odd ones
    static ALWAYS_INLINE void lookup_nibbles(const ShortTable& table, Words words, Shorts* values) {
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i nibbles[2] = {_mm256_and_si256(words, mask), _mm256_and_si256(_mm256_srli_epi16(words, 4), mask)};
        for (int i = 0; i < 2; i++) {
            const __m256i low = _mm256_shuffle_epi8(table.low, nibbles[i]);
            const __m256i high = _mm256_shuffle_epi8(table.high, nibbles[i]);
            values[2 * i] = _mm256_unpacklo_epi8(low, high);
            values[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
        }
    }
    static int nibble_at(int step, int lane) { return 2 * (lane / 8 * 16 + step % 2 * 8 + lane % 8) + step / 2; }
    static constexpr bool kLooksUpNf3 = true;
    // 64-bit words of indices for the codes from 0, 16, 8 and 24, so that unpacking puts values in order
    static ALWAYS_INLINE void lookup_nf3(const uint8_t* unit, int half, const int16_t* table, Shorts* values) {
        const __m128i pairs = _mm_srl_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)),
                                            _mm_cvtsi32_si128(8 * half));
        const __m128i bytes = _mm_shuffle_epi8(pairs, _mm_set1_epi64x(0x0E0C0A0806040200));
        const __m256i shifted = _mm256_srlv_epi64(_mm256_broadcastsi128_si256(bytes), _mm256_set_epi64x(6, 2, 4, 0));
        uint32_t high;
        std::memcpy(&high, unit + 16 + 4 * half, 4);
        const __m256i which = _mm256_set_epi64x(0x0303030303030303, 0x0101010101010101, 0x0202020202020202, 0);
        const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(high)), which);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        const __m256i index = _mm256_or_si256(_mm256_and_si256(shifted, _mm256_set1_epi8(3)),
                                              _mm256_and_si256(set, _mm256_set1_epi8(4)));
        const __m256i entries =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        const __m256i at = _mm256_add_epi8(index, index);
        const __m256i low = _mm256_shuffle_epi8(entries, at);
        const __m256i upper = _mm256_shuffle_epi8(entries, _mm256_or_si256(at, _mm256_set1_epi8(1)));
        values[0] = _mm256_unpacklo_epi8(low, upper);
        values[1] = _mm256_unpackhi_epi8(low, upper);
    }
    static ALWAYS_INLINE Shorts shorts(const int16_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static ALWAYS_INLINE Shorts widen_int8(const uint8_t* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static ALWAYS_INLINE Ints dot(Shorts a, Shorts b) { return _mm256_madd_epi16(a, b); }
    static ALWAYS_INLINE Ints dot(Ints sums, Shorts a, Shorts b) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
    }
    static ALWAYS_INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
    template <int kCount>
    static ALWAYS_INLINE void permute(const int16_t* from, const uint16_t* order, int16_t* to) {
        for (int i = 0; i < kCount; i++) to[i] = from[order[i]];
    }

    // the scales of kGroups groups over the lanes that hold each
    template <int kGroups>
    static ALWAYS_INLINE Floats spread(const float* scales) {
        static_assert(kGroups == 1 || kGroups == 2, "groups of 64 or 32 codes");
        if constexpr (kGroups == 1) {
            return _mm256_set1_ps(scales[0]);
        } else {
            return _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
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

const KernelSet* avx2_kernels() {
    static const bool runs =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return runs ? &kernel_set("avx2") : nullptr;
}

#else

const KernelSet* avx2_kernels() { return nullptr; }

#endif
