// Functions compiled for several instruction sets, of which the loader takes the best that the processor has. Nothing is
// reordered or fused (-ffp-contract=off), so all give the same bits.
#pragma once
#include <cstdint>

#if !defined(__x86_64__) || !defined(__GLIBC__) || !defined(__GNUC__) || defined(__clang__)
#define MOE_CACHE_CLONES
#elif __GNUC__ >= 12
#define MOE_CACHE_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define MOE_CACHE_CLONES __attribute__((target_clones("default", "avx2")))
#endif
