// The slots of one layer, by the rules of cache/layer.py and cache/slots.py: same victims, same slot numbers.
#pragma once
#include <cstdint>
#include <vector>

struct Counts {
    int64_t requests, hits, misses, bypassed, evictions;
};

class LayerSlots {
   public:
    LayerSlots(int32_t num_experts, int32_t num_slots);

    // Pin those that are resident until the next `begin`, and note the others; how many are missing.
    int32_t begin(const int32_t* expert_ids, int32_t num);
    bool needs_scores() const { return missing_.size() > empty_.size(); }
    // Slots for the missing, as far as there are any; `scores` may be null unless it needs them.
    void admit_missing(const double* scores, bool only_if_hotter, Counts& counts);

   private:
    int32_t coldest(const double* scores) const;

    std::vector<int32_t> slot_of_, expert_in_, empty_;
    std::vector<char> pinned_;
    std::vector<int32_t> missing_;
};
