#include "streams.h"

#include <Python.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <random>
#include <thread>

namespace simulated {

namespace {

constexpr int kStreamsInPool = 32;      // torch hands out so many a device, by turns
constexpr uint64_t kMostPending = 2048; // a launch waits where more are enqueued

struct Queue {
  std::deque<Operation> operations;
  double time = 0;
};

struct Engine {
  Settings settings;
  std::recursive_mutex mutex;
  std::mt19937_64 random;
  std::map<std::pair<int, int64_t>, std::unique_ptr<Stream>> streams;
  std::map<int64_t, Stream*> by_id;
  std::map<Stream*, Queue> queues;
  std::vector<std::unique_ptr<DeviceMemory>> memories;
  std::vector<int> next_in_pool;
  uint64_t pending = 0;
  std::string failure;
  std::vector<Graph*> captures;
  int sync_debug_mode = 0;
  std::function<void(const char*)> warn;
};

Engine& engine() {
  static auto* instance = new Engine;  // threads may outlive main
  return *instance;
}

thread_local int thread_device = 0;
thread_local std::string thread_error;
thread_local std::vector<Stream*> thread_streams;

uint64_t this_thread() { return std::hash<std::thread::id>()(std::this_thread::get_id()); }

// Operations may run Python, so who waits for the engine does it without the interpreter's lock. Nobody then holds the
// interpreter while waiting for the engine, and its holder may wait for the interpreter.
class Locked {
 public:
  Locked() {
    if (engine().mutex.try_lock()) return;
    PyThreadState* state = Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    engine().mutex.lock();
    if (state) PyEval_RestoreThread(state);
  }
  ~Locked() { engine().mutex.unlock(); }
};

bool is_ready(Queue& queue) { return !queue.operations.empty() && queue.operations.front().after.is_over(); }

// A kernel that sleeps is over when somebody waits for it.
bool is_asleep(Queue& queue) { return queue.operations.front().sleeps; }

void run_first(Stream* stream) {
  Queue& queue = engine().queues[stream];
  Operation operation = std::move(queue.operations.front());
  queue.operations.pop_front();
  engine().pending -= 1;
  queue.time += operation.microseconds;
  if (operation.stamp) *operation.stamp = queue.time;
  if (operation.run && engine().failure.empty()) {
    try {
      operation.run();
    } catch (const std::exception& error) {
      engine().failure = error.what();
    }
  }
  stream->completed += 1;
}

// One operation of some stream that is not waiting; false if there is none.
bool step() {
  std::vector<Stream*> ready;
  for (auto& [stream, queue] : engine().queues)
    if (is_ready(queue) && !is_asleep(queue)) ready.push_back(stream);
  if (ready.empty()) return false;
  run_first(ready[engine().random() % ready.size()]);
  return true;
}

// As little as `mark` needs, and now and then something else: what nobody waits for happens late.
bool step_towards(Mark mark) {
  if (engine().random() % 4 == 0 && step()) return true;
  for (int depth = 0; depth < 64 && !mark.is_over(); ++depth) {
    Queue& queue = engine().queues[mark.stream];
    if (queue.operations.empty()) return false;
    if (is_ready(queue)) {
      run_first(mark.stream);
      return true;
    }
    mark = queue.operations.front().after;
  }
  return step();
}

void run_until(Mark mark) {
  while (!mark.is_over()) {
    Locked locked;
    if (mark.is_over()) break;
    if (!step_towards(mark)) throw CudaError("the simulated device waits for ever");
  }
}

void drift() {
  Locked locked;
  while (engine().random() % 2 && step()) {
  }
}

Mark end_of(Stream& stream) { return Mark{&stream, stream.enqueued.load()}; }

void push(Stream& stream, Operation operation) {
  Locked locked;
  engine().queues[&stream].operations.push_back(std::move(operation));
  engine().pending += 1;
  stream.enqueued += 1;
  if (!engine().settings.late) {
    run_until(end_of(stream));
  } else {
    while (engine().pending > kMostPending && step()) {
    }
  }
}

[[noreturn]] void raise_capture(Graph* graph, const std::string& why) {
  if (graph->failure.empty()) graph->failure = why;
  throw CudaError("CUDA error: " + why);
}

}  // namespace

void configure(const Settings& settings) {
  Engine& all = engine();
  all.settings = settings;
  all.random.seed(settings.seed);
  all.next_in_pool.assign(settings.num_devices, 0);
  for (int device = 0; device < settings.num_devices; ++device) {
    auto is_over = [](int64_t id, uint64_t position) {
      auto found = engine().by_id.find(id);
      return found == engine().by_id.end() || found->second->completed.load() >= position;
    };
    all.memories.push_back(std::make_unique<DeviceMemory>(settings.total_bytes, settings.context_bytes, is_over));
    for (int64_t id = 0; id <= kStreamsInPool; ++id) {
      auto made = std::make_unique<Stream>();
      made->device = device;
      made->id = id;
      all.by_id[device * 1000 + id] = made.get();
      all.queues[made.get()];
      all.streams[{device, id}] = std::move(made);
    }
  }
}

const Settings& settings() { return engine().settings; }

DeviceMemory& memory(int device) {
  if (device < 0 || device >= static_cast<int>(engine().memories.size()))
    throw CudaError("CUDA error: invalid device ordinal");
  return *engine().memories[device];
}

int current_device() { return thread_device; }

void set_device(int device) {
  memory(device);
  thread_device = device;
}

Stream& stream(int device, int64_t id) {
  auto found = engine().streams.find({device, id});
  if (found == engine().streams.end()) throw CudaError("CUDA error: invalid resource handle");
  return *found->second;
}

Stream& current_stream(int device) {
  memory(device);
  thread_streams.resize(engine().memories.size());
  Stream* set = thread_streams[device];
  return set ? *set : stream(device, 0);
}

void set_current_stream(Stream& stream) {
  thread_streams.resize(engine().memories.size());
  thread_streams[stream.device] = &stream;
}

Stream& new_stream(int device) {
  Locked locked;
  memory(device);
  int turn = engine().next_in_pool[device]++ % kStreamsInPool;
  return stream(device, turn + 1);
}

void check_failure() {
  Locked locked;
  if (!engine().failure.empty())
    throw CudaError("CUDA error: device-side assert triggered (" + engine().failure + ")");
}

void forget_failure() {
  Locked locked;
  engine().failure.clear();
}

uint64_t pending_operations() {
  Locked locked;
  return engine().pending;
}

void enqueue(Stream& stream, std::function<void()> run, double microseconds) {
  Locked locked;
  Operation operation{std::move(run), {}, microseconds, nullptr, false};
  if (stream.capture) {
    if (!stream.capture->failure.empty())
      throw CudaError("CUDA error: operation failed due to a previous error during capture");
    stream.capture->operations.push_back(std::move(operation));
    return;
  }
  check_failure();
  push(stream, std::move(operation));
}

void leave_error(const std::string& error) { thread_error = error; }

void raise_left_error() {
  if (thread_error.empty()) return;
  std::string error = std::move(thread_error);
  thread_error.clear();
  throw CudaError("CUDA error: " + error);
}

void sleep(Stream& stream, double microseconds) {
  Locked locked;
  if (stream.capture) return enqueue(stream, nullptr, microseconds);
  push(stream, Operation{nullptr, {}, microseconds, nullptr, true});
}

void record(Event& event, Stream& stream) {
  Locked locked;
  event.recorded = true;
  event.capture = stream.capture ? stream.capture->shared_from_this() : nullptr;
  if (stream.capture) {
    event.mark = {};
    return;
  }
  event.time = std::make_shared<double>(0);
  push(stream, Operation{nullptr, {}, 0, event.time, false});
  event.mark = end_of(stream);
}

void wait(Stream& stream, const Event& event) {
  Locked locked;
  if (event.capture && !event.capture->ended) {
    if (stream.capture == event.capture.get()) return;
    if (stream.capture) raise_capture(stream.capture, "dependency created on uncaptured work in another stream");
    stream.capture = event.capture.get();  // the stream joins the capture
    event.capture->streams.push_back(&stream);
    return;
  }
  if (stream.capture && event.recorded)
    raise_capture(stream.capture, "dependency created on uncaptured work in another stream");
  if (!event.mark.is_over()) push(stream, Operation{nullptr, event.mark, 0, nullptr, false});
}

bool query(const Event& event) {
  if (event.capture && !event.capture->ended)
    throw CudaError("CUDA error: operation not permitted on an event last recorded in a capturing stream");
  forbid_in_capture("operation not permitted when stream is capturing");
  drift();
  check_failure();
  return event.mark.is_over();
}

bool query(Stream& stream) {
  if (stream.capture) raise_capture(stream.capture, "operation not permitted when stream is capturing");
  drift();
  check_failure();
  return end_of(stream).is_over();
}

void synchronize(const Event& event) {
  if (event.capture && !event.capture->ended)
    throw CudaError("CUDA error: operation not permitted on an event last recorded in a capturing stream");
  forbid_in_capture("operation not permitted when stream is capturing");
  run_until(event.mark);
  check_failure();
}

void synchronize(Stream& stream) {
  if (stream.capture) raise_capture(stream.capture, "operation not permitted when stream is capturing");
  forbid_in_capture("operation not permitted when stream is capturing");
  run_until(end_of(stream));
  check_failure();
}

void synchronize_device(int device) {
  forbid_in_capture("operation not permitted when stream is capturing");
  for (int64_t id = 0; id <= kStreamsInPool; ++id) run_until(end_of(stream(device, id)));
  check_failure();
}

void synchronize_operation(Stream& stream) {
  int mode = engine().sync_debug_mode;
  if (mode == 1 && engine().warn) engine().warn("called a synchronizing CUDA operation");
  if (mode == 2) throw std::runtime_error("called a synchronizing CUDA operation");
  synchronize(stream);
}

void set_sync_debug_mode(int mode) { engine().sync_debug_mode = mode; }
int sync_debug_mode() { return engine().sync_debug_mode; }
void set_warning(std::function<void(const char*)> warn) { engine().warn = std::move(warn); }

double elapsed_ms(const Event& begin, const Event& end) {
  if (!begin.recorded || !end.recorded)
    throw std::invalid_argument("Both events must be recorded before calculating elapsed time.");
  if (!begin.timed || !end.timed)
    throw std::invalid_argument("Both events must be created with argument 'enable_timing=True'.");
  if (!begin.mark.is_over() || !end.mark.is_over()) throw CudaError("CUDA error: device not ready");
  return (*end.time - *begin.time) * 1e-3;
}

std::shared_ptr<Graph> capture_begin(uint64_t pool, const std::string& mode) {
  Locked locked;
  Stream& current = current_stream(thread_device);
  if (!current.id)
    throw std::runtime_error(
        "CUDA graphs must be captured on a non-default stream. (However, after capture, it's ok to replay them on the "
        "default stream.)");
  if (current.capture) throw CudaError("CUDA error: operation not permitted when stream is capturing");
  auto graph = std::make_shared<Graph>();
  graph->streams.push_back(&current);
  graph->device = thread_device;
  graph->pool = pool;
  graph->mode = mode;
  graph->thread = this_thread();
  current.capture = graph.get();
  engine().captures.push_back(graph.get());
  memory(graph->device).retain_pool(pool);
  return graph;
}

void capture_end(Graph& graph) {
  Locked locked;
  for (Stream* each : graph.streams) each->capture = nullptr;
  graph.ended = true;
  auto& all = engine().captures;
  all.erase(std::remove(all.begin(), all.end(), &graph), all.end());
  if (graph.thread != this_thread() && graph.mode != "relaxed")
    throw CudaError("CUDA error: attempt to terminate a thread-local capture sequence from another thread");
  if (!graph.failure.empty())
    throw CudaError("CUDA error: operation failed due to a previous error during capture (" + graph.failure + ")");
}

void replay(Graph& graph) {
  Locked locked;
  if (!graph.ended || !graph.failure.empty())
    throw std::runtime_error("Called CUDAGraph::replay without a preceding successful capture.");
  Stream& current = current_stream(graph.device);
  if (current.capture) raise_capture(current.capture, "operation not permitted when stream is capturing");
  for (Operation& operation : graph.operations) enqueue(current, operation.run, operation.microseconds);
}

void destroy(Graph& graph) {
  Locked locked;
  if (!graph.ended) {
    for (Stream* each : graph.streams) each->capture = nullptr;
    auto& all = engine().captures;
    all.erase(std::remove(all.begin(), all.end(), &graph), all.end());
    graph.ended = true;
  }
  graph.operations.clear();
  memory(graph.device).release_pool(graph.pool);
}

bool is_capturing(Stream& stream) { return stream.capture != nullptr; }

void forbid_in_capture(const char* what) {
  Locked locked;
  for (Graph* graph : engine().captures)
    if (graph->mode == "global" || (graph->mode == "thread_local" && graph->thread == this_thread()))
      raise_capture(graph, what);
}

uint64_t pool_of_allocation(Stream& stream) { return stream.capture ? stream.capture->pool : 0; }

}  // namespace simulated
