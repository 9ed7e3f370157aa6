#include "replay.h"

namespace {

class Layers {
   public:
    Layers(const Events& events, Policy& policy, const int32_t* num_slots) : policy_(policy) {
        for (int32_t layer_idx = 0; layer_idx < events.num_layers; ++layer_idx)
            layers_.emplace_back(events.num_experts[layer_idx], num_slots[layer_idx]);
    }
    int32_t begin(const Event& event) { return layers_[event.layer_idx].begin(event.expert_ids, event.num_experts); }
    void admit_missing(int32_t layer_idx, bool only_if_hotter, Counts& counts) {
        LayerSlots& slots = layers_[layer_idx];
        slots.admit_missing(slots.needs_scores() ? policy_.scores(layer_idx) : nullptr, only_if_hotter, counts);
    }
    void end(const Event&) {}
    void forget_scores() {}

   private:
    Policy& policy_;
    std::vector<LayerSlots> layers_;
};

}  // namespace

void replay_layers(const Events& events, Policy& policy, bool is_oracle, const int32_t* num_slots, Counts* counts,
                   uint16_t* fetched) {
    Layers layers(events, policy, num_slots);
    replay(events, policy, is_oracle, counts, fetched, layers);
}
