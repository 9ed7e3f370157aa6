// NEON on 64-bit ARM, 4 lanes.
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

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>

namespace {

struct V {
    static constexpr int kLanes = 4;
    static constexpr int kRows = 2;
    static constexpr int kShortRows = 1;
    static constexpr bool kLooksUpWords = false;  // tables of bf16
    using Floats = float32x4_t;
    using Words = uint32x4_t;
    using Table = uint8x16x4_t;
    using Shorts = int16x8_t;
    using Ints = int32x4_t;
    using ShortTable = uint8x16x2_t;  // low bytes, high bytes

    static ALWAYS_INLINE Floats zero() { return vdupq_n_f32(0.0f); }
    static ALWAYS_INLINE Floats set1(float value) { return vdupq_n_f32(value); }
    static ALWAYS_INLINE Floats load(const float* p) { return vld1q_f32(p); }
    static ALWAYS_INLINE void store(float* p, Floats v) { vst1q_f32(p, v); }
    static ALWAYS_INLINE Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
    static ALWAYS_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static ALWAYS_INLINE float sum(Floats v) { return vaddvq_f32(v); }
    static ALWAYS_INLINE Floats gather(const float* p, const int32_t* index) {
        const float lanes[4] = {p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
        return vld1q_f32(lanes);
    }
    static ALWAYS_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

    static ALWAYS_INLINE Words words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
    static ALWAYS_INLINE Words words(const uint8_t* p, int64_t num_bytes) {
        uint8_t some[16] = {};
        std::memcpy(some, p, static_cast<size_t>(num_bytes));
        return words(some);
    }
    static ALWAYS_INLINE Words bytes(const uint8_t* p) {
        const uint32_t lanes[4] = {p[0], p[1], p[2], p[3]};
        return vld1q_u32(lanes);
    }
    template <int kBits>
    static ALWAYS_INLINE Words shift_right(Words v) {
        return vshlq_u32(v, vdupq_n_s32(-kBits));
    }
    static ALWAYS_INLINE Table table(const float* values) {
        return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(values));
    }
    // the sixteen floats are one table of 64 bytes, of which a code picks four
    static ALWAYS_INLINE Floats lookup(const Table& table, Words index) {
        const uint32x4_t code = vandq_u32(index, vdupq_n_u32(15));
        const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
        return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)));
    }

    static ALWAYS_INLINE Floats int8(const uint8_t* p) {
        const int32_t lanes[4] = {static_cast<int8_t>(p[0]), static_cast<int8_t>(p[1]), static_cast<int8_t>(p[2]),
                                  static_cast<int8_t>(p[3])};
        return vcvtq_f32_s32(vld1q_s32(lanes));
    }
    // e4m3 bits in the places of fp16's: the value times 2^-8, numbers below the normal ones included
    static ALWAYS_INLINE Floats e4m3(const uint8_t* p) {
        uint16_t lanes[4];
        for (int i = 0; i < 4; i++) lanes[i] = static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7);
        return f16(lanes);
    }
    static ALWAYS_INLINE Floats bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static ALWAYS_INLINE Floats f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static ALWAYS_INLINE Floats f16(const uint16_t* p, int64_t count) {
        uint16_t some[kLanes] = {};
        std::memcpy(some, p, static_cast<size_t>(count) * 2);
        return f16(some);
    }
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p) {
        const float lanes[4] = {e8m0_to_float(p[0]), e8m0_to_float(p[1]), e8m0_to_float(p[2]), e8m0_to_float(p[3])};
        return vld1q_f32(lanes);
    }
    // ones past the end: numbers below the normal ones would be slow
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p, int64_t count) {
        uint8_t some[kLanes];
        std::memset(some, 127, sizeof(some));
        std::memcpy(some, p, static_cast<size_t>(count));
        return e8m0(some);
    }
    static ALWAYS_INLINE void store_bf16(uint16_t* p, Floats v) {
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        vst1_u16(p, vmovn_u32(vshrq_n_u32(rounded, 16)));
    }
    static ALWAYS_INLINE void store_f16(uint16_t* p, Floats v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

    static ALWAYS_INLINE ShortTable short_table(const int16_t* values) {
        return vld2q_u8(reinterpret_cast<const uint8_t*>(values));
    }
    // low nibbles, then high ones; of each the first eight bytes, then the others
    static ALWAYS_INLINE void lookup_nibbles(const ShortTable& table, Words words, Shorts* values) {
        const uint8x16_t bytes = vreinterpretq_u8_u32(words);
        const uint8x16_t nibbles[2] = {vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)};
        for (int i = 0; i < 2; i++) {
            const uint8x16_t low = vqtbl1q_u8(table.val[0], nibbles[i]);
            const uint8x16_t high = vqtbl1q_u8(table.val[1], nibbles[i]);
            values[2 * i] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
            values[2 * i + 1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
        }
    }
    static int nibble_at(int step, int lane) { return 2 * (step % 2 * 8 + lane) + step / 2; }
    static constexpr bool kLooksUpNf3 = false;
    static ALWAYS_INLINE Shorts shorts(const int16_t* p) { return vld1q_s16(p); }
    static ALWAYS_INLINE Shorts widen_int8(const uint8_t* p) {
        return vmovl_s8(vld1_s8(reinterpret_cast<const int8_t*>(p)));
    }
    static ALWAYS_INLINE Ints dot(Shorts a, Shorts b) {
        return vmlal_high_s16(vmull_s16(vget_low_s16(a), vget_low_s16(b)), a, b);
    }
    static ALWAYS_INLINE Ints dot(Ints sums, Shorts a, Shorts b) {
        return vmlal_high_s16(vmlal_s16(sums, vget_low_s16(a), vget_low_s16(b)), a, b);
    }
    static ALWAYS_INLINE Floats to_floats(Ints v) { return vcvtq_f32_s32(v); }
    template <int kCount>
    static ALWAYS_INLINE void permute(const int16_t* from, const uint16_t* order, int16_t* to) {
        for (int i = 0; i < kCount; i++) to[i] = from[order[i]];
    }

    // a chunk holds one group at most
    template <int kGroups>
    static ALWAYS_INLINE Floats spread(const float* scales) {
        return vdupq_n_f32(scales[0]);
    }
};

#include "kernels.inl"

}  // namespace

const KernelSet* neon_kernels() { return &kernel_set("neon"); }

#else

const KernelSet* neon_kernels() { return nullptr; }

#endif
