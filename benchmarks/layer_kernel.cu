// Times a chain of products of one token as launches of RowLinear and as one kernel; layer_kernel.py compiles it, with
//
//   DEVICE_SOURCE   device/row_linear.cu
//   KERNELS         those of device_rows.cu by matrices, small blocks first
//
//     layer_kernel [--stamps] [--layers N] density ..
//
// It prints a line of JSON for each case.
#ifndef __CUDA_ARCH__  // the host's pass sees device code too
#define __CUDA_ARCH__ 900
#include DEVICE_SOURCE
#include "layer_shares.cuh"
#include "layer_kernel.cuh"
#undef __CUDA_ARCH__
#else
#include DEVICE_SOURCE
#include "layer_shares.cuh"
#include "layer_kernel.cuh"
#endif
#include "layer_chain.cuh"

#include <cstring>

TDA_LAYER_KERNEL(16, 1, 5, 16)
TDA_LAYER_KERNEL(8, 2, 5, 16)
TDA_LAYER_KERNEL(8, 3, 3, 12)

const std::vector<Shape> kLayer = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};
const std::vector<Shape> kSmall = {{2048, 1536}, {1536, 2048}, {2048, 1024}};
constexpr double kGatherBytes = 6e6;  // of partial sums that blocks would read, from which they are gathered
constexpr size_t kCopiedBytes = 1 << 29;

__global__ void CopyAll(const uint4* from, uint4* to, size_t count) {
  const size_t threads = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += threads) to[i] = from[i];
}

struct LayerCase {
  const char* name;
  void (*kernel)(LayerArguments);
  int warps, blocks, slots, units, bytes;
};
#define LAYER_CASE(warps, blocks, slots, units)                                                          \
  {#warps " warps x " #blocks, Layer_##warps##_##blocks, warps, blocks, slots, units,                    \
   static_cast<int>(sizeof(LayerKernel<warps, slots, units>::Shared))}
const LayerCase kCases[] = {LAYER_CASE(16, 1, 5, 16), LAYER_CASE(8, 2, 5, 16), LAYER_CASE(8, 3, 3, 12)};

enum class Gathered { kNever, kSome, kAlways };
constexpr const char* kGatheredNames[] = {"never", "some", "always"};

