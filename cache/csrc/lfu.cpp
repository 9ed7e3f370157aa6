// Least frequently used: cache/lfu.py.
#include <cmath>

#include "policy.h"

namespace {

constexpr double kEvent = 1.0 / 4294967296.0;  // a score is a count and, behind the point, the time of the last use

class Lfu final : public Policy {
   public:
    explicit Lfu(const Sizes& num_experts) : scores_(num_experts), now_(num_experts.size(), 0.0) {}

    void touch(const Event& event) override {
        std::vector<double>& scores = scores_[event.layer_idx];
        const double now = now_[event.layer_idx] += kEvent;
        for (int32_t rank = 0; rank < event.num_experts; ++rank) {
            double& score = scores[event.expert_ids[rank]];
            score = std::trunc(score) + 1 + now;
        }
    }
    const double* scores(int32_t layer_idx) override { return scores_[layer_idx].data(); }

   private:
    Scores scores_;
    std::vector<double> now_;
};

}  // namespace

std::unique_ptr<Policy> make_lfu(const Sizes& num_experts) { return std::make_unique<Lfu>(num_experts); }
