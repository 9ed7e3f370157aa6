// Attention of a prompt's tokens, in bf16 with sums in fp32.
#pragma once
#include <cstdint>

// Heads of one text. Of a matrix: element d of token t of head h is data[h * head + t * row + d].
struct PromptHeads {
    const uint16_t* data;
    int64_t head;
    int64_t row;
};

// out [queries, heads, value_dim] is contiguous. Query i attends to keys [begin[i], end[i]), at least one.
struct PromptAttention {
    PromptHeads queries, keys, values;
    uint16_t* out;
    const int32_t* begin;
    const int32_t* end;
    int64_t num_queries;
    int64_t num_keys;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t key_dim;    // even
    int64_t value_dim;  // a multiple of 32, at most kMaxValueDim
    float scaling;
};

constexpr int64_t kMaxValueDim = 256;
// Queries of one task, and keys that are looked at together.
constexpr int64_t kQueryBlock = 32, kKeyBlock = 64;

struct PromptKernels {
    // One block of a head's keys and values, in pairs as products read them: [key_dim / 2][keys], [keys / 2][value_dim].
    void (*pack)(const PromptAttention&, int64_t kv_head, int64_t block, uint32_t* keys, uint32_t* values);
    // One block of a head's queries. Each number depends on its query and what that attends to alone.
    void (*attend)(const PromptAttention&, int64_t head, int64_t query_begin, const uint32_t* keys, const uint32_t* values);
};

// Null where instructions for products of bf16 are lacking.
const PromptKernels* prompt_kernels();
