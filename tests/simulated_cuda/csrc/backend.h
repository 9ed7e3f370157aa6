// The simulator's side of torch's backend interfaces.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/util/Exception.h>

#include "streams.h"

namespace simulated {

void install_hooks();
[[noreturn]] void raise_accelerator_error(const std::string& message);

// Errors as the classes that torch's Python side knows.
template <typename Call>
auto as_torch(Call call) {
  try {
    return call();
  } catch (const OutOfMemory& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
  } catch (const CudaError& error) {
    raise_accelerator_error(error.what());
  }
}

bool pin(const void* address, size_t bytes);  // false: it is pinned already, or past the limit
bool unpin(const void* address);
bool is_pinned(const void* address);
void limit_pinned_bytes(size_t bytes);

int64_t stream_key(const Stream& stream);  // unlike its id, of all devices
void record_use(const void* address, Stream& stream);
at::Generator cpu_generator(const std::optional<at::Generator>& generator, int device);

}  // namespace simulated
