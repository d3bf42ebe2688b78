// What device_rows.cu and layer_kernel.cu share: made-up weights, and what the host chooses before it launches RowLinear.
// Include it after the device code.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    if (error != cudaSuccess) {                                                            \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));                  \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

constexpr int kGroup = 32;

struct KernelCase {
  const char* name;
  void (*kernel)(RowLinearArguments);
  int width, threads, dynamic_bytes, rows;  // rows that a warp adds at once
};

__global__ void FillWords(unsigned* words, size_t count, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    unsigned hash = static_cast<unsigned>(i * 2654435761u) ^ seed;
    hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
    hash = (hash ^ hash >> 12) * 0x297a2d39u;
    words[i] = hash ^ hash >> 15;
  }
}

// From `least` to twice that.
__global__ void FillScales(__half* scales, size_t count, float least) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    scales[i] = __float2half(least * (1.0f + i * 7919 % 97 / 97.0f));
  }
}

inline cudaLaunchConfig_t ConfigOf(const KernelCase& made) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(made.threads);
  config.dynamicSmemBytes = made.dynamic_bytes;
  return config;
}

// The most blocks that share a slice of columns so that all run at once.
inline int RanksOf(const KernelCase& made, int inputs, int slices) {
  cudaLaunchConfig_t config = ConfigOf(made);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  config.attrs = &attribute;
  config.numAttrs = 1;
  for (int ranks = std::min(kMostRanks, (inputs - 1) / (made.threads / 32 * made.rows) + 1); ranks > 1; --ranks) {
    attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
    config.gridDim = dim3(ranks, slices);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, made.kernel, &config) == cudaSuccess && clusters >= slices) return ranks;
    cudaGetLastError();
  }
  return 1;
}

// Let a kernel have the clusters and the shared memory that it is launched with.
inline void AllowLaunches(const KernelCase& made) {
  CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  if (made.dynamic_bytes > 0) {
    CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, made.dynamic_bytes));
  }
}

// Launch a product in clusters of `ranks` blocks. It may begin before the kernel before it in the stream has ended.
inline void LaunchProduct(const KernelCase& made, int ranks, int slices, cudaStream_t stream,
                          const RowLinearArguments& product) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config = ConfigOf(made);
  config.gridDim = dim3(ranks, slices);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  CHECK(cudaLaunchKernelEx(&config, made.kernel, product));
}
