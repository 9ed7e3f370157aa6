#include "token_history.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "clones.h"

namespace {

constexpr double kSharpness = 18;          // a match counts e times less for every 1/18 that it is less like this token
constexpr double kBeforeShare = 1.0 / 3;   // of likeness: that of the tokens before
constexpr double kNextTokenShare = 0.75;   // of the votes for a token, those for the token after it
constexpr int32_t kStepsPerHalving = 16;
constexpr int32_t kSteps = 5 * kStepsPerHalving;  // a match of less than 1/32 of the best one's weight has no vote
constexpr double kStepsPerLikeness = kSharpness * 1.4426950408889634 * kStepsPerHalving;
constexpr int32_t kLeastVote = TokenHistory::kOne / 32;
constexpr int32_t kMatches = 96;                    // as many vote at most

struct Tables {
    uint64_t spread[256];  // the bits of a byte, a byte each
    int32_t weight[kSteps];
    int32_t share[TokenHistory::kHorizon];
    Tables() {
        for (int32_t byte = 0; byte < 256; ++byte) {
            uint8_t bits[8];
            for (int32_t bit = 0; bit < 8; ++bit) bits[bit] = static_cast<uint8_t>(byte >> bit & 1);
            std::memcpy(&spread[byte], bits, 8);
        }
        for (int32_t step = 0; step < kSteps; ++step)
            weight[step] = static_cast<int32_t>(TokenHistory::kOne * std::exp2(-step / double(kStepsPerHalving)) + 0.5);
        double left = TokenHistory::kOne;
        for (int32_t& of_token : share) {
            of_token = static_cast<int32_t>(left + 0.5);
            left *= kNextTokenShare;
        }
    }
};
const Tables kTables;

int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

TokenHistory::TokenHistory(const Sizes& num_experts)
    : layers_(num_experts.size()), follows_(kTokens, 0), followed_(kTokens, 0), is_known_(kTokens, 0), alike_(kTokens, 0), alike_before_(kTokens, 0) {
    for (std::size_t layer_idx = 0; layer_idx < num_experts.size(); ++layer_idx) {
        layers_[layer_idx].chose.assign(static_cast<std::size_t>(num_experts[layer_idx]) * kBytes, 0);
        layers_[layer_idx].num_chosen.assign(kTokens, 0);
    }
}

void TokenHistory::begin_token() {
    const bool follows = !is_cut_;
    is_cut_ = false;
    now_ = after(now_);
    for (Layer& layer : layers_) {
        for (int32_t rank = 0; rank < layer.num_chosen[now_]; ++rank)
            layer.chose[static_cast<std::size_t>(layer.chosen[now_ * layer.width + rank]) * kBytes + now_ / 8] &=
                static_cast<uint8_t>(~(1 << now_ % 8));
        layer.num_chosen[now_] = 0;
    }
    // A token may vote for the next one when that is over: from the token after it on.
    if (has_successor_) followed_[before(before(now_))] = 1;
    is_known_[before(now_)] = num_known_ > 0;
    is_known_[now_] = followed_[now_] = 0;
    follows_[now_] = has_successor_ = follows;
    follows_[after(now_)] = 0;  // the oldest: what it followed on has just been forgotten
    // Before this token and a remembered one were two that were as alike as has been counted so far.
    std::copy_backward(alike_.begin(), alike_.end() - 1, alike_before_.end());
    alike_before_[0] = alike_[kTokens - 1];
    num_known_ = std::min(num_known_ + 1, kTokens);
    std::fill(alike_.begin(), alike_.end(), int16_t{0});
    num_chosen_before_ = follows ? num_chosen_ : 0;
    num_chosen_ = 0;
}

MOE_CACHE_CLONES void TokenHistory::add(const Event& event) {
    if (is_cut_ || event.layer_idx <= last_layer_) begin_token();
    last_layer_ = event.layer_idx;
    num_chosen_ += event.num_experts;
    Layer& layer = layers_[event.layer_idx];
    uint64_t counts[kBytes] = {};
    for (int32_t rank = 0; rank < event.num_experts; ++rank) {
        uint8_t* row = &layer.chose[static_cast<std::size_t>(event.expert_ids[rank]) * kBytes];
        for (int32_t byte = 0; byte < kBytes; ++byte) counts[byte] += kTables.spread[row[byte]];
        row[now_ / 8] |= static_cast<uint8_t>(1 << now_ % 8);
    }
    uint8_t shared[kTokens];
    std::memcpy(shared, counts, kTokens);
    for (int32_t token = 0; token < kTokens; ++token) alike_[token] = static_cast<int16_t>(alike_[token] + shared[token]);
    if (event.num_experts > layer.width) {
        std::vector<int16_t> wider(static_cast<std::size_t>(kTokens) * event.num_experts);
        for (int32_t token = 0; token < kTokens; ++token)
            std::copy_n(layer.chosen.begin() + token * layer.width, layer.num_chosen[token],
                        wider.begin() + token * event.num_experts);
        layer.chosen.swap(wider);
        layer.width = event.num_experts;
    }
    layer.num_chosen[now_] = static_cast<uint8_t>(event.num_experts);
    for (int32_t rank = 0; rank < event.num_experts; ++rank)
        layer.chosen[now_ * layer.width + rank] = static_cast<int16_t>(event.expert_ids[rank]);
}

MOE_CACHE_CLONES int32_t TokenHistory::vote(int32_t layer_idx, int32_t* votes) const {
    if (is_cut_ || num_known_ < 2) return 0;
    const auto of_now = static_cast<float>((1 - kBeforeShare) / num_chosen_);
    const auto of_before = static_cast<float>(num_chosen_before_ ? kBeforeShare / num_chosen_before_ : 0.0);
    // The first vote is for the token after the match; where the layer's turn is still to come, for the match itself.
    const bool is_past = layer_idx <= last_layer_;
    // Likeness is not negative, and such floats are in the order of their bits: whole numbers, compared in vectors.
    int32_t likeness[kTokens];
    const char* may_vote = is_past ? followed_.data() : is_known_.data();
    int32_t best_bits = -1;
    for (int32_t token = 0; token < kTokens; ++token) {
        const float value =
            static_cast<float>(alike_[token]) * of_now + static_cast<float>(alike_before_[token]) * of_before;
        likeness[token] = may_vote[token] ? bits_of(value) : -1;
        best_bits = std::max(best_bits, likeness[token]);
    }
    if (best_bits <= 0) return 0;

    const float best = float_of(best_bits);
    const int32_t least_bits = bits_of(std::max(best - static_cast<float>(kSteps / kStepsPerLikeness), 0x1p-20f));
    int32_t num_at[kSteps] = {};
    int16_t matches[kTokens];
    uint8_t steps[kTokens];
    int32_t num_matches = 0;
    for (int32_t begin = 0; begin < kTokens; begin += 16) {
        int32_t most_bits = -1;
        for (int32_t token = begin; token < begin + 16; ++token) most_bits = std::max(most_bits, likeness[token]);
        if (most_bits < least_bits) continue;
        for (int32_t token = begin; token < begin + 16; ++token) {
            if (likeness[token] < least_bits) continue;
            const auto step =
                static_cast<int32_t>((best - float_of(likeness[token])) * static_cast<float>(kStepsPerLikeness));
            if (step >= kSteps) continue;
            ++num_at[step];
            matches[num_matches] = static_cast<int16_t>(token);
            steps[num_matches++] = static_cast<uint8_t>(step);
        }
    }
    int32_t last_step = 0;
    for (int32_t num = num_at[0]; last_step + 1 < kSteps && num + num_at[last_step + 1] <= kMatches;)
        num += num_at[++last_step];

    const Layer& layer = layers_[layer_idx];
    int32_t cast = 0;
    // From the oldest on, since of too many equals the latest vote.
    int32_t num_skipped = num_at[0] - kMatches;
    const auto oldest = static_cast<int32_t>(std::upper_bound(matches, matches + num_matches, now_) - matches);
    for (int32_t count = 0; count < num_matches; ++count) {
        const int32_t index = oldest + count < num_matches ? oldest + count : oldest + count - num_matches;
        if (steps[index] > last_step || (steps[index] == 0 && num_skipped-- > 0)) continue;
        const int32_t weight = kTables.weight[steps[index]];
        cast += weight;
        int32_t token = is_past ? after(matches[index]) : matches[index];
        for (int32_t ahead = 0; ahead < kHorizon; ++ahead) {
            const int32_t share = weight * kTables.share[ahead] / kOne;
            if (share < kLeastVote) break;
            const int16_t* chosen = layer.chosen.data() + token * layer.width;
            for (int32_t rank = 0; rank < layer.num_chosen[token]; ++rank) votes[chosen[rank]] += share;
            token = after(token);
            if (token == now_ || !follows_[token]) break;
        }
    }
    return cast;
}
