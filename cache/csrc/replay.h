// What a cache would have done with recorded events.
#pragma once
#include "events.h"
#include "slots.h"

// Gives the events to a cache, which has begin, admit_missing, end and forget_scores. Adds to `counts` [layers, 2],
// prompts first, and writes how many experts each event had to fetch, with or without a slot, to `fetched` [events].
// `is_oracle`: the policy is told of an event before it judges, also of a prompt.
template <typename Cache>
void replay(const Events& events, Policy& policy, bool is_oracle, Counts* counts, uint16_t* fetched, Cache& cache) {
    for (int64_t index = 0; index < events.num_events; ++index) {
        const Event event = events.at(index);
        fetched[index] = 0;
        if (events.kind[index] == NEW_SEQUENCE) {
            policy.new_sequence();
            cache.forget_scores();
            continue;
        }
        if (!event.num_experts) continue;
        const bool only_if_hotter = events.kind[index] == ACQUIRE_IF_HOTTER;
        const bool touch_first = is_oracle || !only_if_hotter;
        Counts& count = counts[event.layer_idx * 2 + !events.is_prefill[index]];
        const int32_t num_missing = cache.begin(event);
        count.requests += event.num_experts;
        count.hits += event.num_experts - num_missing;
        fetched[index] = static_cast<uint16_t>(num_missing);
        if (touch_first) policy.touch(event);
        if (num_missing) cache.admit_missing(event.layer_idx, only_if_hotter, count);
        if (!touch_first) policy.touch(event);
        cache.end(event);
    }
}

// Slots of each layer's own, `num_slots` [layers].
void replay_layers(const Events& events, Policy& policy, bool is_oracle, const int32_t* num_slots, Counts* counts,
                   uint16_t* fetched);

// One pool of `num_slots` for all layers, of which every layer keeps `floors` [layers] once it has them. The coldest
// expert of all layers goes, by the scores that its layer had after its last event (Policy::common makes them
// comparable); of equals that of the lower layer, then the lower expert.
void replay_pool(const Events& events, Policy& policy, bool is_oracle, int64_t num_slots, const int32_t* floors,
                 Counts* counts, uint16_t* fetched);
