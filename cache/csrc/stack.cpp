#include "stack.h"

void stack_distances(const Events& events, int32_t most_experts, int64_t* found) {
    // By layer and expert how many were used later; never used: the layer's number of experts.
    std::vector<std::vector<int16_t>> depth_of;
    for (int32_t layer_idx = 0; layer_idx < events.num_layers; ++layer_idx)
        depth_of.emplace_back(events.num_experts[layer_idx], static_cast<int16_t>(events.num_experts[layer_idx]));
    for (int64_t index = 0; index < events.num_events; ++index) {
        const int32_t layer_idx = events.layer_idx[index];
        std::vector<int16_t>& depths = depth_of[layer_idx];
        const auto never = static_cast<int16_t>(depths.size());
        int64_t* row = found + (layer_idx * 2 + !events.is_prefill[index]) * static_cast<int64_t>(most_experts + 1);
        for (int64_t at = events.begin[index]; at < events.begin[index + 1]; ++at) {
            const int16_t depth = depths[events.expert_ids[at]];
            ++row[depth == never ? most_experts : depth];
        }
        // The first choice comes to lie on top.
        for (int64_t at = events.begin[index + 1] - 1; at >= events.begin[index]; --at) {
            const int16_t from = depths[events.expert_ids[at]];
            for (int16_t& depth : depths) depth = static_cast<int16_t>(depth + (depth < from));
            depths[events.expert_ids[at]] = 0;
        }
    }
}
