// A decode step through the experts of a layer in one call: the first products of all experts, their activations, the
// last products, and the weighted sum.
//
// All of it is small pieces in four rounds, that threads take as they come for them. A thread that finds none left in a
// round goes on to the next, where a piece waits for those that it needs: all of them are done, or some thread is at
// work on them. So threads meet only in front of what they need, and one that loses its core holds back a piece and
// what follows from it.
//
// An expert's row of the output depends on that expert and x alone: not on which experts are in the same call.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "activation.h"
#include "expert_mlp.h"
#include "export.h"
#include "packed.h"
#include "pool.h"
#include "scalar.h"
#include "scratch.h"

// An expert to compute, and the row of the output that it fills.
struct Task {
    const ExpertMlp* expert;
    int64_t row;
};

struct WeightedSum {
    const int64_t* rows;
    const float* weights;
    int64_t num_terms;
    void* result;
    int32_t dtype;
};

namespace {

// Weights in a piece of work: the larger, the seldomer a thread jumps to other rows, where memory has to be asked anew;
// as small as leaves every thread some pieces.
constexpr int64_t kMostPieceWeights = 1 << 19, kLeastPieceWeights = 1 << 17;
constexpr int64_t kPiecesPerThread = 16;
// To wake another thread takes longer than to compute with fewer weights than this.
constexpr int64_t kWeightsPerThread = 1 << 20;
constexpr int64_t kSumCols = 2048;
constexpr int64_t kAlign = 64;

int64_t align_up(int64_t num_bytes) { return ceil_div(num_bytes, kAlign) * kAlign; }

thread_local Scratch scratch;

// Whether both take their inputs prepared in the same way.
bool same_input(const PackedWeight& a, const PackedWeight& b) {
    return a.code == b.code && a.scale_type == b.scale_type && a.cols == b.cols && a.block_rows == b.block_rows &&
           a.block_cols == b.block_cols;
}

template <class Ready>
void wait_until(Ready ready) {
    for (int i = 0; !ready(); i++) {
        if (i < 256) {
            for (int j = 0; j < 16; j++) std::atomic_signal_fence(std::memory_order_seq_cst);
        } else {
            std::this_thread::yield();
        }
    }
}

// The pieces of a round. Each thread has a stretch of its own, since reading ahead at the end of a piece would else fetch
// what another thread is about to; when it is through, it goes on with what is left of the others'.
class Round {
   public:
    void begin(int64_t count, int num_stretches) {
        num_stretches_ = num_stretches < kMaxStretches ? num_stretches : kMaxStretches;
        for (int s = 0; s < num_stretches_; s++) {
            stretches_[s].next.store(count * s / num_stretches_, std::memory_order_relaxed);
            stretches_[s].end = count * (s + 1) / num_stretches_;
        }
    }

    // A piece for this thread, or -1 if none is left.
    int64_t take(int64_t thread) {
        for (int i = 0; i < num_stretches_; i++) {
            Stretch& stretch = stretches_[(thread + i) % num_stretches_];
            if (stretch.next.load(std::memory_order_relaxed) >= stretch.end) continue;
            const int64_t piece = stretch.next.fetch_add(1, std::memory_order_relaxed);
            if (piece < stretch.end) return piece;
        }
        return -1;
    }

   private:
    static constexpr int kMaxStretches = 64;
    struct alignas(64) Stretch {
        std::atomic<int64_t> next;
        int64_t end;
    };
    Stretch stretches_[kMaxStretches];
    int num_stretches_ = 0;
};

struct Progress {
    std::atomic<int64_t> up_done{0};
    std::atomic<bool> is_prepared{false};
};

class Layer {
   public:
    Layer(const KernelSet& kernels, const Activation& activation, const Matrix& x, const Task* tasks, int64_t num_tasks,
          float* outputs, int64_t num_cols, const WeightedSum& sum)
        : kernels_(kernels), activation_(activation), x_(x), tasks_(tasks), num_tasks_(num_tasks), outputs_(outputs),
          hidden_(num_cols), sum_(sum), progress_(new Progress[static_cast<size_t>(num_tasks)]) {
        if (num_tasks > 0) {
            const ExpertMlp& first = *tasks[0].expert;
            gated_ = activation.gating != GATING_NONE;
            inner_ = first.down.cols;
            total_weights_ = num_tasks * inner_ * ((gated_ ? 2 : 1) * first.up[0].cols + hidden_);
        }
    }

    // False if memory is refused.
    bool run(int num_threads) {
        if (!prepare_inputs()) return false;
        const int64_t useful_threads = 1 + total_weights_ / kWeightsPerThread;
        if (num_threads > useful_threads) num_threads = static_cast<int>(useful_threads);
        cut(num_threads);
        up_.begin(num_tasks_ * up_pieces_, num_threads);
        prepare_.begin(num_tasks_, 1);
        down_.begin(num_tasks_ * down_pieces_, num_threads);
        sum_pieces_.begin(sum_.num_terms == 0 ? 0 : ceil_div(hidden_, kSumCols), 1);
        auto body = [this](int64_t begin, int64_t end) {
            for (int64_t thread = begin; thread < end; thread++) work(thread);
        };
        parallel_for(num_threads, 1, num_threads, body);
        return true;
    }

