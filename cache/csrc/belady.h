// Belady's optimum (IBM Systems Journal 5, 1966): who is needed again last goes first.
#pragma once
#include "events.h"

// An oracle: touched with these events in order, all of them, it scores by the next use.
std::unique_ptr<Policy> make_belady(const Events& events);
