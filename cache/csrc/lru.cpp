// Least recently used: cache/lru.py.
#include "policy.h"

namespace {

class Lru final : public Policy {
   public:
    explicit Lru(const Sizes& num_experts) : last_use_(num_experts), clock_(num_experts.size(), 0.0) {}

    void touch(const Event& event) override {
        std::vector<double>& last_use = last_use_[event.layer_idx];
        double& clock = clock_[event.layer_idx];
        clock += event.num_experts;
        for (int32_t rank = 0; rank < event.num_experts; ++rank) last_use[event.expert_ids[rank]] = clock - rank;
    }
    const double* scores(int32_t layer_idx) override { return last_use_[layer_idx].data(); }
    Common common(int32_t layer_idx) const override { return {1.0, -clock_[layer_idx]}; }

   private:
    Scores last_use_;
    std::vector<double> clock_;
};

}  // namespace

std::unique_ptr<Policy> make_lru(const Sizes& num_experts) { return std::make_unique<Lru>(num_experts); }
