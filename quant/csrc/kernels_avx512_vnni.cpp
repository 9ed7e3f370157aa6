// The AVX-512 kernels once more, for processors that multiply and add 16-bit integers in one instruction.
#define MOE_OFFLOAD_VNNI
#include "kernels_avx512.cpp"
