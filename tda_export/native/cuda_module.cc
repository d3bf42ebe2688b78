#include "cuda_module.h"

#include <map>
#include <memory>
#include <mutex>

#include "device_sources.h"
#include "kernel_cache.h"
#include "nvrtc.h"

namespace tda {
namespace {

constexpr int kFirstWithEarlyStart = 90;  // compute capability
constexpr int kFirstWithBfloat16 = 80;

CuLaunchAttribute ClusterOf(unsigned blocks) {
  CuLaunchAttribute attribute = {};
  attribute.id = kClusterDimension;
  attribute.value.cluster = {blocks, 1, 1};
  return attribute;
}

// The name under which code is stored: it contains everything that the code depends on.
std::string CacheName(const std::string& name, const std::string& source, const std::vector<std::string>& defines,
                      int capability) {
  const CudaDriver& driver = CudaDriver::Get();
  int driver_version = 0;
  driver.Check(driver.DriverGetVersion(&driver_version), "read the driver's version");
  std::string everything = source;
  for (const std::string& define : defines) everything += '\n' + define;
  return name + "-sm_" + std::to_string(capability) + "-driver_" + std::to_string(driver_version) + "-" +
         TextHash(everything) + ".bin";
}

}  // namespace

std::string DeviceSource(const std::string& name) {
  for (const EmbeddedSource& source : kDeviceSources) {
    if (name == source.name) return source.text;
  }
  Fail("there is no device source ", name);
}

void RequireDtype(ElementType type) {
  const int capability = CudaDevice::Current().capability;
  if (type == kBfloat16 && capability < kFirstWithBfloat16) {
    Fail("bfloat16 needs a GPU of compute capability 8.0 or newer, this one has ", capability / 10, ".",
         capability % 10, "; build the artifact with --dtype fp16");
  }
}

CudaModule::CudaModule(const std::string& name, const std::vector<std::string>& defines)
    : device_(CudaDevice::Current()) {
  const CudaDriver& driver = CudaDriver::Get();
  const std::string source = DeviceSource(name);
  const std::string cache_name = CacheName(name, source, defines, device_.capability);
  auto load = [&](const std::string& code) {
    return driver.LibraryLoadData(&library_, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  };
  const std::string cached = LoadCachedCode(cache_name);
  if (!cached.empty() && load(cached) == 0) return;
  const std::string code = CompileDeviceCode(name + ".cu", source, defines, device_.capability);
  driver.Check(load(code), "load the kernels");
  StoreCachedCode(cache_name, code);
}

const CudaModule& CudaModule::Get(const std::string& name, const std::vector<std::string>& defines) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<CudaModule>> modules;
  std::string key = name + "@" + std::to_string(CudaDevice::Current().device);
  for (const std::string& define : defines) key += " " + define;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<CudaModule>& module = modules[key];
  if (module == nullptr) module.reset(new CudaModule(name, defines));
  return *module;
}

CudaKernel CudaModule::Kernel(const char* name, int threads, unsigned shared_bytes) const {
  const CudaDriver& driver = CudaDriver::Get();
  CudaKernel kernel;
  CuFunction handle = nullptr;
  driver.Check(driver.LibraryGetKernel(&handle, library_, name), "find a kernel");
  // Loads the kernel now, since a first launch inside a capture cannot load it.
  driver.Check(driver.KernelGetFunction(&kernel.function, handle), "load a kernel");
  if (shared_bytes > 0) {
    driver.Check(driver.FuncSetAttribute(kernel.function, kMostDynamicSharedBytes, static_cast<int>(shared_bytes)),
                 "give a kernel shared memory");
  }
  kernel.shared_bytes = shared_bytes;
  int blocks = 0;
  driver.Check(driver.OccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, threads, shared_bytes),
               "measure a kernel");
  kernel.resident_blocks = blocks * device_.multiprocessors;
  kernel.overlaps = device_.capability >= kFirstWithEarlyStart;
  return kernel;
}

void CudaKernel::Launch(void* stream, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
                        const void* arguments, unsigned cluster) const {
  const CudaDriver& driver = CudaDriver::Get();
  CuLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (overlaps) {
    attributes[count].id = kProgrammaticStreamSerialization;
    attributes[count++].value.programmatic_stream_serialization_allowed = 1;
  }
  if (cluster > 0) attributes[count++] = ClusterOf(cluster);
  CuLaunchConfig config = {grid_x,       grid_y,     grid_z, threads, 1, 1, shared_bytes, static_cast<CuStream>(stream),
                           attributes, count};
  void* parameters[] = {const_cast<void*>(arguments)};
  driver.Check(driver.LaunchKernelEx(&config, function, parameters, nullptr), "start a kernel");
}

int CudaKernel::ResidentClusters(unsigned cluster, unsigned threads) const {
  const CudaDriver& driver = CudaDriver::Get();
  // Sizes above 8 must be enabled, and the driver reports whether the GPU supports them.
  if (driver.FuncSetAttribute(function, kNonPortableClusterSizeAllowed, 1) != 0) return 0;
  CuLaunchAttribute attribute = ClusterOf(cluster);
  CuLaunchConfig config = {cluster, 1, 1, threads, 1, 1, shared_bytes, nullptr, &attribute, 1};
  int clusters = 0;
  return driver.OccupancyMaxActiveClusters(&clusters, function, &config) == 0 ? clusters : 0;
}

}  // namespace tda
