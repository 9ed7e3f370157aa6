// Streams of simulated GPUs: queues whose operations happen late, in any order that streams and events allow.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_memory.h"

namespace simulated {

// What the CUDA runtime would answer: raised as torch.AcceleratorError.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Graph;

struct Stream {
  int device = 0;
  int64_t id = 0;  // of torch, over all devices; 0 is a device's default stream
  std::atomic<uint64_t> enqueued{0}, completed{0};
  Graph* capture = nullptr;
};

// One recording of an event, or the end of what a stream was given so far. Without a stream: over.
struct Mark {
  Stream* stream = nullptr;
  uint64_t position = 0;
  bool is_over() const { return !stream || stream->completed.load() >= position; }
};

struct Event {
  Mark mark;
  bool timed = false, recorded = false;
  std::shared_ptr<double> time;  // microseconds on the simulated clock; the recording's own
  std::shared_ptr<Graph> capture;  // it was recorded in one
};

// An operation: what happens when its turn comes, and what it takes on the simulated clock.
struct Operation {
  std::function<void()> run;
  Mark after;
  double microseconds = 0;
  std::shared_ptr<double> stamp;
  bool sleeps = false;
};

struct Graph : std::enable_shared_from_this<Graph> {
  std::vector<Operation> operations;
  std::vector<Stream*> streams;  // those in the capture; the first began it
  int device = 0;
  uint64_t pool = 0;
  std::string mode, failure;
  uint64_t thread = 0;
  bool ended = false;
};

struct Settings {
  int num_devices = 2;
  size_t total_bytes = size_t(8) << 30, context_bytes = size_t(300) << 20;
  uint64_t seed = 0;
  bool late = true;  // false: everything happens when it is enqueued
};

void configure(const Settings& settings);
const Settings& settings();
DeviceMemory& memory(int device);

// -- this thread's --
int current_device();
void set_device(int device);
Stream& current_stream(int device);
void set_current_stream(Stream& stream);

Stream& stream(int device, int64_t id);
Stream& new_stream(int device);

// Behind everything `stream` was given; recorded where it is captured.
void enqueue(Stream& stream, std::function<void()> run, double microseconds = 1);
// A refused call of the runtime stays this thread's last error; the next launch of a kernel finds it.
void leave_error(const std::string& error);
void raise_left_error();
// A kernel that takes until somebody waits for it.
void sleep(Stream& stream, double microseconds);
void record(Event& event, Stream& stream);
void wait(Stream& stream, const Event& event);
// Both let the device get on, or not.
bool query(const Event& event);
bool query(Stream& stream);

void synchronize(const Event& event);
void synchronize(Stream& stream);
void synchronize_device(int device);
// As torch's own operations wait for a stream: with its warning, if that is asked for.
void synchronize_operation(Stream& stream);
void set_sync_debug_mode(int mode);
int sync_debug_mode();
void set_warning(std::function<void(const char*)> warn);
double elapsed_ms(const Event& begin, const Event& end);

// -- graphs --
std::shared_ptr<Graph> capture_begin(uint64_t pool, const std::string& mode);
void capture_end(Graph& graph);
void replay(Graph& graph);
void destroy(Graph& graph);
bool is_capturing(Stream& stream);
// What may not happen on a thread that captures, such as locking pages; ends the capture.
void forbid_in_capture(const char* what);
uint64_t pool_of_allocation(Stream& stream);

// The first failure of an operation is every later call's too, as on a device; this forgets it.
void check_failure();
void forget_failure();
uint64_t pending_operations();

}  // namespace simulated
