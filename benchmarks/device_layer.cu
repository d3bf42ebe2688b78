// Times layers of four products and attention, of one token, without ONNX Runtime; device_layer.py compiles it, with
//
//   DEVICE_SOURCE      device/row_linear.cu
//   KERNELS            those of device_rows.cu by matrices, small blocks first
//   ATTENTION_SOURCE   device/attention.cu, for heads of 128 of which TDA_HEADS are read at once
//
//     device_layer heads kv_heads ffn layers context density ..
#ifndef __CUDA_ARCH__  // the host's pass sees device code too
#define __CUDA_ARCH__ 900
namespace attention {
#include ATTENTION_SOURCE
}
#include DEVICE_SOURCE
#undef __CUDA_ARCH__
#else
namespace attention {
#include ATTENTION_SOURCE
}
#include DEVICE_SOURCE
#endif
#include "layer_shares.cuh"  // kSliceColumns
#include "layer_chain.cuh"

#include <cstring>
#include <utility>

using attention::AttentionArguments;

constexpr int kSize = 128;  // elements of a head

// Uniform, from -1 to 1.
__global__ void FillHalves(__half* halves, size_t count, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    unsigned hash = static_cast<unsigned>(i * 2654435761u) ^ seed * 0x9e3779b9u;
    hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
    hash = (hash ^ hash >> 12) * 0x297a2d39u;
    halves[i] = __float2half(static_cast<float>((hash ^ hash >> 15) & 0xffff) / 32768.0f - 1.0f);
  }
}

__half* RandomHalves(size_t count, unsigned seed) {
  auto* halves = Allocate<__half>(count);
  FillHalves<<<1024, 256>>>(halves, count, seed);
  return halves;
}

struct AttentionCase {
  const char* name;
  void (*kernel)(AttentionArguments);
  int threads, dynamic_bytes;
};
#define TDA_NAME(heads, threads) attention::Attend_128_##heads##_##threads
#define TDA_KERNEL(heads, threads) TDA_NAME(heads, threads)
const AttentionCase kAttention[] = {
    {"narrow", TDA_KERNEL(TDA_HEADS, 128), 128, 0},
    {"wide", TDA_KERNEL(TDA_HEADS, 512), 512, TDA_HEADS * 512 / 32 * (kSize + 8) * 4},
};

// Attention of all layers, from y of their first product to x of their second.
class Attention {
 public:
  Attention(Chain& chain, int heads, int kv_heads, int context)
      : heads_(heads), kv_heads_(kv_heads), context_(context), tiles_(kv_heads * Tiles()) {
    const size_t row = static_cast<size_t>(kv_heads) * kSize, outputs = row * 2 + static_cast<size_t>(heads) * kSize;
    auto* last_index = Allocate<int>(1);
    CopyTo(last_index, std::vector<int>{context - 1});
    const auto* cosines = RandomHalves(static_cast<size_t>(context) * kSize / 2, 1);
    const auto* sines = RandomHalves(static_cast<size_t>(context) * kSize / 2, 2);
    for (int layer = 0; layer < chain.layers; ++layer) {
      AttentionArguments made = {};
      made.query = chain.products[4 * layer].y;
      made.key = made.query + heads * kSize;
      made.value = made.key + row;
      made.past_key = made.present_key = reinterpret_cast<Element*>(RandomHalves(row * context, 10 + layer));
      made.past_value = made.present_value = reinterpret_cast<Element*>(RandomHalves(row * context, 1000 + layer));
      made.cos = reinterpret_cast<const Element*>(cosines);
      made.sin = reinterpret_cast<const Element*>(sines);
      made.last_index = last_index;
      made.attended = Allocate<Element>(static_cast<size_t>(heads) * kSize);
      made.tokens = made.appends = 1;
      made.heads = heads;
      made.kv_heads = kv_heads;
      made.size = kSize;
      made.pairs = kSize / 2;
      made.past_room = made.room = made.most = made.buffer = context;
      made.query_stride = made.key_stride = made.value_stride = static_cast<int>(outputs);
      made.scale = 0.25f;
      chain.products[4 * layer + 1].x = made.attended;
      layers_.push_back(made);
    }
    CHECK(cudaDeviceSynchronize());
  }

  // Whether all clusters of so many blocks run at once.
  bool Resident(const AttentionCase& made, int splits) const {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = Config(made, splits, attributes);
    config.numAttrs = 1;
    int clusters = 0;
    const bool known = cudaOccupancyMaxActiveClusters(&clusters, made.kernel, &config) == cudaSuccess;
    cudaGetLastError();
    return known && clusters >= tiles_;
  }

  // The choice of attention_cuda.cc where key-value heads are few enough to need no bound of their own.
  std::pair<const AttentionCase*, int> Choice() const {
    for (int wide = 1; wide >= 0; --wide) {
      int splits = attention::kMostRanks;
      while (splits > 1 && !Resident(kAttention[wide], splits)) --splits;
      if (splits > 1) return {&kAttention[wide], splits};
    }
    return {&kAttention[0], 1};
  }

  void Run(int layer, const AttentionCase& made, int splits, cudaStream_t stream) const {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = Config(made, splits, attributes);
    config.stream = stream;
    AttentionArguments arguments = layers_[layer];
    arguments.splits = splits;
    CHECK(cudaLaunchKernelEx(&config, made.kernel, arguments));
  }

