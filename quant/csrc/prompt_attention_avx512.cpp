// Attention of a prompt with AVX-512's products of bf16: the softmax is kept up from one block of keys to the next, as in
// FlashAttention (Dao et al., 2022), so that scores never leave a core's first-level cache.
#include "prompt_attention.h"

#include "packed.h"
#include "scalar.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

namespace {

constexpr int kLanes = 16;
// Rows and vectors of one tile of sums: with what they are made from, they fill the registers.
constexpr int kTileRows = 8, kTileVectors = 2;

uint32_t pair_of(uint32_t low, uint32_t high) { return low | high << 16; }

void pack(const PromptAttention& a, int64_t kv_head, int64_t block, uint32_t* keys, uint32_t* values) {
    const uint16_t* key = a.keys.data + kv_head * a.keys.head;
    const uint16_t* value = a.values.data + kv_head * a.values.head;
    const int64_t begin = block * kKeyBlock;
    const int64_t count = a.num_keys - begin < kKeyBlock ? a.num_keys - begin : kKeyBlock;
    if (count < kKeyBlock) {
        std::memset(keys, 0, static_cast<size_t>(a.key_dim / 2 * kKeyBlock * 4));
        std::memset(values, 0, static_cast<size_t>(kKeyBlock / 2 * a.value_dim * 4));
    }
    for (int64_t k = 0; k < count; k++) {
        const uint16_t* row = key + (begin + k) * a.keys.row;
        for (int64_t p = 0; p < a.key_dim / 2; p++) keys[p * kKeyBlock + k] = pair_of(row[2 * p], row[2 * p + 1]);
    }
    for (int64_t k = 0; k < count; k += 2) {
        const uint16_t* low = value + (begin + k) * a.values.row;
        const uint16_t* high = low + a.values.row;
        uint32_t* to = values + k / 2 * a.value_dim;
        for (int64_t d = 0; d < a.value_dim; d++) to[d] = pair_of(low[d], k + 1 < count ? high[d] : 0);
    }
}

// sums[r][v] += over the pairs of rows[r] times [pairs][stride] words, of which vectors begin at `words`.
inline void multiply(const uint16_t* const* rows, int64_t pairs, const uint32_t* words, int64_t stride,
                     __m512 (&sums)[kTileRows][kTileVectors]) {
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh with[kTileVectors];
        for (int v = 0; v < kTileVectors; v++) {
            with[v] = (__m512bh)_mm512_loadu_si512(words + p * stride + v * kLanes);
        }
        for (int r = 0; r < kTileRows; r++) {
            int32_t pair;
            std::memcpy(&pair, rows[r] + 2 * p, 4);
            const __m512bh from = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < kTileVectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], from, with[v]);
        }
    }
}

// e^x for x <= 0 within 2 units in the last place: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-120.0f));  // that is 0, as it is of what is smaller, down to minus infinity
    const __m512 k = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(k, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, k);
}

float exponential(float x) { return _mm512_cvtss_f32(exponential(_mm512_set1_ps(x))); }

// What is kept of a block of queries while its keys go by.
struct State {
    alignas(64) float scores[kQueryBlock][kKeyBlock];
    alignas(64) uint16_t shares[kQueryBlock][kKeyBlock];
    alignas(64) float out[kQueryBlock][kMaxValueDim];
    float largest[kQueryBlock];
    float total[kQueryBlock];
};

// One row's scores of keys [begin, end) of the block to its shares, by the largest score so far.
inline void soften(State& s, int row, int64_t begin, int64_t end, float scaling, int64_t value_dim) {
    constexpr int kVectors = kKeyBlock / kLanes;
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 scores[kVectors], most = lowest;
    __mmask16 masks[kVectors];
    for (int v = 0; v < kVectors; v++) {
        const __m512i key = _mm512_add_epi32(_mm512_set1_epi32(v * kLanes),
                                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        masks[v] = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(static_cast<int>(begin))) &
                   _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(static_cast<int>(end)));
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(s.scores[row] + v * kLanes), _mm512_set1_ps(scaling));
        scores[v] = _mm512_mask_mov_ps(lowest, masks[v], scaled);
        most = _mm512_max_ps(most, scores[v]);
    }
    const float before = s.largest[row], block = _mm512_reduce_max_ps(most);
    const float largest = block > before ? block : before;
    __m512 sum = _mm512_setzero_ps();
    for (int v = 0; v < kVectors; v++) {
        scores[v] = _mm512_maskz_mov_ps(masks[v], exponential(_mm512_sub_ps(scores[v], _mm512_set1_ps(largest))));
        sum = _mm512_add_ps(sum, scores[v]);
    }
    for (int v = 0; v < kVectors; v += 2) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(scores[v + 1], scores[v]);
        _mm512_store_si512(s.shares[row] + v * kLanes, (__m512i)pairs);
    }
    if (largest > before) {
        const float less = exponential(before - largest);
        s.total[row] *= less;
        for (int64_t d = 0; d < value_dim; d += kLanes) {
            _mm512_store_ps(s.out[row] + d, _mm512_mul_ps(_mm512_load_ps(s.out[row] + d), _mm512_set1_ps(less)));
        }
        s.largest[row] = largest;
    }
    s.total[row] += _mm512_reduce_add_ps(sum);
}

