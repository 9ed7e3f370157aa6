// The memory of one simulated GPU, given out as torch's CUDA caching allocator does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace simulated {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct MemoryStats {
  int64_t allocated, peak_allocated, reserved, peak_reserved, num_allocations;
};

// Addresses of device memory cannot be read or written: what the simulator computes with lies elsewhere (`host_view`),
// so code that takes a device's address for the host's ends in a segmentation fault, as on a real machine.
class DeviceMemory {
 public:
  // `is_over`: whether a stream has come past a number of its operations.
  DeviceMemory(size_t total_bytes, size_t context_bytes, std::function<bool(int64_t, uint64_t)> is_over);

  // `pool`: 0, or the private pool of a graph that is being captured.
  void* allocate(size_t bytes, int64_t stream, uint64_t pool);
  void free(void* address);
  // The block may be given to others only when what `stream` does until its free is over.
  void record_stream(void* address, int64_t stream, std::function<uint64_t()> position);
  void empty_cache();
  // Private pools live as long as graphs hold them.
  void retain_pool(uint64_t pool);
  void release_pool(uint64_t pool);
  void limit(double fraction);
  double fraction() const { return fraction_; }

  MemoryStats stats();
  void reset_peaks();
  size_t total_bytes() const { return total_bytes_; }
  size_t free_bytes();

  bool owns(const void* address) const;
  void* host_view(const void* address) const;

 private:
  struct Block {
    char* address;
    size_t bytes;
    int64_t stream;
    uint64_t pool;
    bool small, used = false;
    Block *previous = nullptr, *next = nullptr;
    std::map<int64_t, std::function<uint64_t()>> users;
  };
  struct Order {
    bool operator()(const Block* a, const Block* b) const {
      if (a->stream != b->stream) return a->stream < b->stream;
      if (a->bytes != b->bytes) return a->bytes < b->bytes;
      return a->address < b->address;
    }
  };
  using Pool = std::set<Block*, Order>;
  struct Pending {
    Block* block;
    std::vector<std::pair<int64_t, uint64_t>> marks;
  };

  Block* take_free(size_t bytes, int64_t stream, uint64_t pool, bool small);
  Block* new_segment(size_t bytes, int64_t stream, uint64_t pool, bool small);
  void give_back(Block* block);
  void process_pending();
  void release_segments();
  Pool& pool_of(uint64_t pool, bool small) { return free_[{pool, small}]; }

  std::mutex mutex_;
  size_t total_bytes_, context_bytes_, arena_bytes_;
  double fraction_ = 1.0;
  char *device_, *host_;
  std::function<bool(int64_t, uint64_t)> is_over_;
  std::map<std::pair<uint64_t, bool>, Pool> free_;
  std::unordered_map<void*, Block*> used_;
  std::map<char*, size_t> segments_;
  std::map<uint64_t, int> pool_users_;
  std::vector<Pending> pending_;
  MemoryStats stats_{};
};

}  // namespace simulated
