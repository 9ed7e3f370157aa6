#include "learned.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace {

class Learned final : public Policy {
   public:
    Learned(const Sizes& num_experts, const LearnedWeights& weights)
        : recall_(make_recall(num_experts)),
          num_experts_(num_experts),
          width_(weights.width),
          start_(weights.start, weights.start + weights.width),
          state_(start_),
          for_next_(width_, 0.0f),
          scores_(num_experts) {
        std::size_t num = 0;
        for (const int32_t n : num_experts) {
            first_.push_back(num);
            num += static_cast<std::size_t>(n);
        }
        now_.assign(weights.now, weights.now + num * width_);
        before_.assign(weights.before, weights.before + num * width_);
        out_.assign(weights.out, weights.out + num * width_);
        bias_.assign(weights.bias, weights.bias + num);
    }

    void touch(const Event& event) override {
        recall_->touch(event);
        if (!is_token(event.num_experts, num_experts_[event.layer_idx])) {
            cut();
            return;
        }
        if (event.layer_idx <= last_layer_) {
            for (int32_t at = 0; at < width_; ++at) state_[at] = start_[at] + for_next_[at];
            std::fill(for_next_.begin(), for_next_.end(), 0.0f);
        }
        last_layer_ = event.layer_idx;
        for (int32_t rank = 0; rank < event.num_experts; ++rank) {
            const std::size_t row = (first_[event.layer_idx] + event.expert_ids[rank]) * width_;
            for (int32_t at = 0; at < width_; ++at) {
                state_[at] += now_[row + at];
                for_next_[at] += before_[row + at];
            }
        }
    }

    const double* scores(int32_t layer_idx) override {
        const double* recalled = recall_->scores(layer_idx);
        const int32_t num_experts = num_experts_[layer_idx];
        const float* out = &out_[first_[layer_idx] * width_];
        values_.assign(&bias_[first_[layer_idx]], &bias_[first_[layer_idx]] + num_experts);
        for (int32_t at = 0; at < width_; ++at) {
            const float input = state_[at] / (1.0f + std::fabs(state_[at]));
            const float* weights = out + static_cast<std::size_t>(at) * num_experts;
            for (int32_t expert_idx = 0; expert_idx < num_experts; ++expert_idx)
                values_[expert_idx] += weights[expert_idx] * input;
        }
        std::vector<double>& scores = scores_[layer_idx];
        for (int32_t expert_idx = 0; expert_idx < num_experts; ++expert_idx)
            scores[expert_idx] =
                recalled[expert_idx] > 0 ? recalled[expert_idx] + static_cast<double>(values_[expert_idx]) : 0.0;
        return scores.data();
    }

    void new_sequence() override {
        recall_->new_sequence();
        cut();
    }

   private:
    void cut() {
        state_ = start_;
        std::fill(for_next_.begin(), for_next_.end(), 0.0f);
        last_layer_ = -1;
    }

    std::unique_ptr<Policy> recall_;
    const Sizes num_experts_;
    const int32_t width_;
    std::vector<std::size_t> first_;  // [layers]: of the experts of all layers
    std::vector<float> start_, now_, before_, out_, bias_;
    std::vector<float> state_, for_next_;  // of this token so far; what it leaves for the next one
    int32_t last_layer_ = -1;
    Scores scores_;
    std::vector<float> values_;
};

}  // namespace

std::unique_ptr<Policy> make_learned(const Sizes& num_experts, const LearnedWeights& weights) {
    return std::make_unique<Learned>(num_experts, weights);
}
