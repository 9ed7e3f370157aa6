// The policies by name.
#include "policy.h"

const NamedPolicy kPolicies[] = {
    {"lru", make_lru},
    {"lfu", make_lfu},
    {"decay", make_decay},
    {"recall", make_recall},
    {nullptr, nullptr},
};