// The one kernel, for a chain.
class OneKernel {
 public:
  OneKernel(const Chain& chain, const LayerCase& made, int multiprocessors)
      : chain_(chain), made_(made), blocks_(made.blocks * multiprocessors) {
    CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, made.bytes));
    CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    int resident = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, made.kernel, made.warps * kWarp, made.bytes));
    if (resident < made.blocks) Fail("only " + std::to_string(resident) + " blocks fit on a multiprocessor");
    if (chain.shapes.size() > kMostProducts) Fail("too many layers");
    size_t most_partial = 0, most_outputs = 0;
    for (size_t p = 0; p < chain.shapes.size(); ++p) {
      const RowLinearArguments& launched = chain.products[p];
      const size_t slices = launched.outputs / kSliceColumns;
      const std::vector<unsigned char> groups = Groups(launched.inputs / kChunk, slices);
      auto* groups_there = Allocate<unsigned char>(slices);
      CopyTo(groups_there, groups);
      const int most_groups = *std::max_element(groups.begin(), groups.end());
      arguments_.products[p] = {launched.weight, launched.row_price, groups_there, Allocate<unsigned>(slices),
                                launched.inputs, launched.outputs,   most_groups,  0};
      most_partial = std::max(most_partial, static_cast<size_t>(most_groups) * launched.outputs);
      most_outputs = std::max(most_outputs, static_cast<size_t>(launched.outputs));
    }
    arguments_.x = chain.products[0].x;
    arguments_.price = chain.price;
    arguments_.partial_size = static_cast<int>(most_partial);
    arguments_.gathered_size = static_cast<int>(most_outputs);
    arguments_.partial = Allocate<float>(2 * most_partial);
    arguments_.gathered = Allocate<Element>(2 * most_outputs);
    arguments_.y = Allocate<Element>(most_outputs);
    arguments_.passed = Allocate<unsigned>(2);
    stamps_ = Allocate<unsigned long long>(kMostProducts * kLayerStamps * blocks_);
  }

  // Compute the first `count` products.
  void Run(cudaStream_t stream, size_t count, int early, Gathered gathered, bool with_stamps = false) const {
    LayerArguments arguments = arguments_;
    arguments.count = static_cast<int>(count);
    arguments.early = early;
    arguments.stamps = with_stamps ? stamps_ : nullptr;
    for (size_t p = 0; p < count; ++p) {
      LayerProduct& product = arguments.products[p];
      if (p + 1 == count) {
        product.gathered = 1;
        continue;
      }
      const Shape& next = chain_.shapes[p + 1];
      const double read = 4.0 * next.outputs / kSliceColumns * next.inputs * product.most_groups;
      product.gathered = gathered == Gathered::kAlways || (gathered == Gathered::kSome && read > kGatherBytes);
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;  // refused unless all blocks run at once
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks_);
    config.blockDim = dim3(made_.warps * kWarp);
    config.dynamicSmemBytes = made_.bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&config, made_.kernel, arguments));
  }

  std::vector<__half> Y(size_t count) const {
    return CopyFrom<__half>(arguments_.y, chain_.shapes[count - 1].outputs);
  }

  // Print the average microseconds of a block from step to step, for each product of the last layer.
  void PrintSteps(double density, int early, size_t layer_products) const {
    const size_t count = chain_.shapes.size();
    const auto all = CopyFrom<unsigned long long>(stamps_, count * kLayerStamps * blocks_);
    const auto mean = [&](size_t p, int from_product, int from, int to) {
      double sum = 0.0;
      for (int block = 0; block < blocks_; ++block) {
        sum += 1e-3 * static_cast<long long>(all[(p * kLayerStamps + to) * blocks_ + block] -
                                             all[(from_product * kLayerStamps + from) * blocks_ + block]);
      }
      return sum / blocks_;
    };
    for (size_t p = count - layer_products; p < count; ++p) {
      if (p == 0) continue;
      std::printf("{\"steps_of\": \"%dx%d\", \"density\": %.2f, \"blocks\": \"%s\", \"early\": %d, \"wait_us\": %.2f, "
                  "\"x_us\": %.2f, \"rows_us\": %.2f, \"store_us\": %.2f}\n",
                  chain_.shapes[p].inputs, chain_.shapes[p].outputs, density, made_.name, early, mean(p, p - 1, 3, 0),
                  mean(p, p, 0, 1), mean(p, p, 1, 2), mean(p, p, 2, 3));
    }
  }

  int Blocks() const { return blocks_; }

 private:
  [[noreturn]] void Fail(const std::string& reason) const {
    std::fprintf(stderr, "%s: %s\n", made_.name, reason.c_str());
    std::exit(1);
  }

  // How many blocks share each slice. It refuses what the kernel has no room for.
  std::vector<unsigned char> Groups(int chunks, int slices) const {
    const long long all = static_cast<long long>(chunks) * slices;
    const auto first_unit = [&](long long block) { return all * block / blocks_; };
    std::vector<unsigned char> groups(slices, 0);
    for (int block = 0; block < blocks_; ++block) {
      const long long first = first_unit(block), end = first_unit(block + 1), units = end - first;
      if (units == 0 || units > chunks) Fail("a block's share is of no slice or of more than two");
      for (int warp = 0; warp < made_.warps; ++warp) {
        if (units * (warp + 1) / made_.warps - units * warp / made_.warps > made_.units) Fail("a warp's list is too short");
      }
      for (long long slice = first / chunks; slice <= (end - 1) / chunks; ++slice) {
        if (++groups[slice] == 0) Fail("more than 255 blocks share a slice");
      }
    }
    return groups;
  }

  const Chain& chain_;
  const LayerCase& made_;
  const int blocks_;
  LayerArguments arguments_ = {};
  unsigned long long* stamps_;
};

// Compute with both ways, and compare y of several products.
double Check(const Chain& chain, const Launches& launches, const OneKernel& one, cudaStream_t stream, int early,
             Gathered gathered, const std::string& what) {
  launches.Run(stream);
  double error = 0.0;
  for (const size_t count : {size_t{1}, size_t{2}, size_t{3}, size_t{4}, chain.shapes.size()}) {
    if (count > chain.shapes.size()) continue;
    one.Run(stream, count, early, gathered);
    CHECK(cudaStreamSynchronize(stream));
    error = std::max(error, Compare(what + ", product " + std::to_string(count), one.Y(count), chain.Y(count - 1)));
  }
  return error;
}

