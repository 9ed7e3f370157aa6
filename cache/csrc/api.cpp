// The C interface that cache/kernels.py loads with ctypes.
#include <cstring>
#include <new>

#include "belady.h"
#include "export.h"
#include "half.h"
#include "learned.h"
#include "policy.h"
#include "replay.h"
#include "stack.h"
#include "timing.h"

namespace {

enum Status { STATUS_OK = 0, STATUS_NO_MEMORY = 1, STATUS_NO_POLICY = 2 };

const NamedPolicy* find(const char* name) {
    for (const NamedPolicy* policy = kPolicies; policy->name != nullptr; ++policy)
        if (std::strcmp(policy->name, name) == 0) return policy;
    return nullptr;
}

template <typename Run>
int with_policy(const Events& events, const char* name, Run run) {
    const NamedPolicy* named = name == nullptr ? nullptr : find(name);
    if (name != nullptr && named == nullptr) return STATUS_NO_POLICY;
    try {
        const std::unique_ptr<Policy> made = named ? named->make(events.layer_sizes()) : make_belady(events);
        run(*made, named == nullptr);
    } catch (const std::bad_alloc&) {
        return STATUS_NO_MEMORY;
    }
    return STATUS_OK;
}

}  // namespace

// The name of a policy, or null past the last.
EXPORT const char* moe_cache_policy_name(int index) { return kPolicies[index].name; }

// Null if there is no such policy, or no memory.
EXPORT Policy* moe_cache_policy_new(const char* name, int32_t num_layers, const int32_t* num_experts) {
    const NamedPolicy* policy = find(name);
    if (policy == nullptr) return nullptr;
    try {
        return policy->make(Sizes(num_experts, num_experts + num_layers)).release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// See learned.h; null if there is no memory.
EXPORT Policy* moe_cache_learned_new(int32_t num_layers, const int32_t* num_experts, const LearnedWeights* weights) {
    try {
        return make_learned(Sizes(num_experts, num_experts + num_layers), *weights).release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

EXPORT void moe_cache_policy_free(Policy* policy) { delete policy; }

// Rounds `weights`, which may be null, in place: a replay, which has them from a trace, then decides alike.
EXPORT void moe_cache_policy_touch(Policy* policy, int32_t layer_idx, const int32_t* expert_ids, int32_t num_experts,
                                   double* weights, int32_t token_id) {
    if (num_experts == 0) return;
    if (weights != nullptr) round_to_half(weights, num_experts);
    policy->touch({layer_idx, num_experts, expert_ids, weights, token_id});
}

EXPORT void moe_cache_round_to_half(double* values, int64_t num) { round_to_half(values, num); }

EXPORT const double* moe_cache_policy_scores(Policy* policy, int32_t layer_idx) { return policy->scores(layer_idx); }

EXPORT void moe_cache_policy_new_sequence(Policy* policy) { policy->new_sequence(); }

// See replay_layers; `policy` is a name, or null for Belady's optimum.
EXPORT int moe_cache_replay_layers(const Events* events, const char* policy, const int32_t* num_slots, Counts* counts,
                                   uint16_t* fetched) {
    return with_policy(*events, policy, [&](Policy& made, bool is_oracle) {
        replay_layers(*events, made, is_oracle, num_slots, counts, fetched);
    });
}

// See replay_pool.
EXPORT int moe_cache_replay_pool(const Events* events, const char* policy, int64_t num_slots, const int32_t* floors,
                                 Counts* counts, uint16_t* fetched) {
    return with_policy(*events, policy, [&](Policy& made, bool is_oracle) {
        replay_pool(*events, made, is_oracle, num_slots, floors, counts, fetched);
    });
}

// See stack_distances.
EXPORT int moe_cache_stack_distances(const Events* events, int32_t most_experts, int64_t* found) {
    try {
        stack_distances(*events, most_experts, found);
    } catch (const std::bad_alloc&) {
        return STATUS_NO_MEMORY;
    }
    return STATUS_OK;
}

// See time_events.
EXPORT void moe_cache_time_events(const Events* events, const uint16_t* fetched, const double* transfer_s,
                                  const double* before_s, const double* compute_s, double recall, double precision,
                                  uint64_t seed, double* event_s, double* wait_s, PrefetchCounts* prefetch) {
    time_events(*events, fetched, transfer_s, before_s, compute_s, {recall, precision, seed}, event_s, wait_s, prefetch);
}
