#include "replay.h"

#include <algorithm>
#include <cstddef>

namespace {

class Pool {
   public:
    Pool(const Events& events, Policy& policy, int64_t num_slots, const int32_t* floors)
        : policy_(policy), num_empty_(num_slots), floors_(floors), layers_(events.num_layers) {
        for (int32_t layer_idx = 0; layer_idx < events.num_layers; ++layer_idx) {
            layers_[layer_idx].place.assign(events.num_experts[layer_idx], -1);
            layers_[layer_idx].pinned.assign(events.num_experts[layer_idx], 0);
        }
    }

    // Those that are not resident are noted; how many they are. The others stay until `end`.
    int32_t begin(const Event& event) {
        Layer& layer = layers_[event.layer_idx];
        missing_.clear();
        for (int32_t rank = 0; rank < event.num_experts; ++rank) {
            const int32_t expert_idx = event.expert_ids[rank];
            if (layer.place[expert_idx] < 0) missing_.push_back(expert_idx);
            layer.pinned[expert_idx] = 1;
        }
        return static_cast<int32_t>(missing_.size());
    }

    void admit_missing(int32_t layer_idx, bool only_if_hotter, Counts& counts) {
        Layer& layer = layers_[layer_idx];
        const double* scores = policy_.scores(layer_idx);
        layer.is_current = false;
        if (only_if_hotter)
            std::stable_sort(missing_.begin(), missing_.end(),
                             [=](int32_t a, int32_t b) { return scores[a] > scores[b]; });
        const Policy::Common common = policy_.common(layer_idx);
        for (std::size_t rank = 0; rank < missing_.size(); ++rank) {
            if (num_empty_ > 0) {
                --num_empty_;
            } else {
                double coldest;
                const int32_t victim_layer = find_victim(layer_idx, coldest);
                if (victim_layer < 0 ||
                    (only_if_hotter && coldest >= scores[missing_[rank]] * common.scale + common.offset)) {
                    counts.bypassed += static_cast<int64_t>(missing_.size() - rank);
                    return;
                }
                layers_[victim_layer].evict();
                ++counts.evictions;
            }
            layer.admit(missing_[rank]);
            ++counts.misses;
        }
    }

    void end(const Event& event) {
        Layer& layer = layers_[event.layer_idx];
        for (int32_t rank = 0; rank < event.num_experts; ++rank) layer.pinned[event.expert_ids[rank]] = 0;
        layer.is_current = false;
    }

    void forget_scores() {
        for (Layer& layer : layers_) layer.is_current = false;
    }

   private:
    struct Layer {
        std::vector<int32_t> residents, place;  // the experts that are there, and by expert its place among them or -1
        std::vector<char> pinned;               // by expert
        int32_t coldest = -1;  // of those that may go, while `is_current`; -1: none may
        double score = 0.0;    // its own, made comparable
        bool is_current = false;

        void admit(int32_t expert_idx) {
            place[expert_idx] = static_cast<int32_t>(residents.size());
            residents.push_back(expert_idx);
        }
        void evict() {
            const int32_t last = residents.back();
            residents[place[coldest]] = last;
            place[last] = place[coldest];
            place[coldest] = -1;
            residents.pop_back();
            is_current = false;
        }
    };

    int32_t find_victim(int32_t asking, double& coldest) {
        int32_t found = -1;
        for (int32_t layer_idx = 0; layer_idx < static_cast<int32_t>(layers_.size()); ++layer_idx) {
            Layer& layer = layers_[layer_idx];
            if (layer_idx != asking && static_cast<int32_t>(layer.residents.size()) <= floors_[layer_idx]) continue;
            if (!layer.is_current) look(layer_idx);
            if (layer.coldest < 0) continue;
            if (found < 0 || layer.score < coldest) {
                found = layer_idx;
                coldest = layer.score;
            }
        }
        return found;
    }

    void look(int32_t layer_idx) {
        Layer& layer = layers_[layer_idx];
        const double* scores = policy_.scores(layer_idx);
        layer.coldest = -1;
        layer.is_current = true;
        double lowest = 0.0;
        for (const int32_t expert_idx : layer.residents) {
            if (layer.pinned[expert_idx]) continue;
            const double score = scores[expert_idx];
            if (layer.coldest < 0 || score < lowest || (score == lowest && expert_idx < layer.coldest)) {
                layer.coldest = expert_idx;
                lowest = score;
            }
        }
        const Policy::Common common = policy_.common(layer_idx);
        layer.score = lowest * common.scale + common.offset;
    }

    Policy& policy_;
    int64_t num_empty_;
    const int32_t* floors_;
    std::vector<Layer> layers_;
    std::vector<int32_t> missing_;
};

}  // namespace

void replay_pool(const Events& events, Policy& policy, bool is_oracle, int64_t num_slots, const int32_t* floors,
                 Counts* counts, uint16_t* fetched) {
    Pool pool(events, policy, num_slots, floors);
    replay(events, policy, is_oracle, counts, fetched, pool);
}
