// What torch asks of a backend: device guard, allocators, generators, hooks.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include "backend.h"

namespace simulated {

namespace {

using c10::DeviceIndex;
using c10::DeviceType;

void free_device_memory(void* address) {
  if (!address) return;
  for (int device = 0; device < settings().num_devices; ++device)
    if (memory(device).owns(address)) memory(device).free(address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    int device = current_device();
    Stream& stream = current_stream(device);
    void* address = as_torch([&] {
      return memory(device).allocate(bytes, stream_key(stream), pool_of_allocation(stream));
    });
    if (address) fill_with_rubbish(stream, memory(device).host_view(address), bytes);
    return {address, address, &free_device_memory, c10::Device(DeviceType::CUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device_memory; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "not on a simulated device"); }

  static void fill_with_rubbish(Stream& stream, void* view, size_t bytes) {
    if (is_capturing(stream)) return;
    // Enough to be noticed; a whole slab would take its time.
    size_t some = std::min(bytes, size_t(1) << 16);
    enqueue(stream, [view, some] { memset(view, 0xEE, some); }, 0);
  }
};

// Page-locked memory: given out by torch, or locked where it is.
struct PinnedMemory {
  std::mutex mutex;
  std::map<const char*, size_t> ranges;
  size_t locked_bytes = 0, limit_bytes = SIZE_MAX;

  // The limit is of memory that others have made: `ulimit -l` does not bound what the driver gives out itself.
  bool add(const void* address, size_t bytes, bool limited) {
    std::lock_guard<std::mutex> guard(mutex);
    auto begin = static_cast<const char*>(address);
    auto after = ranges.lower_bound(begin);
    if (after != ranges.end() && after->first < begin + bytes) return false;
    if (after != ranges.begin() && std::prev(after)->first + std::prev(after)->second > begin) return false;
    if (limited && locked_bytes + bytes > limit_bytes) return false;
    ranges[begin] = bytes;
    locked_bytes += bytes;
    return true;
  }
  bool remove(const void* address) {
    std::lock_guard<std::mutex> guard(mutex);
    auto found = ranges.find(static_cast<const char*>(address));
    if (found == ranges.end()) return false;
    locked_bytes -= found->second;
    ranges.erase(found);
    return true;
  }
  bool contains(const void* address) {
    std::lock_guard<std::mutex> guard(mutex);
    auto at = static_cast<const char*>(address);
    auto after = ranges.upper_bound(at);
    return after != ranges.begin() && at < std::prev(after)->first + std::prev(after)->second;
  }
};

PinnedMemory& pinned() {
  static auto* instance = new PinnedMemory;
  return *instance;
}

void free_pinned(void* address) {
  if (!address) return;
  pinned().remove(address);
  c10::free_cpu(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    as_torch([] { forbid_in_capture("operation not permitted when stream is capturing"); });
    void* address = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (address && !pinned().add(address, bytes, false)) {
      c10::free_cpu(address);
      raise_accelerator_error("CUDA error: out of memory (page-locked)");
    }
    return {address, address, &free_pinned, c10::Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &device_allocator)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {DeviceType::CUDA, static_cast<DeviceIndex>(current_device())}; }
  void setDevice(c10::Device device) const override {
    if (device.index() >= 0) as_torch([&] { set_device(device.index()); });
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < deviceCount()) set_device(device.index());
  }
  c10::Stream getStream(c10::Device device) const override { return of(current_stream(index(device))); }
  c10::Stream getDefaultStream(c10::Device device) const override { return of(simulated::stream(index(device), 0)); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return of(new_stream(index(device))); }
  c10::Stream getNewStream(c10::Device device, int) const override { return of(new_stream(index(device))); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream before = getStream(stream.device());
    set_current_stream(to(stream));
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream_key(to(stream)));
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag flag) const override {
    if (!*event) *event = new Event;
    auto* made = static_cast<Event*>(*event);
    made->timed = flag == c10::EventFlag::BACKEND_DEFAULT;
    as_torch([&] { simulated::record(*made, to(stream)); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) as_torch([&] { simulated::wait(to(stream), *static_cast<Event*>(event)); });
  }
  bool queryEvent(void* event) const override {
    return !event || as_torch([&] { return query(*static_cast<Event*>(event)); });
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(settings().num_devices); }
  bool queryStream(const c10::Stream& stream) const override {
    return as_torch([&] { return query(to(stream)); });
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    as_torch([&] { synchronize(to(stream)); });
  }
  bool isStreamCapturing(const c10::Stream& stream) const override { return is_capturing(to(stream)); }
  void synchronizeEvent(void* event) const override {
    if (event) as_torch([&] { synchronize(*static_cast<Event*>(event)); });
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    as_torch([&] { synchronize_device(device); });
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    record_use(data.get(), to(stream));
  }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    return as_torch([&] { return elapsed_ms(*static_cast<Event*>(begin), *static_cast<Event*>(end)); });
  }

