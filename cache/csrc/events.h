// What a cache was asked for, in order: arrays of the caller. cache/kernels.py has the same fields.
#pragma once
#include <cmath>
#include <cstdint>

#include "policy.h"

enum EventKind : uint8_t {
    ACQUIRE = 0,            // a decode step
    ACQUIRE_IF_HOTTER = 1,  // a prompt: who is missing gets only the slot of a colder one
    NEW_SEQUENCE = 2,       // names no experts
};

struct Events {
    const uint8_t* kind;        // [events]
    const uint8_t* is_prefill;  // [events]: what they count as
    const int32_t* layer_idx;   // [events]
    const int64_t* begin;      // [events + 1]: the experts of an event are begin[i] .. begin[i + 1]
    const int32_t* expert_ids;
    const double* weights;       // of each expert, rounded to fp16; NaN in events without weights; or null
    const int32_t* token_ids;    // [events] or null
    const int32_t* num_experts;  // [layers]
    int64_t num_events;
    int32_t num_layers;

    int32_t size(int64_t index) const { return static_cast<int32_t>(begin[index + 1] - begin[index]); }
    Event at(int64_t index) const {
        const double* own_weights = weights == nullptr ? nullptr : weights + begin[index];
        if (own_weights != nullptr && size(index) && std::isnan(own_weights[0])) own_weights = nullptr;
        return {layer_idx[index], size(index), expert_ids + begin[index], own_weights,
                token_ids == nullptr ? -1 : token_ids[index]};
    }
    Sizes layer_sizes() const { return Sizes(num_experts, num_experts + num_layers); }
};
