#include "replay.h"

void replay_layers(const Events& events, Policy& policy, bool is_oracle, const int32_t* num_slots, Counts* counts,
                   uint16_t* fetched) {
    std::vector<LayerSlots> layers;
    for (int32_t layer_idx = 0; layer_idx < events.num_layers; ++layer_idx)
        layers.emplace_back(events.num_experts[layer_idx], num_slots[layer_idx]);
    for (int64_t index = 0; index < events.num_events; ++index) {
        const Event event = events.at(index);
        int32_t num_missing = 0;
        if (events.kind[index] == NEW_SEQUENCE) {
            policy.new_sequence();
        } else if (event.num_experts) {
            const bool only_if_hotter = events.kind[index] == ACQUIRE_IF_HOTTER;
            const bool touch_first = is_oracle || !only_if_hotter;
            LayerSlots& slots = layers[event.layer_idx];
            Counts& count = counts[event.layer_idx * 2 + !events.is_prefill[index]];
            num_missing = slots.begin(event.expert_ids, event.num_experts);
            count.requests += event.num_experts;
            count.hits += event.num_experts - num_missing;
            if (touch_first) policy.touch(event);
            if (num_missing) {
                const double* scores = slots.needs_scores() ? policy.scores(event.layer_idx) : nullptr;
                slots.admit_missing(scores, only_if_hotter, count);
            }
            if (!touch_first) policy.touch(event);
        }
        if (fetched != nullptr) fetched[index] = static_cast<uint16_t>(num_missing);
    }
}
