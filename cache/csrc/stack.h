// LRU at every size in one pass: Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies",
// IBM Systems Journal 9, 1970.
#pragma once
#include "events.h"

// Adds to `found` [layers, 2, most_experts + 1], prompts first, how often an expert was so far down its layer's stack
// when it was asked for: with S slots, whatever lies above S is a hit. The last of each row is for first uses. Every
// event counts as one that evicts for all its experts; true for sizes that hold the largest event.
void stack_distances(const Events& events, int32_t most_experts, int64_t* found);
