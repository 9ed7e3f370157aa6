// Plain C++, 8 lanes in arrays that compilers turn into whatever vectors the baseline has.
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

namespace {

struct V {
    static constexpr int kLanes = 8;
    static constexpr int kRows = 1;
    static constexpr int kShortRows = 1;
    static constexpr bool kLooksUpWords = false;  // tables of bf16
    struct Floats {
        float lane[kLanes];
    };
    struct Words {
        uint32_t lane[kLanes];
    };
    struct Table {
        const float* values;
    };
    struct Shorts {
        int16_t lane[2 * kLanes];
    };
    struct Ints {
        int32_t lane[kLanes];
    };
    struct ShortTable {
        const int16_t* values;
    };

    template <class Lane>
    static ALWAYS_INLINE Floats each(Lane lane) {
        Floats result;
        for (int i = 0; i < kLanes; i++) result.lane[i] = lane(i);
        return result;
    }

    static ALWAYS_INLINE Floats zero() { return set1(0.0f); }
    static ALWAYS_INLINE Floats set1(float value) {
        return each([&](int) { return value; });
    }
    static ALWAYS_INLINE Floats load(const float* p) {
        Floats result;
        std::memcpy(result.lane, p, sizeof(result.lane));
        return result;
    }
    static ALWAYS_INLINE void store(float* p, const Floats& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
    static ALWAYS_INLINE Floats mul(const Floats& a, const Floats& b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    // rounded twice: a fused operation without the instruction is a slow library call
    static ALWAYS_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static ALWAYS_INLINE float sum(const Floats& v) {
        return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
    }
    static ALWAYS_INLINE Floats gather(const float* p, const int32_t* index) {
        return each([&](int i) { return p[index[i]]; });
    }
    static ALWAYS_INLINE void prefetch(const uint8_t*) {}

    static ALWAYS_INLINE Words words(const uint8_t* p) {
        Words result;
        for (int i = 0; i < kLanes; i++) {
            const uint8_t* b = p + 4 * i;
            result.lane[i] = static_cast<uint32_t>(b[0]) | static_cast<uint32_t>(b[1]) << 8 |
                             static_cast<uint32_t>(b[2]) << 16 | static_cast<uint32_t>(b[3]) << 24;
        }
        return result;
    }
    static ALWAYS_INLINE Words words(const uint8_t* p, int64_t num_bytes) {
        uint8_t some[4 * kLanes] = {};
        std::memcpy(some, p, static_cast<size_t>(num_bytes));
        return words(some);
    }
    static ALWAYS_INLINE Words bytes(const uint8_t* p) {
        Words result;
        for (int i = 0; i < kLanes; i++) result.lane[i] = p[i];
        return result;
    }
    template <int kBits>
    static ALWAYS_INLINE Words shift_right(const Words& v) {
        Words result;
        for (int i = 0; i < kLanes; i++) result.lane[i] = v.lane[i] >> kBits;
        return result;
    }
    static ALWAYS_INLINE Table table(const float* values) { return {values}; }
    static ALWAYS_INLINE Floats lookup(const Table& table, const Words& index) {
        return each([&](int i) { return table.values[index.lane[i] & 15]; });
    }

    static ALWAYS_INLINE Floats int8(const uint8_t* p) {
        return each([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
    }
    // e4m3 bits in the places of fp16's: the value times 2^-8, numbers below the normal ones included
    static ALWAYS_INLINE Floats e4m3(const uint8_t* p) {
        return each([&](int i) { return f16_to_float(static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7)); });
    }
    static ALWAYS_INLINE Floats bf16(const uint16_t* p) {
        return each([&](int i) { return bf16_to_float(p[i]); });
    }
    static ALWAYS_INLINE Floats f16(const uint16_t* p) {
        return each([&](int i) { return f16_to_float(p[i]); });
    }
    static ALWAYS_INLINE Floats f16(const uint16_t* p, int64_t count) {
        uint16_t some[kLanes] = {};
        std::memcpy(some, p, static_cast<size_t>(count) * 2);
        return f16(some);
    }
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p) {
        return each([&](int i) { return e8m0_to_float(p[i]); });
    }
    // ones past the end: numbers below the normal ones would be slow
    static ALWAYS_INLINE Floats e8m0(const uint8_t* p, int64_t count) {
        uint8_t some[kLanes];
        std::memset(some, 127, sizeof(some));
        std::memcpy(some, p, static_cast<size_t>(count));
        return e8m0(some);
    }
    static ALWAYS_INLINE void store_bf16(uint16_t* p, const Floats& v) {
        for (int i = 0; i < kLanes; i++) p[i] = float_to_bf16(v.lane[i]);
    }
    static ALWAYS_INLINE void store_f16(uint16_t* p, const Floats& v) {
        for (int i = 0; i < kLanes; i++) p[i] = float_to_f16(v.lane[i]);
    }

    static ALWAYS_INLINE ShortTable short_table(const int16_t* values) { return {values}; }
    static ALWAYS_INLINE void lookup_nibbles(const ShortTable& table, const Words& words, Shorts* values) {
        for (int step = 0; step < 4; step++) {
            for (int i = 0; i < 2 * kLanes; i++) {
                values[step].lane[i] = table.values[words.lane[i / 2] >> (i % 2 * 16 + step * 4) & 15];
            }
        }
    }
    static int nibble_at(int step, int lane) { return 4 * lane + step; }
    static constexpr bool kLooksUpNf3 = false;
    static ALWAYS_INLINE Shorts shorts(const int16_t* p) {
        Shorts result;
        std::memcpy(result.lane, p, sizeof(result.lane));
        return result;
    }
    static ALWAYS_INLINE Shorts widen_int8(const uint8_t* p) {
        Shorts result;
        for (int i = 0; i < 2 * kLanes; i++) result.lane[i] = static_cast<int8_t>(p[i]);
        return result;
    }
    static ALWAYS_INLINE Ints dot(const Shorts& a, const Shorts& b) { return dot(Ints{}, a, b); }
    static ALWAYS_INLINE Ints dot(const Ints& sums, const Shorts& a, const Shorts& b) {
        Ints result;
        for (int i = 0; i < kLanes; i++) {
            result.lane[i] = sums.lane[i] + a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1];
        }
        return result;
    }
    static ALWAYS_INLINE Floats to_floats(const Ints& v) {
        return each([&](int i) { return static_cast<float>(v.lane[i]); });
    }
    template <int kCount>
    static ALWAYS_INLINE void permute(const int16_t* from, const uint16_t* order, int16_t* to) {
        for (int i = 0; i < kCount; i++) to[i] = from[order[i]];
    }

    // the scales of kGroups groups over the lanes that hold each
    template <int kGroups>
    static ALWAYS_INLINE Floats spread(const float* scales) {
        return each([&](int i) { return scales[i * kGroups / kLanes]; });
    }
};

#include "kernels.inl"

}  // namespace

const KernelSet* portable_kernels() { return &kernel_set("portable"); }
