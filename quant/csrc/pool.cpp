// A small persistent thread pool.
//
// Not OpenMP: torch brings a runtime of its own (libgomp in wheels, libiomp or libomp elsewhere). Linking another one
// gives two sets of threads that both spin after each region, and a static split that waits for whichever thread lost
// its core. Here idle workers sleep after a few microseconds, and work is handed out in small pieces.
//
// Each thread begins with a stretch of its own, so that what is asked for ahead of its use is used by the same thread;
// one that is through takes half of what is left of the longest stretch.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

using Task = void (*)(void*, int64_t, int64_t);

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ __volatile__("yield");
#endif
}

// Long enough to catch the next of a few products in a row, short enough not to take a core from torch's threads.
constexpr auto kSpin = std::chrono::microseconds(30);

template <class Ready>
bool spin_until(Ready ready) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return ready();
}

class Pool {
   public:
    void run(int64_t count, int64_t grain, int num_threads, Task task, void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            task(context, 0, count);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const int64_t pieces = (count + grain - 1) / grain;
            num_stretches_ = static_cast<int>(std::min<int64_t>({pieces, num_threads, kMaxThreads}));
            for (int i = 0; i < num_stretches_; i++) {
                const int64_t begin = pieces * i / num_stretches_;
                stretches_[i].span.store(span_of(begin, pieces * (i + 1) / num_stretches_), std::memory_order_relaxed);
            }
            helpers_wanted_ = num_stretches_ - 1;
            add_workers(helpers_wanted_);
            task_ = task;
            context_ = context;
            count_ = count;
            grain_ = grain;
            call_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
        work(0);
        {
            // from here on no worker joins, so that none touches the next call's task with this one's count
            std::lock_guard<std::mutex> lock(mutex_);
            helpers_wanted_ = 0;
        }
        const auto all_out = [this] { return inside_.load(std::memory_order_acquire) == 0; };
        if (spin_until(all_out)) return;
        // a worker that lost its core gets it back sooner if this one is free
        std::unique_lock<std::mutex> lock(mutex_);
        is_waiting_ = true;
        out_.wait(lock, all_out);
        is_waiting_ = false;
    }

   private:
    static constexpr int kMaxThreads = 256;

    // Pieces [begin, end) that nobody has taken yet: begin in the high half.
    struct alignas(64) Stretch {
        std::atomic<uint64_t> span{0};
    };

    static uint64_t span_of(int64_t begin, int64_t end) {
        return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
    }
    static int64_t begin_of(uint64_t span) { return static_cast<int64_t>(span >> 32); }
    static int64_t end_of(uint64_t span) { return static_cast<int64_t>(span & 0xFFFFFFFF); }

    void work(int own) {
        std::atomic<uint64_t>& mine = stretches_[own].span;
        for (;;) {
            uint64_t span = mine.load(std::memory_order_relaxed);
            while (begin_of(span) < end_of(span)) {
                if (!mine.compare_exchange_weak(span, span + (uint64_t{1} << 32), std::memory_order_relaxed)) continue;
                const int64_t begin = begin_of(span) * grain_;
                task_(context_, begin, begin + grain_ < count_ ? begin + grain_ : count_);
                span = mine.load(std::memory_order_relaxed);
            }
            if (!take_half(mine)) return;
        }
    }

    // Moves half of the longest stretch, or its only piece, to `mine`; false if nothing is left.
    bool take_half(std::atomic<uint64_t>& mine) {
        for (;;) {
            std::atomic<uint64_t>* longest = nullptr;
            uint64_t span = 0;
            for (int i = 0; i < num_stretches_; i++) {
                const uint64_t other = stretches_[i].span.load(std::memory_order_relaxed);
                if (end_of(other) - begin_of(other) > end_of(span) - begin_of(span)) {
                    longest = &stretches_[i].span;
                    span = other;
                }
            }
            if (longest == nullptr) return false;
            const int64_t middle = begin_of(span) + (end_of(span) - begin_of(span)) / 2;
            if (longest->compare_exchange_strong(span, span_of(begin_of(span), middle), std::memory_order_relaxed)) {
                mine.store(span_of(middle, end_of(span)), std::memory_order_relaxed);
                return true;
            }
        }
    }

    void add_workers(int wanted) {
        for (; num_workers_ < wanted; num_workers_++) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::exception&) {
                return;  // no more threads to be had: fewer do the work
            }
        }
    }

    void serve() {
        uint64_t seen = 0;
        int own = 0;
        const auto called = [&] { return call_.load(std::memory_order_acquire) != seen; };
        for (;;) {
            if (!spin_until(called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, called);
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
            }
            {
                std::lock_guard<std::mutex> lock(mutex_);
                seen = call_.load(std::memory_order_relaxed);
                if (helpers_wanted_ <= 0) continue;
                own = helpers_wanted_--;
                inside_.fetch_add(1, std::memory_order_relaxed);
            }
            work(own);
            if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                if (is_waiting_) out_.notify_one();
            }
        }
    }

    std::mutex turn_;   // held for a whole call
    std::mutex mutex_;  // guards the fields below while they change
    std::condition_variable wake_;
    std::condition_variable out_;  // when the last worker is through, for a caller that has waited long
    bool is_waiting_ = false;
    std::atomic<uint64_t> call_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<int> inside_{0};
    Stretch stretches_[kMaxThreads];
    int num_stretches_ = 0;
    int num_workers_ = 0;
    int helpers_wanted_ = 0;
    Task task_ = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0;
    int64_t grain_ = 1;
};

// Never destroyed: workers may still look at it while the process exits.
std::atomic<Pool*> pool{nullptr};

// A forked child has none of the workers, and locks may be held by threads it does not have: it starts afresh.
void forget_pool() { pool.store(new Pool); }

Pool& the_pool() {
    static const bool created = [] {
        forget_pool();
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, forget_pool);
#endif
        return true;
    }();
    (void)created;
    return *pool.load(std::memory_order_acquire);
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int num_threads, Task task, void* context) {
    if (count <= 0) return;
    if (num_threads <= 1 || count <= grain) {
        task(context, 0, count);
        return;
    }
    the_pool().run(count, grain, num_threads, task, context);
}
