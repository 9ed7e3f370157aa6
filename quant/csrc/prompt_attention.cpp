// The C interface to attention of a prompt, called from quant/prompt_attention.py.
#include "prompt_attention.h"

#include "export.h"
#include "packed.h"
#include "pool.h"
#include "scalar.h"
#include "scratch.h"

namespace {

thread_local Scratch scratch;

}  // namespace

// Whether the function below can be called here.
EXPORT int moe_offload_attends_prompts(int isa) {
    return prompt_kernels() != nullptr && &kernel_set_of(isa) == avx512_kernels();
}

// One key-value head at a time: packed once, for all queries of all heads that share it. -1 if memory is refused.
EXPORT int moe_offload_attend_prompt(const PromptAttention* attention, int num_threads) {
    const PromptAttention& a = *attention;
    const PromptKernels& kernels = *prompt_kernels();
    const int64_t num_blocks = ceil_div(a.num_keys, kKeyBlock), query_blocks = ceil_div(a.num_queries, kQueryBlock);
    const int64_t key_words = a.key_dim / 2 * kKeyBlock, value_words = kKeyBlock / 2 * a.value_dim;
    uint8_t* room = scratch.reserve(num_blocks * (key_words + value_words) * 4);
    if (room == nullptr) return -1;
    uint32_t* keys = reinterpret_cast<uint32_t*>(room);
    uint32_t* values = keys + num_blocks * key_words;
    const int64_t group = a.num_heads / a.num_kv_heads;
    for (int64_t kv_head = 0; kv_head < a.num_kv_heads; kv_head++) {
        auto pack = [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; b++) {
                kernels.pack(a, kv_head, b, keys + b * key_words, values + b * value_words);
            }
        };
        parallel_for(num_blocks, 1, num_threads, pack);
        auto attend = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                kernels.attend(a, kv_head * group + i % group, i / group * kQueryBlock, keys, values);
            }
        };
        parallel_for(query_blocks * group, 1, num_threads, attend);
    }
    return 0;
}
