#include "half.h"

#include <algorithm>
#include <cmath>

void round_to_half(double* values, int64_t num) {
    for (int64_t i = 0; i < num; ++i) {
        const double value = values[i] = static_cast<float>(values[i]);
        if (value == 0.0 || !std::isfinite(value)) continue;
        int exponent;
        std::frexp(value, &exponent);
        const int unit = std::max(exponent - 11, -24);
        values[i] = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
    }
}
