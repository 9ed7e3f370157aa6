// What Python calls by ctypes. A function that can fail answers -1 and leaves its message for `simulated_error`.
#include <c10/util/Exception.h>

#include "backend.h"

using namespace simulated;

namespace {

thread_local std::string error_text;
thread_local int error_kind;  // 0 a CUDA error, 1 another

template <typename Call>
int64_t answer(Call call) {
  try {
    return call();
  } catch (const CudaError& error) {
    error_kind = 0;
    error_text = error.what();
  } catch (const std::exception& error) {
    error_kind = 1;
    error_text = error.what();
  }
  return -1;
}

using Callback = int (*)(uint64_t);
Callback run_python = nullptr;

}  // namespace

extern "C" {

const char* simulated_error() { return error_text.c_str(); }
int simulated_error_kind() { return error_kind; }

void simulated_configure(int num_devices, uint64_t total_bytes, uint64_t context_bytes, uint64_t seed, int late,
                         Callback callback) {
  run_python = callback;
  install_hooks();
  configure({num_devices, total_bytes, context_bytes, seed, late != 0});
  set_warning([](const char* text) { TORCH_WARN(text); });
}

int64_t simulated_device_count() { return settings().num_devices; }
int64_t simulated_current_device() { return current_device(); }
int64_t simulated_set_device(int device) {
  return answer([&] { set_device(device); return 0; });
}
int64_t simulated_synchronize(int device) {
  return answer([&] { synchronize_device(device); return 0; });
}
int64_t simulated_current_stream(int device) {
  return answer([&] { return current_stream(device).id; });
}
int64_t simulated_set_stream(int device, int64_t id) {
  return answer([&] { set_current_stream(stream(device, id)); return 0; });
}
int64_t simulated_new_stream(int device) {
  return answer([&] { return new_stream(device).id; });
}
int64_t simulated_query_stream(int device, int64_t id) {
  return answer([&] { return query(stream(device, id)); });
}
int64_t simulated_synchronize_stream(int device, int64_t id) {
  return answer([&] { synchronize(stream(device, id)); return 0; });
}
int64_t simulated_is_capturing(int device) {
  return answer([&] { return is_capturing(current_stream(device)); });
}

void* simulated_new_event(int timed) {
  auto* event = new Event;
  event->timed = timed;
  return event;
}
void simulated_destroy_event(void* event) { delete static_cast<Event*>(event); }
int64_t simulated_record(void* event, int device, int64_t id) {
  return answer([&] { record(*static_cast<Event*>(event), stream(device, id)); return 0; });
}
int64_t simulated_wait(void* event, int device, int64_t id) {
  return answer([&] { wait(stream(device, id), *static_cast<Event*>(event)); return 0; });
}
int64_t simulated_query_event(void* event) {
  return answer([&] { return query(*static_cast<Event*>(event)); });
}
int64_t simulated_synchronize_event(void* event) {
  return answer([&] { synchronize(*static_cast<Event*>(event)); return 0; });
}
int64_t simulated_elapsed_ns(void* begin, void* end) {
  return answer([&] { return int64_t(elapsed_ms(*static_cast<Event*>(begin), *static_cast<Event*>(end)) * 1e6); });
}

// A kernel in Python, by a number that the callback knows.
int64_t simulated_launch(int device, uint64_t number, double microseconds) {
  return answer([&] {
    raise_left_error();
    enqueue(current_stream(device), [number] {
      if (run_python && run_python(number)) throw std::runtime_error("a kernel in Python has failed");
    }, microseconds);
    return 0;
  });
}
int64_t simulated_sleep(int device, double microseconds) {
  return answer([&] { sleep(current_stream(device), microseconds); return 0; });
}

void* simulated_capture_begin(uint64_t pool, const char* mode) {
  void* made = nullptr;
  answer([&] { made = new std::shared_ptr<Graph>(capture_begin(pool, mode)); return 0; });
  return made;
}
int64_t simulated_capture_end(void* graph) {
  return answer([&] { capture_end(**static_cast<std::shared_ptr<Graph>*>(graph)); return 0; });
}
int64_t simulated_replay(void* graph) {
  return answer([&] { replay(**static_cast<std::shared_ptr<Graph>*>(graph)); return 0; });
}
int64_t simulated_graph_length(void* graph) {
  return (*static_cast<std::shared_ptr<Graph>*>(graph))->operations.size();
}
int64_t simulated_destroy_graph(void* graph) {
  auto* held = static_cast<std::shared_ptr<Graph>*>(graph);
  return answer([&] { destroy(**held); delete held; return 0; });
}

void simulated_memory(int device, int64_t* five) {
  MemoryStats stats = memory(device).stats();
  five[0] = stats.allocated, five[1] = stats.peak_allocated, five[2] = stats.reserved, five[3] = stats.peak_reserved;
  five[4] = stats.num_allocations;
}
void simulated_reset_peaks(int device) { memory(device).reset_peaks(); }
int64_t simulated_free_bytes(int device) { return memory(device).free_bytes(); }
int64_t simulated_total_bytes(int device) { return memory(device).total_bytes(); }
void simulated_limit(int device, double fraction) { memory(device).limit(fraction); }
double simulated_fraction(int device) { return memory(device).fraction(); }
int64_t simulated_empty_cache() {
  return answer([&] {
    for (int device = 0; device < settings().num_devices; ++device) {
      synchronize_device(device);
      memory(device).empty_cache();
    }
    return 0;
  });
}

int64_t simulated_pin(void* address, uint64_t bytes) {
  return answer([&] {
    forbid_in_capture("operation not permitted when stream is capturing");
    if (pin(address, bytes)) return 0;
    bool again = is_pinned(address);
    leave_error(again ? "part or all of the requested memory range is already mapped" : "out of memory");
    return again ? 712 : 2;
  });
}
int64_t simulated_unpin(void* address) {
  return answer([&] {
    for (int device = 0; device < settings().num_devices; ++device) synchronize_device(device);
    return unpin(address) ? 0 : 713;
  });
}
void simulated_limit_pinned(uint64_t bytes) { limit_pinned_bytes(bytes); }

void simulated_seed(int device, uint64_t seed) { cpu_generator(std::nullopt, device).set_current_seed(seed); }

void simulated_set_sync_debug_mode(int mode) { set_sync_debug_mode(mode); }
int simulated_sync_debug_mode() { return sync_debug_mode(); }
void simulated_forget_failure() { forget_failure(); }
uint64_t simulated_pending() { return pending_operations(); }

}  // extern "C"
