// The dense part of a decode step: the interface between step_api.cpp and the kernels of each instruction set.
#pragma once
#include <cstdint>

#include "delta_net.h"
#include "packed.h"
#include "mamba.h"
#include "projection.h"

// One attention module. Where it is gated, `query` gives each head's query and then its gate, whose sigmoid is a factor of
// the head's result. Keys and values of a head lie one after the other, [num_kv_heads, capacity, head_dim].
struct Attention {
    Projection query, key, value, output;
    RmsNorm query_norm, key_norm;
    const void* sinks;  // [num_heads]: a logit that takes its share and gives nothing, or null
    int64_t num_heads, num_kv_heads, head_dim;
    float scaling;
    int32_t sinks_dtype;
    int32_t dtype;  // of activations, keys and values
    int32_t is_gated;
};

// How the numbers that rotate turn, where a token's position is in a part of each head: in pairs (i, i + half); in pairs
// (2i, 2i + 1) that come out as (i, i + half); in pairs that stay in place, in fp32 and rounded once; not at all.
enum Rotary : int32_t { ROTARY_HALVES = 0, ROTARY_PAIRS_TO_HALVES = 1, ROTARY_PAIRS = 2, ROTARY_NONE = 3 };

// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): what is cached of a token is a latent [rank]
// and one rotated key [rope_dim] for all heads. A query head is [nope_dim + rope_dim]. `expand` [num_heads * (nope_dim +
// value_dim), rank] has for each head the rows that make keys of a latent, then those that make values of it.
struct LatentAttention {
    Projection query_down;  // to the norm before `query`; without weights where `query` takes hidden states
    Projection query, latent, expand, output;
    RmsNorm query_norm, latent_norm;
    int64_t num_heads, nope_dim, rope_dim, value_dim, rank;
    float scaling;
    float query_factor, latent_factor;  // on queries and normed latents, rounded after; 1 for none
    int32_t rotary;
    int32_t dtype;  // of activations and of what is cached
};

// Queries of some heads, in fp32: over latents [heads, rank], and over rotated keys [heads, rope_dim] whose rows lie
// `rotated_stride` apart.
struct LatentQuery {
    const float* latent;
    const float* rotated;
    int64_t rotated_stride;
};

struct StepKernels {
    // rows [row_begin, row_end) of out [num_tokens, rows] = x [num_tokens, cols] in fp32 @ weight.T, in fp32
    void (*raw_rows)(const RawWeight&, const float* x, int64_t num_tokens, int64_t row_begin, int64_t row_end,
                     float* out);
    // one row in fp32, in place; rounded where a module in `dtype` rounds
    void (*rms_norm)(const RmsNorm&, float* x, int32_t dtype);
    // One key-value head and the query heads that share it, over positions [begin, end): `query` and `out`
    // [group, head_dim] in fp32, `scores` room for [group, end - begin].
    void (*attend)(const Attention&, int64_t kv_head, const float* query, const void* keys, const void* values,
                   int64_t begin, int64_t end, float* scores, float* out);
    // out [cols] += x [count] @ rows [count, cols]
    void (*add_rows)(const void* rows, int32_t dtype, int64_t count, int64_t cols, const float* x, float* out);
    // `num_heads` heads over latents [count, rank] and rotated keys [count, rope_dim]; `scores` room for
    // [num_heads, count]; out [num_heads, rank]: latents weighted by each head's attention.
    void (*attend_latents)(const LatentAttention&, int64_t num_heads, const LatentQuery&, const void* latents,
                           const void* keys, int64_t count, float* scores, float* out);
    // Channels [begin, end) of out [channels] = silu(the convolution of the last tokens), which `x` [channels] becomes
    // one of in `state` [channels, kernel_size].
    void (*convolve)(const Convolution&, const float* x, int64_t begin, int64_t end, void* state, float* out);
    // One value head: `state` [key_dim, value_dim] forgets, learns `value` for `key`, and answers `query` in `out`.
    void (*delta_rule)(const DeltaNet&, const float* query, const float* key, const float* value, float decay,
                       float beta, float* state, float* out);
    // x [count] *= sigmoid(gate), rounded where a module in `dtype` rounds
    void (*apply_gate)(const float* gate, int64_t count, int32_t dtype, float* x);
    // x [count] = a norm of x, times silu(gate), rounded where a module rounds
    void (*gated_norm)(const DeltaNet&, const float* gate, float* x);
    // One head: `state` [head_dim, state_size] forgets and takes in x [head_dim], which `input` [state_size] spreads; out
    // [head_dim] is what `output` [state_size] reads of it.
    void (*mamba_rule)(const Mamba&, const float* x, const float* input, const float* output, float step, float decay,
                       float* state, float* out);
    // x [count] *= silu(gate), in fp32
    void (*apply_silu)(const float* gate, int64_t count, float* x);
};
