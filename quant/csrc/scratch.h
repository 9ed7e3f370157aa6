// Memory that a thread keeps from call to call, since fresh pages cost as much as filling them.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

// As large as the most that was asked for: for a layer of a decode step about 1 MiB.
class Scratch {
   public:
    // At least so many bytes, at a multiple of 64, until the next call; null if memory is refused.
    uint8_t* reserve(int64_t num_bytes) {
        if (!storage_ || num_bytes > size_) {
            storage_.reset(new (std::nothrow) uint8_t[static_cast<size_t>(num_bytes + kAlign)]);
            size_ = storage_ ? num_bytes : 0;
            if (!storage_) return nullptr;
        }
        const auto address = reinterpret_cast<uintptr_t>(storage_.get());
        return storage_.get() + (kAlign - address % kAlign) % kAlign;
    }

   private:
    static constexpr int64_t kAlign = 64;
    std::unique_ptr<uint8_t[]> storage_;
    int64_t size_ = 0;
};
