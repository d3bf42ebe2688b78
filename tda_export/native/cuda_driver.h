// The part of the CUDA driver API that this library uses, opened at run time.
#pragma once

#include <cstddef>

#include "ort.h"

namespace tda {

using CuResult = int;
using CuDevice = int;
struct CuStreamOpaque;
struct CuFunctionOpaque;
struct CuLibraryOpaque;
using CuStream = CuStreamOpaque*;
using CuFunction = CuFunctionOpaque*;  // a CUfunction or a CUkernel: launches take either
using CuLibrary = CuLibraryOpaque*;

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct CuLaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    int programmatic_stream_serialization_allowed;
    struct {
      unsigned x, y, z;
    } cluster;
  } value;
};

struct CuLaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  CuStream stream;
  CuLaunchAttribute* attributes;
  unsigned attribute_count;
};

static_assert(sizeof(CuLaunchAttribute) == 72, "CUlaunchAttribute has another layout");
static_assert(offsetof(CuLaunchConfig, stream) == 32 && offsetof(CuLaunchConfig, attribute_count) == 48,
              "CUlaunchConfig has another layout");

constexpr int kClusterDimension = 4;                 // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr int kProgrammaticStreamSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kMultiprocessorCount = 16;             // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kNonPortableClusterSizeAllowed = 14;   // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
constexpr int kMostDynamicSharedBytes = 8;           // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kMostSharedBytesOfBlock = 97;          // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

struct CudaDriver {
  // Open the driver once per process. Throws where there is no driver, or it is too old.
  static const CudaDriver& Get();

  // Throw the error of a failed call.
  void Check(CuResult result, const char* what) const;

  CuResult (*Init)(unsigned flags);
  CuResult (*GetErrorString)(CuResult result, const char** text);
  CuResult (*DriverGetVersion)(int* version);
  CuResult (*CtxGetDevice)(CuDevice* device);
  CuResult (*DeviceGetAttribute)(int* value, int attribute, CuDevice device);
  CuResult (*LibraryLoadData)(CuLibrary* library, const void* code, int* jit_options, void** jit_values,
                              unsigned jit_count, int* options, void** values, unsigned count);
  CuResult (*LibraryGetKernel)(CuFunction* kernel, CuLibrary library, const char* name);
  CuResult (*KernelGetFunction)(CuFunction* function, CuFunction kernel);
  CuResult (*OccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, CuFunction function, int threads, size_t shared);
  CuResult (*OccupancyMaxActiveClusters)(int* clusters, CuFunction function, const CuLaunchConfig* config);
  CuResult (*FuncSetAttribute)(CuFunction function, int attribute, int value);
  CuResult (*LaunchKernelEx)(const CuLaunchConfig* config, CuFunction function, void** arguments, void** extra);
  CuResult (*Memcpy)(uintptr_t to, uintptr_t from, size_t bytes);  // either may be the host's

 private:
  CudaDriver();
};

// The device of the calling thread, as ONNX Runtime has set it.
struct CudaDevice {
  static CudaDevice Current();

  CuDevice device;
  int capability;  // such as 90
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

}  // namespace tda
