// The last tokens, by the experts that they chose, and how alike each is to the token under way: cache/token_history.py.
#pragma once
#include "policy.h"

class TokenHistory {
   public:
    static constexpr int32_t kTokens = 2048;  // that are remembered; a multiple of 8
    static constexpr int32_t kHorizon = 8;    // tokens that a match votes for
    static constexpr int32_t kOne = 4096;     // the vote of the best match

    explicit TokenHistory(const Sizes& num_experts);

    // The token under way, or a new one where the layer is not after the last, has chosen these experts.
    void add(const Event& event);
    // What comes next does not follow on what is here.
    void cut() { is_cut_ = true; }
    // Adds to `votes` [experts] what came after the tokens most like this one; returns the votes that were cast for the
    // first token of each.
    int32_t vote(int32_t layer_idx, int32_t* votes) const;

   private:
    static constexpr int32_t kBytes = kTokens / 8;
    struct Layer {
        std::vector<uint8_t> chose;    // [experts][kBytes]: a bit for each token that chose the expert
        std::vector<int16_t> chosen;   // [kTokens][width]
        std::vector<uint8_t> num_chosen;  // [kTokens]
        int32_t width = 0;
    };

    void begin_token();
    static int32_t before(int32_t token) { return token == 0 ? kTokens - 1 : token - 1; }
    static int32_t after(int32_t token) { return token + 1 == kTokens ? 0 : token + 1; }

    std::vector<Layer> layers_;
    std::vector<char> follows_;                  // [kTokens]: on the token before, in the same text
    std::vector<char> followed_, is_known_;      // [kTokens]: by a token that is over; is over itself
    std::vector<int16_t> alike_, alike_before_;  // [kTokens]: experts in common with this token; the predecessors' too
    int32_t num_chosen_ = 0, num_chosen_before_ = 0;  // by this token so far, by the one before
    int32_t now_ = kTokens - 1, num_known_ = 0, last_layer_ = -1;
    bool is_cut_ = true, has_successor_ = false;
};