  // Compare the first layer's result with a slow reference.
  void Check(const AttentionCase& made, int splits, cudaStream_t stream) const {
    const AttentionArguments& first = layers_[0];
    const auto y = CopyFrom<__half>(first.query, first.query_stride);
    const auto cosines = CopyFrom<__half>(first.cos, static_cast<size_t>(context_) * kSize / 2);
    const auto sines = CopyFrom<__half>(first.sin, cosines.size());
    const size_t row = static_cast<size_t>(context_) * kSize;
    auto keys = CopyFrom<__half>(first.present_key, kv_heads_ * row);
    auto values = CopyFrom<__half>(first.present_value, kv_heads_ * row);
    const auto rotated = [&](size_t at, int d) {
      const int pair = d % (kSize / 2);
      const size_t angle = static_cast<size_t>(context_ - 1) * kSize / 2 + pair;
      const double own = __half2float(y[at + d]), other = __half2float(y[at + (d + kSize / 2) % kSize]);
      return own * __half2float(cosines[angle]) + (d < kSize / 2 ? -other : other) * __half2float(sines[angle]);
    };
    for (int kv = 0; kv < kv_heads_; ++kv)
      for (int d = 0; d < kSize; ++d) {
        const size_t at = (static_cast<size_t>(kv) * context_ + context_ - 1) * kSize + d;
        keys[at] = __float2half(static_cast<float>(rotated(static_cast<size_t>(heads_ + kv) * kSize, d)));
        values[at] = y[static_cast<size_t>(heads_ + kv_heads_ + kv) * kSize + d];
      }
    std::vector<__half> wanted;
    for (int head = 0; head < heads_; ++head) {
      const size_t begin = static_cast<size_t>(head / (heads_ / kv_heads_)) * context_ * kSize;
      double query[kSize], sum[kSize] = {}, weights = 0.0;
      for (int d = 0; d < kSize; ++d) query[d] = rotated(static_cast<size_t>(head) * kSize, d) * first.scale;
      for (int position = 0; position < context_; ++position) {
        double score = 0.0;
        for (int d = 0; d < kSize; ++d) score += query[d] * __half2float(keys[begin + position * kSize + d]);
        const double weight = std::exp(score);
        weights += weight;
        for (int d = 0; d < kSize; ++d) sum[d] += weight * __half2float(values[begin + position * kSize + d]);
      }
      for (const double each : sum) wanted.push_back(__float2half(static_cast<float>(each / weights)));
    }
    Run(0, made, splits, stream);
    CHECK(cudaStreamSynchronize(stream));
    Compare(std::string("attention, ") + made.name, CopyFrom<__half>(first.attended, wanted.size()), wanted);
  }

 private:
  int Tiles() const { return (heads_ / kv_heads_ + TDA_HEADS - 1) / TDA_HEADS; }

  cudaLaunchConfig_t Config(const AttentionCase& made, int splits, cudaLaunchAttribute (&attributes)[2]) const {
    CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    CHECK(cudaFuncSetAttribute(made.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, made.dynamic_bytes));
    attributes[0] = attributes[1] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(splits, tiles_);
    config.blockDim = dim3(made.threads);
    config.dynamicSmemBytes = made.dynamic_bytes;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
  }

  const int heads_, kv_heads_, context_, tiles_;
  std::vector<AttentionArguments> layers_;
};

int main(int count, char** texts) {
  if (count < 7) return 2;
  const int heads = std::atoi(texts[1]), kv_heads = std::atoi(texts[2]), ffn = std::atoi(texts[3]);
  const int layers = std::atoi(texts[4]), context = std::atoi(texts[5]), hidden = heads * kSize;
  Chain chain({{hidden, (heads + 2 * kv_heads) * kSize}, {hidden, hidden}, {hidden, 2 * ffn}, {ffn, hidden}}, layers);
  Attention attention(chain, heads, kv_heads, context);
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const Launches launches(chain, device.multiProcessorCount);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const auto run = [&](const AttentionCase* made, int splits) {
    for (int layer = 0; layer < layers; ++layer) {
      launches.Run(4 * layer, stream);
      if (made != nullptr) attention.Run(layer, *made, splits, stream);
      for (int p = 1; p < 4; ++p) launches.Run(4 * layer + p, stream);
    }
  };
  const auto [chosen, chosen_splits] = attention.Choice();
  std::printf("%s; products: %s\n", device.name, launches.Kernels(4).c_str());
  for (int i = 6; i < count; ++i) {
    chain.SetDensity(std::atof(texts[i]));
    run(chosen, chosen_splits);
    CHECK(cudaStreamSynchronize(stream));
    const auto print = [&](const char* name, int splits) {
      const AttentionCase* made = nullptr;
      for (const AttentionCase& each : kAttention) {
        if (std::strcmp(each.name, name) == 0) made = &each;
      }
      const Times times = TimeReplays(stream, [&] { run(made, splits); });
      std::printf("density %s, attention %-7s x %2d: %6.2f us a layer (%.2f to %.2f)%s\n", texts[i], name, splits,
                  times.median / layers, times.least / layers, times.most / layers,
                  made == chosen && splits == chosen_splits ? ", the choice" : "");
      std::fflush(stdout);
    };
    print("none", 0);
    for (const AttentionCase& made : kAttention) {
      for (int splits = 2; splits <= attention::kMostRanks; ++splits) {
        if (!attention.Resident(made, splits)) continue;
        attention.Check(made, splits, stream);
        print(made.name, splits);
      }
    }
  }
}
