// Times kernels of device/row_linear.cu without ONNX Runtime; device_rows.py compiles it, with these:
//
//   DEVICE_SOURCE   the device code, with BEGIN_STAMPS(layer) and STAMP(i) where a block reaches a step
//   TDA_BITS        4 or 8
//   KERNELS         {"name", kernel, columns of a thread, threads, dynamic shared bytes, rows of a warp at once}, ..., and
//                   for the kernel of blocks that stay also its matrices of a warp under way
//
//     device_rows [--stamps] INPUTSxOUTPUTS .. density ..
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

constexpr int kStamps = 5, kMostBlocks = 512, kMostLayers = 48;
__shared__ int layer_of_launch;
__device__ unsigned long long stamps[kMostLayers][kStamps][kMostBlocks];

#define STAMP(i)                                                                                        \
  do {                                                                                                  \
    if (threadIdx.x == 0) {                                                                             \
      unsigned long long now;                                                                           \
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));                                            \
      stamps[layer_of_launch][i][(blockIdx.y * gridDim.x + blockIdx.x) % kMostBlocks] = now;            \
    }                                                                                                   \
  } while (0)

#define BEGIN_STAMPS(layer)                          \
  do {                                               \
    if (threadIdx.x == 0) layer_of_launch = (layer); \
    STAMP(0);                                        \
  } while (0)

#ifndef __CUDA_ARCH__  // the host's pass sees device code too
#define __CUDA_ARCH__ 900
#include DEVICE_SOURCE
#undef __CUDA_ARCH__
#else
#include DEVICE_SOURCE
#endif

#include "device_program.cuh"

constexpr size_t kTotalBytes = 1500000000;  // of all matrices, so that no cache holds them
constexpr double kLargestError = 2e-3;      // relative to the largest result
constexpr const char* kSteps[kStamps] = {"the block begins", "earlier kernels have ended", "its rows are listed",
                                         "its rows are added", "the result is stored"};

// The slow reference: a thread for each output.
__global__ void Reference(RowLinearArguments a, float* y) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= a.outputs) return;
  const auto number = [&](const void* packed, int count, int row, int at) {
    const size_t row_bytes = (static_cast<size_t>(count) * TDA_BITS + 7) / 8;
    const int byte = static_cast<const unsigned char*>(packed)[row * row_bytes + at * TDA_BITS / 8];
    return TDA_BITS == 8 ? byte : byte >> at % 2 * 4 & 15;
  };
  const int groups = a.outputs / kGroup, group = column / kGroup;
  float sum = 0.0f;
  for (int row = 0; row < a.inputs; ++row) {
    const float x = ToFloat(a.x[row]);
    if (x * x * a.row_price[row] < *a.price) continue;
    const int difference = number(a.weight.weights, a.outputs, row, column) - number(a.weight.zero_points, groups, row, group);
    sum += x * difference * HalfToFloat(a.weight.scales[static_cast<size_t>(row) * groups + group]);
  }
  y[column] = sum;
}

void PrintStamps(int blocks, int layer) {
  static unsigned long long all[kMostLayers][kStamps][kMostBlocks];
  CHECK(cudaMemcpyFromSymbol(all, stamps, sizeof all));
  const int count = std::min(blocks, kMostBlocks);
  const unsigned long long end = *std::max_element(all[layer - 1][kStamps - 1], all[layer - 1][kStamps - 1] + count);
  for (int i = 0; i < kStamps; ++i) {
    std::vector<double> times;
    for (int block = 0; block < count; ++block) times.push_back(1e-3 * static_cast<long long>(all[layer][i][block] - end));
    double sum = 0.0;
    for (const double time : times) sum += time;
    std::printf("    %-26s %6.1f us on average, %6.1f to %6.1f, after the last block of the kernel before\n", kSteps[i],
                sum / count, *std::min_element(times.begin(), times.end()), *std::max_element(times.begin(), times.end()));
  }
}