 private:
  static int index(c10::Device device) { return device.index() < 0 ? current_device() : device.index(); }
  static c10::Stream of(Stream& stream) {
    return c10::Stream(c10::Stream::UNSAFE, {DeviceType::CUDA, static_cast<DeviceIndex>(stream.device)}, stream.id);
  }
  static Stream& to(const c10::Stream& stream) { return simulated::stream(stream.device_index(), stream.id()); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Draws the CPU's numbers, in an order of its own.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex device, at::Generator on_cpu)
      : GeneratorImpl({DeviceType::CUDA, device}, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        cpu(std::move(on_cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device_.index(), cpu.clone()); }

  at::Generator cpu;
};

at::Generator make_generator(DeviceIndex device) {
  return at::make_generator<Generator>(device, at::detail::createCPUGenerator());
}

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    static auto* all = new std::vector<at::Generator>;
    static std::mutex mutex;
    std::lock_guard<std::mutex> guard(mutex);
    while (static_cast<int>(all->size()) < settings().num_devices) all->push_back(make_generator(all->size()));
    return all->at(device < 0 ? simulated::current_device() : device);
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return make_generator(device < 0 ? simulated::current_device() : device);
  }
  c10::Device getDeviceFromPtr(void* address) const override {
    for (int device = 0; device < settings().num_devices; ++device)
      if (memory(device).owns(address)) return {DeviceType::CUDA, static_cast<DeviceIndex>(device)};
    return {DeviceType::CPU};
  }
  bool isPinnedPtr(const void* address) const override { return pinned().contains(address); }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return static_cast<DeviceIndex>(simulated::current_device()); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  int getNumGPUs() const override { return settings().num_devices; }
  void deviceSynchronize(DeviceIndex device) const override {
    as_torch([&] { synchronize_device(device); });
  }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(settings().num_devices); }
  void setCurrentDevice(DeviceIndex device) const override {
    as_torch([&] { set_device(device); });
  }
  DeviceIndex getCurrentDevice() const override { return current_device(); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto before = current_device();
    as_torch([&] { set_device(device); });
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
};

}  // namespace

// torch keeps the hooks that it found when it was imported, which were those of a build without CUDA. They have no data,
// so they become these by their table of functions.
void install_hooks() {
  static auto* hooks = new Hooks;
  auto* kept = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  memcpy(static_cast<void*>(kept), static_cast<void*>(hooks), sizeof(void*));
}

void raise_accelerator_error(const std::string& message) {
  throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, 1, message);
}

bool pin(const void* address, size_t bytes) { return pinned().add(address, bytes, true); }
bool unpin(const void* address) { return pinned().remove(address); }
bool is_pinned(const void* address) { return pinned().contains(address); }
void limit_pinned_bytes(size_t bytes) { pinned().limit_bytes = bytes; }

int64_t stream_key(const Stream& stream) { return stream.device * 1000 + stream.id; }

void record_use(const void* address, Stream& stream) {
  if (!address || !memory(stream.device).owns(address)) return;
  memory(stream.device).record_stream(const_cast<void*>(address), stream_key(stream), [&stream] {
    return stream.enqueued.load();
  });
}

at::Generator cpu_generator(const std::optional<at::Generator>& generator, int device) {
  at::Generator chosen = generator.has_value() && generator->defined()
                             ? *generator
                             : at::detail::getCUDAHooks().getDefaultGenerator(static_cast<DeviceIndex>(device));
  TORCH_CHECK(chosen.device().type() == DeviceType::CUDA, "Expected a 'cuda' device type for generator but found '",
              chosen.device().type(), "'");
  return static_cast<Generator*>(chosen.unsafeGetGeneratorImpl())->cpu;
}

}  // namespace simulated
