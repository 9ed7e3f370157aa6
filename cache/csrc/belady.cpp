#include "belady.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

class Belady final : public Policy {
   public:
    explicit Belady(const Events& events) : scores_(events.layer_sizes()) {
        // From the end, the latest use of every expert seen so far is the next use of the one before.
        for (int32_t layer_idx = 0; layer_idx < events.num_layers; ++layer_idx)
            scores_[layer_idx].assign(events.num_experts[layer_idx], kNever);
        after_.resize(events.begin[events.num_events]);
        std::vector<int64_t> rising;
        for (int64_t index = events.num_events - 1; index >= 0; --index) {
            std::vector<double>& scores = scores_[events.layer_idx[index]];
            rising.resize(events.begin[index + 1] - events.begin[index]);
            std::iota(rising.begin(), rising.end(), events.begin[index]);
            for (int64_t at : rising) after_[at] = scores[events.expert_ids[at]];
            std::stable_sort(rising.begin(), rising.end(),
                             [&](int64_t left, int64_t right) { return after_[left] < after_[right]; });
            // Those that one event asks for are told apart by their uses after it: where a prompt may displace only
            // what is colder, it matters which of them stays.
            const double num = static_cast<double>(rising.size());
            for (size_t rank = 0; rank < rising.size(); ++rank)
                scores[events.expert_ids[rising[rank]]] =
                    -static_cast<double>(index) + static_cast<double>(rank) / num;
        }
    }

    void touch(const Event& event) override {
        std::vector<double>& scores = scores_[event.layer_idx];
        for (int32_t rank = 0; rank < event.num_experts; ++rank) scores[event.expert_ids[rank]] = after_[at_++];
    }
    const double* scores(int32_t layer_idx) override { return scores_[layer_idx].data(); }

   private:
    Scores scores_;
    std::vector<double> after_;  // of every use in order, the score of its expert from then on
    int64_t at_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_belady(const Events& events) { return std::make_unique<Belady>(events); }
