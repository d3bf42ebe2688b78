// Device code of this library on a GPU: compiled once for each kind of GPU, stored on disk, loaded once per process.
#pragma once

#include <string>
#include <vector>

#include "cuda_driver.h"

namespace tda {

// One kernel, ready to be launched.
struct CudaKernel {
  CuFunction function = nullptr;
  int resident_blocks = 0;  // how many blocks the whole GPU holds at once

  // Launch on a stream; `arguments` is the kernel's one parameter. The kernel may begin before the previous one has
  // ended, and waits for it itself (device/common.cuh). Every `cluster` blocks along x form one cluster; 0 means no
  // clusters.
  void Launch(void* stream, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
              const void* arguments, unsigned cluster = 0) const;

  // How many clusters of this size the whole GPU holds at once; 0 where it does not support the size.
  int ResidentClusters(unsigned cluster, unsigned threads) const;

  bool overlaps = false;      // the GPU can begin kernels early
  unsigned shared_bytes = 0;  // dynamic shared memory of a block
};

class CudaModule {
 public:
  // Return the module of a device source (device/<name>.cu) for the current device. Modules stay loaded.
  static const CudaModule& Get(const std::string& name, const std::vector<std::string>& defines);

  // `shared_bytes`: dynamic shared memory of a block.
  CudaKernel Kernel(const char* name, int threads, unsigned shared_bytes = 0) const;

 private:
  CudaModule(const std::string& name, const std::vector<std::string>& defines);

  CudaDevice device_;
  CuLibrary library_ = nullptr;
};

// Whether a GPU has clusters: blocks that reach each other's shared memory.
constexpr bool HasClusters(int capability) { return capability >= 90; }

// The source of device/<name>.cu with what it includes.
std::string DeviceSource(const std::string& name);

// Refuse element types that the current GPU does not support.
void RequireDtype(ElementType type);

}  // namespace tda
