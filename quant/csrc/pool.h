#pragma once
#include <cstdint>

// Runs task(context, begin, end) over [0, count) in pieces of `grain`, on up to `num_threads` threads, the caller's
// included. Pieces are handed out as threads come for them, so a thread that loses its core delays one piece only.
// Safe from several threads at once: while one call has the workers, others run on their own thread.
void parallel_for(int64_t count, int64_t grain, int num_threads, void (*task)(void*, int64_t, int64_t), void* context);

template <class Body>
void parallel_for(int64_t count, int64_t grain, int num_threads, Body& body) {
    parallel_for(
        count, grain, num_threads,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}
