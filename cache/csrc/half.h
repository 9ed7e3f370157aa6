// Weights as traces hold them: fp16, by way of fp32.
#pragma once
#include <cstdint>

// In place: the nearest number that fp16 has, of a tie the even one; beyond its range, with its 11 bits all the same.
void round_to_half(double* values, int64_t num);
