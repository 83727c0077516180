// Lets torch's CPU build hold tensors without content on `cuda`, and run their backward pass in a device's thread.
// Loaded after libtorch_cpu and before torch is imported, which asks for both of what is registered here.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device first_device(CUDA, 0);
const c10::Stream only_stream(c10::Stream::DEFAULT, first_device);

// Device 0 is always the current one. Nothing is ever computed, so its streams have nothing to do.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return first_device; }
  c10::Device exchangeDevice(c10::Device) const override { return first_device; }
  c10::Stream getStream(c10::Device) const noexcept override { return only_stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream; }
};

// Dropout's masks are drawn with a generator of the device.
struct DeviceGenerator final : at::CPUGeneratorImpl {
  DeviceGenerator() { device_ = first_device; }
};

// Torch looks for this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<DeviceGenerator>(); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