   private:
    void cut(int num_threads) {
        if (num_tasks_ > 0) {
            const int64_t share = total_weights_ / (kPiecesPerThread * (num_threads > 0 ? num_threads : 1));
            const int64_t weights = std::clamp(share, kLeastPieceWeights, kMostPieceWeights);
            up_rows_ = piece_rows(weights, tasks_[0].expert->up[0].cols * (gated_ ? 2 : 1));
            down_rows_ = piece_rows(weights, inner_);
        }
        up_pieces_ = ceil_div(inner_, up_rows_);
        down_pieces_ = ceil_div(hidden_, down_rows_);
    }

    static int64_t piece_rows(int64_t weights, int64_t cols) {
        const int64_t rows = weights / (cols > 0 ? cols : 1) / 16 * 16;
        return rows > 16 ? rows : 16;
    }

    bool prepare_inputs() {
        // distinct ways to prepare x; experts of one layer mostly share one
        std::vector<const PackedWeight*> ways;
        std::vector<int64_t> offsets;
        int64_t size = 0;
        input_of_.resize(static_cast<size_t>(num_tasks_ * kMaxPieces));
        for (int64_t e = 0; e < num_tasks_; e++) {
            const ExpertMlp& expert = *tasks_[e].expert;
            for (int p = 0; p < expert.num_up; p++) {
                size_t way = 0;
                while (way < ways.size() && !same_input(*ways[way], expert.up[p])) way++;
                if (way == ways.size()) {
                    ways.push_back(&expert.up[p]);
                    offsets.push_back(size);
                    size += align_up(kernels_.prepared_bytes(expert.up[p], x_.dtype));
                }
                input_of_[static_cast<size_t>(e * kMaxPieces + p)] = offsets[way];
            }
        }
        activated_offset_ = align_up(inner_ * 4 * (gated_ ? 2 : 1));
        prepared_offset_ = activated_offset_ + align_up(inner_ * 4);
        int64_t down_bytes = 0;
        for (int64_t e = 0; e < num_tasks_; e++) {
            const int64_t bytes = align_up(kernels_.prepared_bytes(tasks_[e].expert->down, x_.dtype));
            down_bytes = bytes > down_bytes ? bytes : down_bytes;
        }
        expert_bytes_ = prepared_offset_ + down_bytes;
        experts_offset_ = size;
        memory_ = scratch.reserve(size + num_tasks_ * expert_bytes_);
        if (memory_ == nullptr) return false;
        for (size_t way = 0; way < ways.size(); way++) {
            kernels_.prepare(*ways[way], x_, 0, memory_ + offsets[way]);
        }
        return true;
    }

    void work(int64_t thread) {
        int64_t piece;
        while ((piece = up_.take(thread)) >= 0) multiply_up(piece / up_pieces_, piece % up_pieces_ * up_rows_);
        while ((piece = prepare_.take(thread)) >= 0) prepare_down(piece);
        while ((piece = down_.take(thread)) >= 0) {
            multiply_down(piece / down_pieces_, piece % down_pieces_ * down_rows_);
        }
        while ((piece = sum_pieces_.take(thread)) >= 0) add_up(piece * kSumCols);
    }

    PreparedInput prepared(const uint8_t* data, const PackedWeight& weight) const {
        return {data, kernels_.prepared_bytes(weight, x_.dtype), 1, x_.dtype};
    }

    // Of each expert: what the first product gives, in fp32; the activated row, in x's dtype, as if a product of its own
    // had been asked for; that row prepared for the last product.
    uint8_t* memory_of(int64_t e) { return memory_ + experts_offset_ + e * expert_bytes_; }
    float* first_of(int64_t e) { return reinterpret_cast<float*>(memory_of(e)); }
    uint8_t* activated_of(int64_t e) { return memory_of(e) + activated_offset_; }
    uint8_t* prepared_of(int64_t e) { return memory_of(e) + prepared_offset_; }

    // Rows [begin, end) of the stacked first weights.
    void multiply_up_rows(int64_t e, int64_t begin, int64_t end) {
        const ExpertMlp& expert = *tasks_[e].expert;
        int64_t first_row = 0;
        for (int p = 0; p < expert.num_up; p++) {
            const PackedWeight& weight = expert.up[p];
            const int64_t from = begin > first_row ? begin - first_row : 0;
            const int64_t to = end - first_row < weight.rows ? end - first_row : weight.rows;
            if (from < to) {
                const uint8_t* input = memory_ + input_of_[static_cast<size_t>(e * kMaxPieces + p)];
                kernels_.linear_rows(weight, prepared(input, weight), from, to,
                                     {first_of(e) + first_row, 0, DTYPE_F32});
            }
            first_row += weight.rows;
        }
        if (expert.up_bias == nullptr) return;
        for (int64_t row = begin; row < end; row++) {
            first_of(e)[row] += load_as_float(expert.up_bias, expert.bias_dtype, row);
        }
    }

