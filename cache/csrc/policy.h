// The contract of a policy, as in cache/policy.py; one implementation serves the running cache and replay.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

// A step asked a layer for these experts: all different, best first, at least one.
struct Event {
    int32_t layer_idx;
    int32_t num_experts;
    const int32_t* expert_ids;
    const double* weights;  // how much of each, rounded to fp16 as traces hold them; null if not known
    int32_t token_id;       // of a step of one token; -1 if not known
};

using Sizes = std::vector<int32_t>;  // one number per layer

// Whether an event is of one token, or so few that it makes no difference; else it is of a prompt.
inline bool is_token(int32_t num_asked, int32_t num_experts) {
    return num_asked <= 32 && 2 * num_asked <= num_experts + 1;
}

class Policy {
   public:
    virtual ~Policy() = default;
    virtual void touch(const Event& event) = 0;
    // One number per expert of the layer, higher stays longer, no NaN; valid until the next call, always at the same
    // address for a layer.
    virtual const double* scores(int32_t layer_idx) = 0;
    virtual void new_sequence() {}

    // What makes scores of several layers comparable, for a pool: score * scale + offset. Changes, as scores do, with an
    // event of the layer or a new sequence.
    struct Common {
        double scale = 1.0;
        double offset = 0.0;
    };
    virtual Common common(int32_t) const { return {}; }
};

std::unique_ptr<Policy> make_lru(const Sizes& num_experts);
std::unique_ptr<Policy> make_lfu(const Sizes& num_experts);
std::unique_ptr<Policy> make_decay(const Sizes& num_experts);
std::unique_ptr<Policy> make_recall(const Sizes& num_experts);

// Every policy, by the name that cache/registry.py gives it; ends with a null name.
struct NamedPolicy {
    const char* name;
    std::unique_ptr<Policy> (*make)(const Sizes& num_experts);
};
extern const NamedPolicy kPolicies[];

// A score for every expert of every layer.
class Scores {
   public:
    explicit Scores(const Sizes& num_experts) {
        for (const int32_t n : num_experts) layers_.emplace_back(n, 0.0);
    }
    std::vector<double>& operator[](int32_t layer_idx) { return layers_[layer_idx]; }
    int32_t num_layers() const { return static_cast<int32_t>(layers_.size()); }

   private:
    std::vector<std::vector<double>> layers_;
};