void Measure(const KernelCase& made, const std::vector<RowLinearArguments>& layers, double bytes, double density,
             bool with_stamps, float* expected) {
  const RowLinearArguments& first = layers[0];
  AllowLaunches(made);
  const LaunchShape shape = ShapeOf(made, first.inputs, first.outputs);
  if (shape.ranks == 0) return;
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));

  LaunchProduct(made, shape, stream, first);
  Reference<<<(first.outputs + 255) / 256, 256, 0, stream>>>(first, expected);
  std::vector<float> wanted(first.outputs);
  std::vector<__half> found(first.outputs);
  CHECK(cudaStreamSynchronize(stream));
  CHECK(cudaMemcpy(wanted.data(), expected, wanted.size() * sizeof(float), cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(found.data(), first.y, found.size() * sizeof(__half), cudaMemcpyDeviceToHost));
  double error = 0.0, largest = 0.0;
  for (int i = 0; i < first.outputs; ++i) {
    error = std::max(error, std::fabs(static_cast<double>(wanted[i]) - __half2float(found[i])));
    largest = std::max(largest, std::fabs(static_cast<double>(wanted[i])));
  }
  if (!(error <= kLargestError * largest)) {
    std::fprintf(stderr, "%s: an error of %.1e of the largest result, so it is not timed\n", made.name, error / largest);
    std::exit(1);
  }

  cudaGraph_t graph;
  cudaGraphExec_t replayed;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (const RowLinearArguments& layer : layers) LaunchProduct(made, shape, stream, layer);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&replayed, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 18; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(replayed, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(1e3f * ms / layers.size());
  }
  std::sort(times.begin(), times.end());
  const float median = times[times.size() / 2];
  std::printf("%6d -> %6d, density %.2f, %-12s %3d x %2d blocks  %7.2f us (%.2f to %.2f)  %5.0f GB/s\n", first.inputs,
              first.outputs, density, made.name, shape.slices, shape.ranks, median, times.front(), times.back(),
              bytes * density / median / 1e3);
  if (with_stamps) PrintStamps(shape.ranks * shape.slices, static_cast<int>(layers.size()) / 2);
  CHECK(cudaGraphExecDestroy(replayed));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

void MeasureShape(int inputs, int outputs, const std::vector<double>& densities, bool with_stamps) {
  const size_t elements = static_cast<size_t>(inputs) * outputs;
  const size_t codes = elements * TDA_BITS / 8, scales = elements / kGroup;
  const size_t zero_points = static_cast<size_t>(inputs) * ((outputs / kGroup * TDA_BITS + 7) / 8);
  const size_t bytes = codes + scales * sizeof(__half) + zero_points;
  const int count = static_cast<int>(std::clamp<size_t>(kTotalBytes / bytes, 8, kMostLayers));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<__half> x(inputs);
  std::vector<float> row_price(inputs), worth(inputs);
  for (int i = 0; i < inputs; ++i) {
    x[i] = __float2half(normal(random));
    row_price[i] = std::exp(normal(random));
    worth[i] = __half2float(x[i]) * __half2float(x[i]) * row_price[i];
  }
  std::vector<void*> memory;
  const auto allocate = [&](size_t size) {
    memory.push_back(nullptr);
    CHECK(cudaMalloc(&memory.back(), size));
    return memory.back();
  };
  const auto copied = [&](const auto& values) {
    void* there = allocate(values.size() * sizeof(values[0]));
    CHECK(cudaMemcpy(there, values.data(), values.size() * sizeof(values[0]), cudaMemcpyHostToDevice));
    return there;
  };
  RowLinearArguments shared = {};
  void* price_there = allocate(sizeof(float));
  auto* expected = static_cast<float*>(allocate(outputs * sizeof(float)));
  shared.x = static_cast<Element*>(copied(x));
  shared.row_price = static_cast<float*>(copied(row_price));
  shared.price = static_cast<float*>(price_there);
  shared.tokens = shared.early = 1;
  shared.inputs = inputs;
  shared.outputs = outputs;
  std::vector<RowLinearArguments> layers(count, shared);
  for (int layer = 0; layer < count; ++layer) {
    const size_t zero_words = (zero_points + 3) / 4;
    auto* own_codes = static_cast<unsigned*>(allocate(codes));
    auto* own_scales = static_cast<__half*>(allocate(scales * sizeof(__half)));
    auto* own_zero_points = static_cast<unsigned*>(allocate(zero_words * 4));
    FillWords<<<1024, 256>>>(own_codes, codes / 4, layer);
    FillWords<<<1024, 256>>>(own_zero_points, zero_words, layer + kMostLayers);
    FillScales<<<1024, 256>>>(own_scales, scales, 0.005f);
    layers[layer].weight = {own_codes, reinterpret_cast<unsigned short*>(own_scales),
                            reinterpret_cast<unsigned char*>(own_zero_points), outputs, 5};
    layers[layer].y = static_cast<Element*>(allocate(outputs * sizeof(Element)));
    layers[layer].counters = layer;  // which launch it is, for STAMP; clusters need no counters
  }
  CHECK(cudaDeviceSynchronize());
  std::sort(worth.begin(), worth.end());
  for (const double density : densities) {
    const float price = density >= 1.0 ? 0.0f : worth[static_cast<int>((1.0 - density) * inputs)];
    CHECK(cudaMemcpy(price_there, &price, sizeof price, cudaMemcpyHostToDevice));
    const KernelCase cases[] = {KERNELS};
    for (const KernelCase& made : cases) Measure(made, layers, static_cast<double>(bytes), density, with_stamps, expected);
  }
  for (void* place : memory) CHECK(cudaFree(place));
}

int main(int count, char** arguments) {
  bool with_stamps = false;
  std::vector<std::pair<int, int>> shapes;
  std::vector<double> densities;
  for (int i = 1; i < count; ++i) {
    int inputs, outputs;
    if (std::strcmp(arguments[i], "--stamps") == 0) {
      with_stamps = true;
    } else if (std::sscanf(arguments[i], "%dx%d", &inputs, &outputs) == 2) {
      shapes.emplace_back(inputs, outputs);
    } else {
      densities.push_back(std::atof(arguments[i]));
    }
  }
  for (const auto& [inputs, outputs] : shapes) MeasureShape(inputs, outputs, densities, with_stamps);
}