    void multiply_up(int64_t e, int64_t begin) {
        const int64_t end = begin + up_rows_ < inner_ ? begin + up_rows_ : inner_;
        const float* gate = first_of(e) + begin;
        const float* up = nullptr;
        if (activation_.gating == GATING_INTERLEAVED) {
            multiply_up_rows(e, 2 * begin, 2 * end);
            gate = first_of(e) + 2 * begin;
            up = gate + 1;
        } else {
            multiply_up_rows(e, begin, end);
            if (gated_) {
                multiply_up_rows(e, inner_ + begin, inner_ + end);
                up = gate + inner_;
            }
        }
        kernels_.activate(activation_, gate, end - begin, up, {activated_of(e), 0, x_.dtype}, begin);
        progress_[static_cast<size_t>(e)].up_done.fetch_add(1, std::memory_order_release);
    }

    void prepare_down(int64_t e) {
        Progress& progress = progress_[static_cast<size_t>(e)];
        wait_until([&] { return progress.up_done.load(std::memory_order_acquire) == up_pieces_; });
        kernels_.prepare(tasks_[e].expert->down, {activated_of(e), inner_, x_.dtype}, 0, prepared_of(e));
        progress.is_prepared.store(true, std::memory_order_release);
    }

    void multiply_down(int64_t e, int64_t begin) {
        Progress& progress = progress_[static_cast<size_t>(e)];
        wait_until([&] { return progress.is_prepared.load(std::memory_order_acquire); });
        const ExpertMlp& expert = *tasks_[e].expert;
        const int64_t end = begin + down_rows_ < hidden_ ? begin + down_rows_ : hidden_;
        float* out = outputs_ + tasks_[e].row * hidden_;
        kernels_.linear_rows(expert.down, prepared(prepared_of(e), expert.down), begin, end, {out, 0, DTYPE_F32});
        if (expert.down_bias != nullptr) {
            for (int64_t row = begin; row < end; row++) {
                out[row] += load_as_float(expert.down_bias, expert.bias_dtype, row);
            }
        }
        down_done_.fetch_add(1, std::memory_order_release);
    }

    void add_up(int64_t begin) {
        const int64_t all = num_tasks_ * down_pieces_;
        wait_until([&] { return down_done_.load(std::memory_order_acquire) == all; });
        const int64_t end = begin + kSumCols < hidden_ ? begin + kSumCols : hidden_;
        float total[kSumCols] = {};
        for (int64_t i = 0; i < sum_.num_terms; i++) {
            const float* row = outputs_ + sum_.rows[i] * hidden_;
            const float weight = sum_.weights[i];
            for (int64_t col = begin; col < end; col++) total[col - begin] += weight * row[col];
        }
        for (int64_t col = begin; col < end; col++) {
            store_from_float(sum_.result, sum_.dtype, col, total[col - begin]);
        }
    }

    const KernelSet& kernels_;
    const Activation& activation_;
    const Matrix& x_;
    const Task* tasks_;
    const int64_t num_tasks_;
    float* const outputs_;
    const int64_t hidden_;
    const WeightedSum& sum_;
    bool gated_ = false;
    int64_t inner_ = 0, up_rows_ = 1, down_rows_ = 1, total_weights_ = 0;
    int64_t up_pieces_ = 0, down_pieces_ = 0;  // of one expert
    Round up_, prepare_, down_, sum_pieces_;
    uint8_t* memory_ = nullptr;
    std::vector<int64_t> input_of_;
    int64_t experts_offset_ = 0, expert_bytes_ = 0, activated_offset_ = 0, prepared_offset_ = 0;
    std::unique_ptr<Progress[]> progress_;
    std::atomic<int64_t> down_done_{0};
};

}  // namespace

// outputs [.., num_cols] in fp32: the tasks' rows are filled from x [num_cols]; then, if there are terms, `result` is the
// sum over i of weights[i] * outputs[rows[i]], in that order, among them rows of earlier calls. Experts of one call have
// the same shapes; x and result have the same dtype. -1 if memory is refused.
EXPORT int moe_offload_moe_layer(int isa, const Activation* activation, const void* x, int32_t dtype, const Task* tasks,
                                 int64_t num_tasks, float* outputs, int64_t num_cols, const int64_t* rows,
                                 const float* weights, int64_t num_terms, void* result, int num_threads) {
    const Matrix input{const_cast<void*>(x), num_cols, dtype};
    const WeightedSum sum{rows, weights, num_terms, result, dtype};
    Layer layer(kernel_set_of(isa), *activation, input, tasks, num_tasks, outputs, num_cols, sum);
    return layer.run(num_threads) ? 0 : -1;
}
