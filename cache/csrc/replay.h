// What a cache would have done with recorded events.
#pragma once
#include "events.h"
#include "slots.h"

// Slots per layer in `num_slots` [layers]. Adds to `counts` [layers, 2], prompts first, and writes how many experts each
// event had to fetch, with or without a slot, to `fetched` [events] unless it is null.
// `is_oracle`: the policy is told of an event before it judges, also of a prompt.
void replay_layers(const Events& events, Policy& policy, bool is_oracle, const int32_t* num_slots, Counts* counts,
                   uint16_t* fetched);
