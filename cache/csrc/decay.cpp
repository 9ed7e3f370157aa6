// Exponentially decayed frequency: cache/decay.py.
#include <cmath>

#include "policy.h"

namespace {

constexpr double kHalfLifeEvents = 24;
constexpr double kNewSequenceHalfLives = 40;
constexpr double kRescaleAt = 0x1p200;

class Decay final : public Policy {
   public:
    explicit Decay(const Sizes& num_experts)
        : event_growth_(std::pow(2.0, 1 / kHalfLifeEvents)),
          sequence_growth_(std::pow(2.0, kNewSequenceHalfLives)),
          counts_(num_experts),
          use_weight_(num_experts.size(), 1.0) {}

    void touch(const Event& event) override {
        const double use_weight = grow(event.layer_idx, event_growth_);
        std::vector<double>& counts = counts_[event.layer_idx];
        for (int32_t rank = 0; rank < event.num_experts; ++rank) counts[event.expert_ids[rank]] += use_weight;
    }
    const double* scores(int32_t layer_idx) override { return counts_[layer_idx].data(); }
    void new_sequence() override {
        for (int32_t layer_idx = 0; layer_idx < counts_.num_layers(); ++layer_idx) grow(layer_idx, sequence_growth_);
    }
    Common common(int32_t layer_idx) const override { return {1.0 / use_weight_[layer_idx], 0.0}; }

   private:
    double grow(int32_t layer_idx, double factor) {
        double& use_weight = use_weight_[layer_idx];
        use_weight *= factor;
        if (use_weight > kRescaleAt) {
            for (double& count : counts_[layer_idx]) count /= use_weight;
            use_weight = 1.0;
        }
        return use_weight;
    }

    const double event_growth_, sequence_growth_;
    Scores counts_;
    std::vector<double> use_weight_;
};

}  // namespace

std::unique_ptr<Policy> make_decay(const Sizes& num_experts) { return std::make_unique<Decay>(num_experts); }
