#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <sstream>

namespace simulated {

namespace {

// c10/cuda/CUDACachingAllocator.h
constexpr size_t kMinBlock = 512, kSmall = 1 << 20, kSmallSegment = 2 << 20, kLargeSegment = 20 << 20;
constexpr size_t kMinLarge = 10 << 20, kRoundLarge = 2 << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t segment_bytes(size_t bytes) {
  if (bytes <= kSmall) return kSmallSegment;
  return bytes < kMinLarge ? kLargeSegment : round_up(bytes, kRoundLarge);
}

std::string size_text(size_t bytes) {
  std::ostringstream text;
  text.precision(2);
  text << std::fixed << bytes / 1048576.0 << " MiB";
  return text.str();
}

char* reserve(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no address space for a simulated GPU");
  return static_cast<char*>(memory);
}

}  // namespace

DeviceMemory::DeviceMemory(size_t total, size_t context, std::function<bool(int64_t, uint64_t)> is_over)
    : total_bytes_(total), context_bytes_(context), arena_bytes_(2 * total), is_over_(std::move(is_over)) {
  device_ = reserve(arena_bytes_, PROT_NONE);
  host_ = reserve(arena_bytes_, PROT_READ | PROT_WRITE);
}

bool DeviceMemory::owns(const void* address) const {
  auto at = static_cast<const char*>(address);
  return at >= device_ && at < device_ + arena_bytes_;
}

void* DeviceMemory::host_view(const void* address) const {
  return host_ + (static_cast<const char*>(address) - device_);
}

void* DeviceMemory::allocate(size_t bytes, int64_t stream, uint64_t pool) {
  if (!bytes) return nullptr;
  std::lock_guard<std::mutex> guard(mutex_);
  process_pending();
  size_t asked = bytes;
  bytes = round_up(bytes, kMinBlock);
  bool small = bytes <= kSmall;
  Block* block = take_free(bytes, stream, pool, small);
  if (!block) block = new_segment(bytes, stream, pool, small);
  if (!block) {
    release_segments();
    block = new_segment(bytes, stream, pool, small);
  }
  if (!block) {
    std::ostringstream text;
    text << "CUDA out of memory. Tried to allocate " << size_text(asked) << ". GPU has a total capacity of "
         << size_text(total_bytes_) << " of which " << size_text(total_bytes_ - context_bytes_ - stats_.reserved)
         << " is free. Of the allocated memory " << size_text(stats_.allocated) << " is allocated by PyTorch, and "
         << size_text(stats_.reserved - stats_.allocated) << " is reserved by PyTorch but unallocated.";
    throw OutOfMemory(text.str());
  }
  size_t rest = block->bytes - bytes;
  if (small ? rest >= kMinBlock : rest > kSmall) {
    auto* remainder = new Block{block->address + bytes, rest, stream, pool, small};
    remainder->previous = block;
    remainder->next = block->next;
    if (block->next) block->next->previous = remainder;
    block->next = remainder;
    block->bytes = bytes;
    pool_of(pool, small).insert(remainder);
  }
  block->used = true;
  used_[block->address] = block;
  stats_.allocated += block->bytes;
  stats_.num_allocations += 1;
  stats_.peak_allocated = std::max(stats_.peak_allocated, stats_.allocated);
  return block->address;
}

DeviceMemory::Block* DeviceMemory::take_free(size_t bytes, int64_t stream, uint64_t pool, bool small) {
  Pool& blocks = pool_of(pool, small);
  Block key{nullptr, bytes, stream, pool, small};
  auto found = blocks.lower_bound(&key);
  if (found == blocks.end() || (*found)->stream != stream) return nullptr;
  Block* block = *found;
  blocks.erase(found);
  return block;
}

DeviceMemory::Block* DeviceMemory::new_segment(size_t bytes, int64_t stream, uint64_t pool, bool small) {
  size_t size = segment_bytes(bytes);
  if (stats_.reserved + size > fraction_ * total_bytes_) return nullptr;
  if (stats_.reserved + size + context_bytes_ > total_bytes_) return nullptr;
  char* address = device_;
  for (auto& [begin, length] : segments_) {
    if (static_cast<size_t>(begin - address) >= size) break;
    address = begin + length;
  }
  if (address + size > device_ + arena_bytes_) return nullptr;
  segments_[address] = size;
  stats_.reserved += size;
  stats_.peak_reserved = std::max(stats_.peak_reserved, stats_.reserved);
  return new Block{address, size, stream, pool, small};
}

void DeviceMemory::free(void* address) {
  if (!address) return;
  std::lock_guard<std::mutex> guard(mutex_);
  auto found = used_.find(address);
  if (found == used_.end()) return;
  Block* block = found->second;
  used_.erase(found);
  stats_.allocated -= block->bytes;
  if (block->users.empty()) {
    give_back(block);
    return;
  }
  Pending pending{block, {}};
  for (auto& [stream, position] : block->users) pending.marks.emplace_back(stream, position());
  block->users.clear();
  pending_.push_back(std::move(pending));
}

void DeviceMemory::record_stream(void* address, int64_t stream, std::function<uint64_t()> position) {
  std::lock_guard<std::mutex> guard(mutex_);
  auto found = used_.find(address);
  if (found != used_.end() && found->second->stream != stream) found->second->users[stream] = std::move(position);
}

void DeviceMemory::process_pending() {
  auto over = [this](Pending& pending) {
    for (auto& [stream, position] : pending.marks)
      if (!is_over_(stream, position)) return false;
    give_back(pending.block);
    return true;
  };
  pending_.erase(std::remove_if(pending_.begin(), pending_.end(), over), pending_.end());
}

void DeviceMemory::give_back(Block* block) {
  block->used = false;
  Pool& blocks = pool_of(block->pool, block->small);
  auto is_pending = [this](Block* other) {
    return std::any_of(pending_.begin(), pending_.end(), [&](Pending& each) { return each.block == other; });
  };
  if (Block* before = block->previous; before && !before->used && !is_pending(before)) {
    blocks.erase(before);
    block->address = before->address;
    block->bytes += before->bytes;
    block->previous = before->previous;
    if (block->previous) block->previous->next = block;
    delete before;
  }
  if (Block* after = block->next; after && !after->used && !is_pending(after)) {
    blocks.erase(after);
    block->bytes += after->bytes;
    block->next = after->next;
    if (block->next) block->next->previous = block;
    delete after;
  }
  blocks.insert(block);
}

void DeviceMemory::release_segments() {
  for (auto& [key, blocks] : free_) {
    if (key.first && pool_users_[key.first] > 0) continue;  // a graph's memory
    for (auto each = blocks.begin(); each != blocks.end();) {
      Block* block = *each;
      if (block->previous || block->next) {
        ++each;
        continue;
      }
      each = blocks.erase(each);
      segments_.erase(block->address);
      stats_.reserved -= block->bytes;
      madvise(host_view(block->address), block->bytes, MADV_DONTNEED);
      delete block;
    }
  }
}

void DeviceMemory::empty_cache() {
  std::lock_guard<std::mutex> guard(mutex_);
  process_pending();
  release_segments();
}

void DeviceMemory::retain_pool(uint64_t pool) {
  std::lock_guard<std::mutex> guard(mutex_);
  pool_users_[pool] += 1;
}

void DeviceMemory::release_pool(uint64_t pool) {
  std::lock_guard<std::mutex> guard(mutex_);
  pool_users_[pool] -= 1;
}

void DeviceMemory::limit(double fraction) {
  std::lock_guard<std::mutex> guard(mutex_);
  fraction_ = fraction;
}

MemoryStats DeviceMemory::stats() {
  std::lock_guard<std::mutex> guard(mutex_);
  return stats_;
}

void DeviceMemory::reset_peaks() {
  std::lock_guard<std::mutex> guard(mutex_);
  stats_.peak_allocated = stats_.allocated;
  stats_.peak_reserved = stats_.reserved;
}

size_t DeviceMemory::free_bytes() {
  std::lock_guard<std::mutex> guard(mutex_);
  return total_bytes_ - context_bytes_ - stats_.reserved;
}

}  // namespace simulated
