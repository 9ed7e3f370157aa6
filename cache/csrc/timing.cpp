#include "timing.h"

#include <algorithm>

namespace {

// splitmix64 (Steele, Lea, Flood 2014): the same experts are foreseen whatever the policy and the machine.
double uniform(uint64_t value) {
    value += 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return static_cast<double>((value ^ (value >> 31)) >> 11) * 0x1p-53;
}

// What is on its way for an event before its router has chosen.
struct Guesses {
    int32_t num_right = 0, num_wrong = 0;
    double begin_s = 0.0;  // when the link turns to them
};

}  // namespace

void time_events(const Events& events, const uint16_t* fetched, const double* transfer_s, const double* before_s,
                 const double* compute_s, const Link& link, double* event_s, double* wait_s, PrefetchCounts* prefetch) {
    double now_s = 0.0, link_free_s = 0.0, wrong_owed = 0.0;
    Guesses guesses;
    for (int64_t index = 0; index < events.num_events; ++index) {
        event_s[index] = wait_s[index] = 0.0;
        if (!events.size(index)) continue;
        const int32_t layer_idx = events.layer_idx[index];
        const double each_s = transfer_s[layer_idx], chosen_s = now_s + before_s[index];
        PrefetchCounts& counts = prefetch[layer_idx];
        int32_t num_in_time = 0;
        if (guesses.num_right + guesses.num_wrong) {
            const double right_end_s = guesses.begin_s + guesses.num_right * each_s;
            while (num_in_time < guesses.num_right && guesses.begin_s + (num_in_time + 1) * each_s <= chosen_s)
                ++num_in_time;
            int32_t num_wrong = 0;
            while (num_wrong < guesses.num_wrong && right_end_s + num_wrong * each_s < chosen_s) ++num_wrong;
            link_free_s = right_end_s + num_wrong * each_s;
            counts.issued += guesses.num_right + num_wrong;
            counts.used += num_in_time;
            counts.late += guesses.num_right - num_in_time;
            counts.wasted += num_wrong;
        }
        // The resident and those that came in time, then the late ones, then what nobody foresaw.
        const int32_t num_awaited = fetched[index] - num_in_time, num_late = guesses.num_right - num_in_time;
        const double expert_s = compute_s[index] / events.size(index);
        double done_s = chosen_s + (events.size(index) - num_awaited) * expert_s;
        for (int32_t late = 0; late < num_late; ++late)
            done_s = std::max(done_s, guesses.begin_s + (num_in_time + late + 1) * each_s) + expert_s;
        link_free_s = std::max(link_free_s, chosen_s);
        for (int32_t missed = num_late; missed < num_awaited; ++missed) {
            link_free_s += each_s;
            done_s = std::max(done_s, link_free_s) + expert_s;
        }
        event_s[index] = done_s - now_s;
        wait_s[index] = std::max(0.0, done_s - chosen_s - compute_s[index]);
        now_s = done_s;

        guesses = {};
        const int64_t next = index + 1;
        if (next < events.num_events && !events.is_prefill[next] && events.layer_idx[next] > layer_idx) {
            for (int32_t missed = 0; missed < fetched[next]; ++missed)
                guesses.num_right += uniform(link.seed ^ (static_cast<uint64_t>(next) << 16 | missed)) < link.recall;
            wrong_owed += guesses.num_right * (1.0 / link.precision - 1.0);
            guesses.num_wrong = static_cast<int32_t>(wrong_owed);
            wrong_owed -= guesses.num_wrong;
            guesses.begin_s = link_free_s;
        }
    }
}
