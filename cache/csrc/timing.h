// How long the steps of a replay would have taken.
#pragma once
#include "events.h"

struct Link {
    double recall;     // share of what is fetched that is foreseen one layer ahead
    double precision;  // share of what is prefetched that is asked for
    uint64_t seed;     // which ones are foreseen
};

struct PrefetchCounts {
    int64_t issued, used, late, wasted;
};

// What an event waits for goes one after the other over a link, which takes `transfer_s` [layers] for an expert.
// `before_s` [events] passes until the layer's router has chosen, `compute_s` [events] in its experts, those that are
// resident first and each other one when it has come. What is foreseen of a decode token's next layer is sent behind the
// misses of this one, right guesses before wrong ones; it is late if the link has not brought it when it is asked for,
// and wrong guesses are dropped then, all but the one that is under way. Writes `event_s` and `wait_s` [events], the
// part of it in which nothing was computed because an expert was awaited; adds to `prefetch` [layers].
void time_events(const Events& events, const uint16_t* fetched, const double* transfer_s, const double* before_s,
                 const double* compute_s, const Link& link, double* event_s, double* wait_s, PrefetchCounts* prefetch);