void attend(const PromptAttention& a, int64_t head, int64_t query_begin, const uint32_t* keys, const uint32_t* values) {
    State s;
    const int64_t count = a.num_queries - query_begin < kQueryBlock ? a.num_queries - query_begin : kQueryBlock;
    const uint16_t *queries[kQueryBlock], *shares[kQueryBlock];
    int64_t first = a.num_keys, last = 0;
    for (int64_t r = 0; r < kQueryBlock; r++) {
        const int64_t query = query_begin + (r < count ? r : count - 1);  // rows that are not there repeat the last one
        queries[r] = a.queries.data + head * a.queries.head + query * a.queries.row;
        shares[r] = s.shares[r];
        first = a.begin[query] < first ? a.begin[query] : first;
        last = a.end[query] > last ? a.end[query] : last;
        s.largest[r] = -INFINITY;
        s.total[r] = 0.0f;
        std::memset(s.out[r], 0, static_cast<size_t>(a.value_dim * 4));
    }
    for (int64_t block = first / kKeyBlock; block * kKeyBlock < last; block++) {
        const uint32_t* block_keys = keys + block * (a.key_dim / 2 * kKeyBlock);
        for (int row = 0; row < count; row += kTileRows) {
            for (int64_t k = 0; k < kKeyBlock; k += kTileVectors * kLanes) {
                __m512 sums[kTileRows][kTileVectors] = {};
                multiply(queries + row, a.key_dim / 2, block_keys + k, kKeyBlock, sums);
                for (int r = 0; r < kTileRows; r++) {
                    for (int v = 0; v < kTileVectors; v++) _mm512_store_ps(s.scores[row + r] + k + v * kLanes, sums[r][v]);
                }
            }
        }
        for (int row = 0; row < kQueryBlock; row++) {
            const int64_t query = query_begin + (row < count ? row : count - 1);
            const int64_t begin = a.begin[query] - block * kKeyBlock, end = a.end[query] - block * kKeyBlock;
            if (row < count && begin < kKeyBlock && end > 0) {
                soften(s, row, begin, end, a.scaling, a.value_dim);
            } else {
                std::memset(s.shares[row], 0, sizeof(s.shares[row]));
            }
        }
        const uint32_t* block_values = values + block * (kKeyBlock / 2 * a.value_dim);
        for (int row = 0; row < count; row += kTileRows) {
            for (int64_t d = 0; d < a.value_dim; d += kTileVectors * kLanes) {
                __m512 sums[kTileRows][kTileVectors];
                for (int r = 0; r < kTileRows; r++) {
                    for (int v = 0; v < kTileVectors; v++) sums[r][v] = _mm512_load_ps(s.out[row + r] + d + v * kLanes);
                }
                multiply(shares + row, kKeyBlock / 2, block_values + d, a.value_dim, sums);
                for (int r = 0; r < kTileRows; r++) {
                    for (int v = 0; v < kTileVectors; v++) _mm512_store_ps(s.out[row + r] + d + v * kLanes, sums[r][v]);
                }
            }
        }
    }
    for (int64_t r = 0; r < count; r++) {
        uint16_t* to = a.out + ((query_begin + r) * a.num_heads + head) * a.value_dim;
        const __m512 share = _mm512_set1_ps(1.0f / s.total[r]);
        for (int64_t d = 0; d < a.value_dim; d += kLanes) {
            const __m512 result = _mm512_mul_ps(_mm512_load_ps(s.out[r] + d), share);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), (__m256i)_mm512_cvtneps_pbh(result));
        }
    }
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const PromptKernels* prompt_kernels() {
    static const PromptKernels kernels = {pack, attend};
    static const bool runs = __builtin_cpu_supports("avx512bf16") && avx512_kernels() != nullptr;
    return runs ? &kernels : nullptr;
}

#else

const PromptKernels* prompt_kernels() { return nullptr; }

#endif
