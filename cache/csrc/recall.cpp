// What came after tokens like this one, and decayed frequencies: cache/recall.py.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "token_history.h"

namespace {

constexpr int32_t kNumRates = 5;
constexpr double kHalfLifeEvents[kNumRates] = {2, 8, 24, 128, 1000};
constexpr float kRateWeights[kNumRates] = {-0.032f, -0.070f, 0.293f, 0.288f, -0.199f};
constexpr float kAgeWeight = -0.160f, kRankWeight = -0.238f, kVoteWeight = 0.379f;
constexpr float kNewSequenceShare = 0.3f;  // of what was counted before
constexpr float kUnseen = 0.03f;           // added to a share, in units of the average one, before its logarithm
constexpr float kPriorVotes = 2.0f;        // of best matches, for the long-term rates
constexpr float kLastRatePrior = 0.1f;
constexpr int32_t kOldestAge = 2000;
constexpr double kUsed = 64;  // any expert that was ever used is ahead of all that never were

// Between powers of two a straight line: the same on every machine, and good to 0.09.
float log2_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<float>(bits) * 0x1p-23f - 127.0f;
}

class Recall final : public Policy {
   public:
    explicit Recall(const Sizes& num_experts) : history_(num_experts), scores_(num_experts) {
        for (const int32_t n : num_experts) layers_.emplace_back(n);
        for (int32_t rate = 0; rate < kNumRates; ++rate)
            kept_[rate] =
                static_cast<float>(std::pow(2.0, -1 / kHalfLifeEvents[rate]));
    }

    void touch(const Event& event) override {
        Layer& layer = layers_[event.layer_idx];
        const auto num_experts = static_cast<int32_t>(layer.last_use.size());
        const bool of_token = is_token(event.num_experts, num_experts);
        ++layer.clock;
        for (int32_t rate = 0; rate < kNumRates; ++rate) {
            const float kept = kept_[rate], added = 1.0f - kept;
            layer.observed[rate] = layer.observed[rate] * kept + added;
            for (float& value : layer.rates[rate]) value *= kept;
            for (int32_t rank = 0; rank < event.num_experts; ++rank)
                layer.rates[rate][event.expert_ids[rank]] += of_token ? added : added * share_of(event, rank);
        }
        for (int32_t rank = 0; rank < event.num_experts; ++rank) {
            layer.last_use[event.expert_ids[rank]] = layer.clock;
            layer.last_rank[event.expert_ids[rank]] = static_cast<float>(rank) / static_cast<float>(event.num_experts);
        }
        if (of_token) {
            layer.base = static_cast<float>(event.num_experts) / static_cast<float>(num_experts);
            history_.add(event);
        } else {
            history_.cut();
        }
    }

    const double* scores(int32_t layer_idx) override {
        const Layer& layer = layers_[layer_idx];
        std::vector<double>& scores = scores_[layer_idx];
        if (!layer.clock) return scores.data();
        const auto num_experts = static_cast<int32_t>(scores.size());
        const float base = layer.base;
        votes_.assign(num_experts, 0);
        values_.assign(num_experts, 0.0f);
        const float votes_cast = static_cast<float>(history_.vote(layer_idx, votes_.data())) / TokenHistory::kOne;
        for (int32_t rate = 0; rate < kNumRates; ++rate) {
            const float prior = 0.1f / static_cast<float>(rate + 1), offset = prior * base;
            const float scale = 1.0f / ((layer.observed[rate] + prior) * base), weight = kRateWeights[rate];
            const float* rates = layer.rates[rate].data();
            for (int32_t expert_idx = 0; expert_idx < num_experts; ++expert_idx)
                values_[expert_idx] += weight * log2_of((rates[expert_idx] + offset) * scale + kUnseen);
        }
        const float* rates = layer.rates[kNumRates - 1].data();
        const float offset = kLastRatePrior * base;
        const float prior_scale = kPriorVotes / (layer.observed[kNumRates - 1] + kLastRatePrior);
        const float scale = 1.0f / ((votes_cast + kPriorVotes) * base);
        for (int32_t expert_idx = 0; expert_idx < num_experts; ++expert_idx) {
            const float votes = static_cast<float>(votes_[expert_idx]) / TokenHistory::kOne;
            const float prior = (rates[expert_idx] + offset) * prior_scale;
            const auto age = static_cast<float>(1 + std::min(layer.clock - layer.last_use[expert_idx], kOldestAge));
            float value = values_[expert_idx] + kVoteWeight * log2_of((votes + prior) * scale + kUnseen);
            value += kAgeWeight * log2_of(age);
            value += kRankWeight * layer.last_rank[expert_idx];
            scores[expert_idx] = layer.last_use[expert_idx] ? kUsed + static_cast<double>(value) : 0.0;
        }
        return scores.data();
    }

    void new_sequence() override {
        for (Layer& layer : layers_) {
            for (int32_t rate = 0; rate < kNumRates; ++rate) {
                layer.observed[rate] *= kNewSequenceShare;
                for (float& value : layer.rates[rate]) value *= kNewSequenceShare;
            }
        }
        history_.cut();
    }

   private:
    struct Layer {
        explicit Layer(int32_t num_experts) : last_use(num_experts, 0), last_rank(num_experts, 1.0f) {
            for (std::vector<float>& of_rate : rates) of_rate.assign(num_experts, 0.0f);
        }
        std::vector<float> rates[kNumRates];    // [experts]: decayed shares of events that asked for each
        float observed[kNumRates] = {};         // what they would be of an expert that all asked for
        std::vector<int32_t> last_use;          // [experts]: by the clock; 0: never
        std::vector<float> last_rank;           // [experts]: from 0, the best, to 1
        int32_t clock = 0;                      // events
        float base = 1.0f;                      // share of its experts that a token chooses
    };

    // How much of a prompt's experts, of which the first has most, this one has.
    static float share_of(const Event& event, int32_t rank) {
        if (event.weights == nullptr || !(event.weights[0] > 0)) return 1.0f;
        return static_cast<float>(event.weights[rank] / event.weights[0]);
    }

    TokenHistory history_;
    Scores scores_;
    std::vector<Layer> layers_;
    float kept_[kNumRates];
    std::vector<int32_t> votes_;
    std::vector<float> values_;
};

}  // namespace

std::unique_ptr<Policy> make_recall(const Sizes& num_experts) { return std::make_unique<Recall>(num_experts); }
