#include "slots.h"

#include <algorithm>
#include <cstddef>

LayerSlots::LayerSlots(int32_t num_experts, int32_t num_slots)
    : slot_of_(num_experts, -1), expert_in_(num_slots, -1), pinned_(num_slots, 0) {
    for (int32_t slot = num_slots - 1; slot >= 0; --slot) empty_.push_back(slot);
}

int32_t LayerSlots::begin(const int32_t* expert_ids, int32_t num) {
    std::fill(pinned_.begin(), pinned_.end(), 0);
    missing_.clear();
    for (int32_t rank = 0; rank < num; ++rank) {
        const int32_t slot = slot_of_[expert_ids[rank]];
        if (slot < 0)
            missing_.push_back(expert_ids[rank]);
        else
            pinned_[slot] = 1;
    }
    return static_cast<int32_t>(missing_.size());
}

int32_t LayerSlots::coldest(const double* scores) const {
    int32_t best = -1;
    double lowest = 0.0;
    for (int32_t slot = 0; slot < static_cast<int32_t>(expert_in_.size()); ++slot) {
        if (pinned_[slot]) continue;
        const double score = scores[expert_in_[slot]];
        if (best < 0 || score < lowest) {
            best = slot;
            lowest = score;
        }
    }
    return best;
}

void LayerSlots::admit_missing(const double* scores, bool only_if_hotter, Counts& counts) {
    if (only_if_hotter && needs_scores())
        std::stable_sort(missing_.begin(), missing_.end(), [=](int32_t a, int32_t b) { return scores[a] > scores[b]; });
    for (std::size_t rank = 0; rank < missing_.size(); ++rank) {
        int32_t slot;
        if (!empty_.empty()) {
            slot = empty_.back();
            empty_.pop_back();
        } else {
            slot = coldest(scores);
            if (slot < 0 || (only_if_hotter && scores[expert_in_[slot]] >= scores[missing_[rank]])) {
                counts.bypassed += static_cast<int64_t>(missing_.size() - rank);
                return;
            }
            slot_of_[expert_in_[slot]] = -1;
            ++counts.evictions;
        }
        expert_in_[slot] = missing_[rank];
        slot_of_[missing_[rank]] = slot;
        pinned_[slot] = 1;
        ++counts.misses;
    }
}
