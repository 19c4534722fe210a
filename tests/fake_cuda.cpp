// A CUDA device without a driver: what torch's autograd asks of one while tensors on it are fake (shapes, no data).
// Preloaded, so that these answers are found before torch's own.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

namespace at::detail {
struct Hooks : CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

__attribute__((visibility("default"))) const CUDAHooksInterface& getCUDAHooks() {
  static Hooks hooks;
  return hooks;
}
}  // namespace at::detail

namespace {
const Device device(kCUDA, 0);

// One device, one stream.
struct Guard : impl::NoOpDeviceGuardImpl<kCUDA> {
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
