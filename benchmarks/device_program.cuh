// What device_rows.cu and layer_kernel.cu share: made-up weights, and what the host chooses before it launches RowLinear.
// Include it after the device code.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "../tda_export/native/whole_slices.h"

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
  int whole_matrices = 0;  // of the kernel of blocks that stay: matrices that a warp has under way
};

// How a kernel is launched: the grid is (ranks, slices), or of blocks that stay (ranks, clusters).
struct LaunchShape {
  int ranks, slices, dynamic_bytes;
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

// How many clusters of so many blocks the GPU holds at once.
inline int ResidentClusters(const KernelCase& made, int ranks) {
  cudaLaunchConfig_t config = ConfigOf(made);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  config.gridDim = dim3(ranks);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, made.kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

// The most blocks that share a slice of columns so that all run at once.
inline int RanksOf(const KernelCase& made, int inputs, int slices) {
  int ranks = std::min(kMostRanks, (inputs - 1) / (made.threads / 32 * made.rows) + 1);
  while (ranks > 1 && ResidentClusters(made, ranks) < slices) --ranks;
  return ranks;
}

inline int Multiprocessors() {
  int count;
  CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

inline tda::WholeShares WholeSharesOf(const KernelCase& whole, int inputs, int outputs) {
  tda::WholeKernelLimits limits = {TDA_BITS, whole.whole_matrices, Multiprocessors(), whole.dynamic_bytes};
  for (int ranks = 2; ranks <= kMostRanks; ++ranks) limits.resident_clusters[ranks] = ResidentClusters(whole, ranks);
  return tda::ChooseWholeShares(outputs / tda::kWholeSlice, inputs, limits);
}

// How the product launches a kernel, if it chooses that.
inline LaunchShape ShapeOf(const KernelCase& made, int inputs, int outputs) {
  if (made.whole_matrices > 0) {
    const tda::WholeShares shares = WholeSharesOf(made, inputs, outputs);
    return {static_cast<int>(shares.ranks), static_cast<int>(shares.clusters), static_cast<int>(shares.shared_bytes)};
  }
  const int slice = 32 * made.width, slices = (outputs + slice - 1) / slice;
  return {RanksOf(made, inputs, slices), slices, made.dynamic_bytes};
}

// Let a kernel have the clusters and the shared memory that it is launched with.
inline void AllowLaunches(const KernelCase& made) {
  CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  if (made.dynamic_bytes > 0) {
    CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, made.dynamic_bytes));
  }
}

// Launch a product. It may begin before the kernel before it in the stream has ended.
inline void LaunchProduct(const KernelCase& made, const LaunchShape& shape, cudaStream_t stream,
                          const RowLinearArguments& product) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.ranks), 1, 1};
  cudaLaunchConfig_t config = ConfigOf(made);
  config.gridDim = dim3(shape.ranks, shape.slices);
  config.dynamicSmemBytes = shape.dynamic_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  CHECK(cudaLaunchKernelEx(&config, made.kernel, product));
}