// Compare both ways with the slow reference on small products, some of whose warps have no rows.
void CheckSmall(cudaStream_t stream, int multiprocessors, const std::vector<double>& densities) {
  Chain chain(kSmall, 1);
  const Launches launches(chain, multiprocessors);
  for (const double density : densities) {
    chain.SetDensity(density);
    launches.Run(stream);
    CHECK(cudaStreamSynchronize(stream));
    const auto wanted = Reference(chain);
    for (size_t p = 0; p < wanted.size(); ++p) Compare("launches of small products", chain.Y(p), wanted[p]);
    for (const LayerCase& made : kCases) {
      const OneKernel one(chain, made, multiprocessors);
      for (const int early : {0, 1, made.slots}) {
        for (const Gathered gathered : {Gathered::kNever, Gathered::kAlways}) {
          Check(chain, launches, one, stream, early, gathered, std::string(made.name) + " of small products");
        }
      }
    }
  }
}

int main(int count, char** texts) {
  bool with_stamps = false;
  int layers = 8;
  std::vector<double> densities;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(texts[i], "--stamps") == 0) {
      with_stamps = true;
    } else if (std::strcmp(texts[i], "--layers") == 0 && i + 1 < count) {
      layers = std::atoi(texts[++i]);
    } else {
      densities.push_back(std::atof(texts[i]));
    }
  }
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int multiprocessors = device.multiProcessorCount;
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  CheckSmall(stream, multiprocessors, densities);
  const size_t copied = kCopiedBytes / sizeof(uint4);
  const auto* from = Allocate<uint4>(copied);
  auto* to = Allocate<uint4>(copied);
  const Times copy = TimeReplays(stream, [&] { CopyAll<<<16 * multiprocessors, 512, 0, stream>>>(from, to, copied); });
  const double rate = 2.0 * kCopiedBytes / copy.median / 1e3;

  Chain chain(kLayer, layers);
  const Launches launches(chain, multiprocessors);
  std::printf("{\"gpu\": \"%s\", \"multiprocessors\": %d, \"copy_gb_per_s\": %.0f, \"layers\": %d, \"layer_mb\": %.1f, "
              "\"launches\": \"%s\"}\n",
              device.name, multiprocessors, rate, layers, chain.bytes / layers / 1e6,
              launches.Kernels(kLayer.size()).c_str());
  std::vector<OneKernel> kernels;
  for (const LayerCase& made : kCases) kernels.emplace_back(chain, made, multiprocessors);
  for (const double density : densities) {
    chain.SetDensity(density);
    const double bytes_us = density * chain.bytes / layers / rate / 1e3;
    const auto print = [&](const char* way, const std::string& blocks, int early, const char* gathered, double error,
                           const Times& times) {
      std::printf("{\"way\": \"%s\", \"density\": %.2f, \"blocks\": \"%s\", \"early\": %d, \"gathered\": \"%s\", "
                  "\"us_per_layer\": %.2f, \"least\": %.2f, \"most\": %.2f, \"bytes_us\": %.2f, \"error\": %.1e}\n",
                  way, density, blocks.c_str(), early, gathered, times.median / layers, times.least / layers,
                  times.most / layers, bytes_us, error);
      std::fflush(stdout);
    };
    const auto measure_launches = [&] {
      print("launches", "", 0, "", 0.0, TimeReplays(stream, [&] { launches.Run(stream); }));
    };
    measure_launches();
    for (size_t i = 0; i < kernels.size(); ++i) {
      const LayerCase& made = kCases[i];
      const OneKernel& one = kernels[i];
      std::vector<int> earlies = {0, made.slots};
      if (density < 1.0) earlies.insert(earlies.begin() + 1, {1, 2});
      for (const int early : earlies) {
        for (const Gathered gathered : {Gathered::kNever, Gathered::kSome, Gathered::kAlways}) {
          const double error = Check(chain, launches, one, stream, early, gathered, made.name);
          const Times times = TimeReplays(stream, [&] { one.Run(stream, chain.shapes.size(), early, gathered); });
          print("one kernel", made.name, early, kGatheredNames[static_cast<int>(gathered)], error, times);
        }
        if (!with_stamps) continue;
        one.Run(stream, chain.shapes.size(), early, Gathered::kSome, true);
        CHECK(cudaStreamSynchronize(stream));
        one.PrintSteps(density, early, kLayer.size());
      }
    }
    measure_launches();  // again, to see how far times drift
  }
}
