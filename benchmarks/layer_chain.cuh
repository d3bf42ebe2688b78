// A chain of products in the GPU's memory, its slow reference, and today's way to compute it: launches of RowLinear.
#pragma once

#include "device_program.cuh"

#include <cmath>
#include <random>
#include <string>
#include <vector>

constexpr double kLargestError = 1e-2;  // relative to the largest result
constexpr int kWarmUps = 5, kReplays = 41;
struct Shape {
  int inputs, outputs;
};

template <class T>
T* Allocate(size_t count) {
  void* place;
  CHECK(cudaMalloc(&place, count * sizeof(T)));
  CHECK(cudaMemset(place, 0, count * sizeof(T)));
  return static_cast<T*>(place);
}
template <class T>
void CopyTo(T* there, const std::vector<T>& values) {
  CHECK(cudaMemcpy(there, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
}
template <class T>
std::vector<T> CopyFrom(const void* there, size_t count) {
  std::vector<T> values(count);
  CHECK(cudaMemcpy(values.data(), there, count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

// Products whose x is the first values of the y before. Nothing is freed: the program ends.
struct Chain {
  Chain(const std::vector<Shape>& layer, int layers) : layers(layers) {
    for (int i = 0; i < layers; ++i) shapes.insert(shapes.end(), layer.begin(), layer.end());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<__half> x(shapes[0].inputs);
    for (__half& value : x) value = __float2half(normal(random));
    auto* x_there = Allocate<__half>(x.size());
    CopyTo(x_there, x);
    price = Allocate<float>(1);
    const Element* before = reinterpret_cast<Element*>(x_there);
    for (size_t p = 0; p < shapes.size(); ++p) {
      const auto [inputs, outputs] = shapes[p];
      const size_t codes = CodeWords(p), zero_points = codes / kGroup;
      auto* own_codes = Allocate<unsigned>(codes);
      auto* own_zero_points = Allocate<unsigned>(zero_points);
      FillWords<<<1024, 256>>>(own_codes, codes, p);
      FillWords<<<1024, 256>>>(own_zero_points, zero_points, p + 1000);
      RowLinearArguments made = {};
      made.x = before;
      made.weight = {own_codes, Allocate<unsigned short>(Scales(p)), reinterpret_cast<unsigned char*>(own_zero_points),
                     outputs, 5};
      made.row_price = Allocate<float>(inputs);
      made.price = price;
      made.y = Allocate<Element>(outputs);
      made.tokens = made.early = 1;
      made.inputs = inputs;
      made.outputs = outputs;
      products.push_back(made);
      before = made.y;
      bytes += 4.0 * codes + 4.0 * zero_points + 2.0 * Scales(p);
      if (p + 1 < shapes.size() && shapes[p + 1].inputs > outputs) std::exit(1);
    }
    CHECK(cudaDeviceSynchronize());
  }

  size_t CodeWords(size_t p) const { return static_cast<size_t>(shapes[p].inputs) * shapes[p].outputs / 8; }
  size_t Scales(size_t p) const { return static_cast<size_t>(shapes[p].inputs) * shapes[p].outputs / kGroup; }

  // Drop random rows, whatever x is, as rounded results must not decide it. Scales keep values about as large as x.
  void SetDensity(double density) {
    constexpr double kDifference = 6.52, kMeanScale = 1.528;  // root mean squares: of code - zero point, of scale / least
    constexpr float kAlways = 1e30f;
    std::mt19937 random(2);
    CopyTo(price, std::vector<float>{density < 1.0 ? 1.0f : 0.0f});
    for (size_t p = 0; p < shapes.size(); ++p) {
      const int inputs = shapes[p].inputs, kept = static_cast<int>(std::lround(density * inputs));
      std::vector<float> row_price(inputs, 0.0f);
      std::fill(row_price.begin(), row_price.begin() + kept, kAlways);
      std::shuffle(row_price.begin(), row_price.end(), random);
      CopyTo(const_cast<float*>(products[p].row_price), row_price);
      const float least = static_cast<float>(1.0 / (kDifference * kMeanScale * std::sqrt(kept)));
      auto* scales = reinterpret_cast<__half*>(const_cast<unsigned short*>(products[p].weight.scales));
      FillScales<<<1024, 256>>>(scales, Scales(p), least);
    }
    CHECK(cudaDeviceSynchronize());
  }

  std::vector<__half> Y(size_t p) const { return CopyFrom<__half>(products[p].y, shapes[p].outputs); }

  std::vector<Shape> shapes;
  int layers;
  std::vector<RowLinearArguments> products;
  float* price;
  double bytes = 0;  // of all weights
};

// The slow reference: y of each product from x, in float64, rounded to float16 between products.
std::vector<std::vector<__half>> Reference(const Chain& chain) {
  std::vector<std::vector<__half>> all;
  auto x = CopyFrom<__half>(chain.products[0].x, chain.shapes[0].inputs);
  const float price = CopyFrom<float>(chain.price, 1)[0];
  for (size_t p = 0; p < chain.shapes.size(); ++p) {
    const auto [inputs, outputs] = chain.shapes[p];
    const RowLinearArguments& made = chain.products[p];
    const size_t bytes = static_cast<size_t>(inputs) * outputs / 2;
    const auto codes = CopyFrom<unsigned char>(made.weight.weights, bytes);
    const auto zero_points = CopyFrom<unsigned char>(made.weight.zero_points, bytes / kGroup);
    const auto scales = CopyFrom<__half>(made.weight.scales, chain.Scales(p));
    const auto row_price = CopyFrom<float>(made.row_price, inputs);
    const auto number = [](const std::vector<unsigned char>& packed, size_t at) { return packed[at / 2] >> at % 2 * 4 & 15; };
    std::vector<double> sums(outputs, 0.0);
    for (int row = 0; row < inputs; ++row) {
      const float value = __half2float(x[row]);
      if (value * value * row_price[row] < price) continue;
      for (int column = 0; column < outputs; ++column) {
        const size_t at = static_cast<size_t>(row) * outputs + column;
        sums[column] += static_cast<double>(value) * (number(codes, at) - number(zero_points, at / kGroup)) *
                        __half2float(scales[at / kGroup]);
      }
    }
    x.clear();
    for (const double sum : sums) x.push_back(__float2half(static_cast<float>(sum)));
    all.push_back(x);
  }
  return all;
}

// The largest error, relative to the largest value. It ends the program where that is too large or values are not alive.
double Compare(const std::string& what, const std::vector<__half>& found, const std::vector<__half>& wanted) {
  double error = 0.0, largest = 0.0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::fabs(double{__half2float(found[i])} - __half2float(wanted[i]));
    error = difference <= error ? error : difference;  // NaN stays
    largest = std::max(largest, std::fabs(double{__half2float(wanted[i])}));
  }
  if (!(error <= kLargestError * largest) || !(largest > 0.1 && largest < 1000.0)) {
    std::fprintf(stderr, "%s: an error of %.2e where the largest value is %.2e, so nothing is timed\n", what.c_str(), error,
                 largest);
    std::exit(1);
  }
  return error / largest;
}

struct Times {
  float median, least, most;  // microseconds
};

// Capture `work` in a graph, and time its replays.
template <class Work>
Times TimeReplays(cudaStream_t stream, const Work& work) {
  cudaGraph_t graph;
  cudaGraphExec_t replayed;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  work();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&replayed, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kWarmUps + kReplays; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(replayed, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmUps) times.push_back(1e3f * ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaGraphExecDestroy(replayed));
  CHECK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

// Today's way: a launch for each product, of the kernel and with the blocks that the host chooses (row_product_cuda.cc).
class Launches {
 public:
  Launches(const Chain& chain, int multiprocessors) : chain_(chain) {
    static const KernelCase made[] = {KERNELS};
    for (const KernelCase& each : made) AllowLaunches(each);
    for (const Shape& shape : chain.shapes) {
      const int slices = shape.outputs / kSliceColumns;
      const int blocks = slices * RanksOf(made[1], shape.inputs, slices);
      const double busy = blocks / (((blocks - 1) / multiprocessors + 1.0) * multiprocessors);
      const KernelCase* chosen = &made[busy >= 0.7];
      if (std::size(made) > 2) {
        const tda::WholeShares shares = WholeSharesOf(made[2], shape.inputs, shape.outputs);
        if (shares.Pays(TDA_BITS, busy)) chosen = &made[2];
      }
      chosen_.push_back({chosen, ShapeOf(*chosen, shape.inputs, shape.outputs)});
    }
  }

  void Run(cudaStream_t stream) const {
    for (size_t p = 0; p < chosen_.size(); ++p) Run(p, stream);
  }
  void Run(size_t p, cudaStream_t stream) const {
    LaunchProduct(*chosen_[p].made, chosen_[p].launch, stream, chain_.products[p]);
  }

  std::string Kernels(size_t count) const {
    std::string text;
    for (size_t p = 0; p < count; ++p) {
      const Choice& choice = chosen_[p];
      text += (p == 0 ? "" : ", ") + std::string(choice.made->name) + " x " + std::to_string(choice.launch.slices) + " x " +
              std::to_string(choice.launch.ranks);
    }
    return text;
  }

 private:
  struct Choice {
    const KernelCase* made;
    LaunchShape launch;
  };

  const Chain& chain_;
  std::vector<Choice> chosen_;
};
