// Sums over rows, cut for different numbers of threads: they are right, tiles keep their rules, and no bit changes.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512BW__)
#define TDA_ONE_TARGET 16
#elif defined(__AVX2__)
#define TDA_ONE_TARGET 8
#else
#define TDA_ONE_TARGET 4
#endif

#include "row_sums_cpu.h"

namespace {

constexpr int kLanes = TDA_ONE_TARGET;
constexpr float kPrice = 0.4f;
uint32_t state = 1;

uint32_t Random() { return (state = state * 1664525u + 1013904223u) >> 8; }
float RandomFloat() { return static_cast<float>(Random() % 2001) / 1000.0f - 1.0f; }

// CodeFormat is made from tensors of ONNX Runtime; this has the same members, set by hand.
template <class Format>
struct Made {
  alignas(Format) unsigned char memory[sizeof(Format)] = {};
  Format& format = *reinterpret_cast<Format*>(memory);
};

int failures = 0;

void Fail(const char* what, int64_t inputs, int64_t outputs, int64_t threads) {
  std::printf("%s: %ld inputs, %ld outputs, %ld threads\n", what, static_cast<long>(inputs), static_cast<long>(outputs),
              static_cast<long>(threads));
  ++failures;
}

// Return y [tokens, columns] of x [tokens, inputs].
template <class Format>
std::vector<float> Sum(const Format& weight, const float* x, int64_t tokens, const std::vector<float>& prices,
                       int64_t threads) {
  const int64_t inputs = prices.size();
  const tda::RowChunks<Format> chunks(weight, inputs, threads);
  const int64_t stride = tda::WholeBlocks(weight.columns);
  std::vector<float> sums(tokens * chunks.count * stride), y(tokens * weight.columns);
  int64_t covered = 0;
  for (int64_t tile = 0; tile < chunks.tiles; ++tile) {
    const int64_t begin = chunks.FirstColumn(tile), end = chunks.FirstColumn(tile + 1);
    if (begin != covered || end <= begin || end - begin > Format::kTileColumns || begin % weight.TileUnit() != 0) {
      Fail("a tile is not where it may be", inputs, weight.columns, threads);
    }
    covered = end;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      tda::SumChunkOf<kLanes>(weight, {x, tokens, inputs, {prices.data(), kPrice}, chunks.FirstRow(chunk),
                                       chunks.FirstRow(chunk + 1), begin, end, sums.data() + chunk * stride + begin,
                                       chunks.count * stride});
    }
    for (int64_t t = 0; t < tokens; ++t) {
      tda::AddChunksOf<kLanes, Format>(sums.data() + t * chunks.count * stride + begin, chunks.count, stride, end - begin,
                                       nullptr, y.data() + t * weight.columns + begin);
    }
  }
  if (covered != weight.columns) Fail("columns are left", inputs, weight.columns, threads);
  return y;
}

// element(row, column) is a number of the matrix.
template <class Format, class Element>
void Compare(const Format& weight, int64_t inputs, const Element& element) {
  constexpr int64_t kTokens = 11;  // which share codes by eight, two and one
  std::vector<float> x(kTokens * inputs), prices(inputs);
  for (float& value : x) value = RandomFloat();
  for (float& value : prices) value = RandomFloat() + 1.0f;
  const std::vector<float> alone = Sum(weight, x.data(), 1, prices, 1);
  for (int64_t column = 0; column < weight.columns; ++column) {
    double expected = 0, size = 0;
    for (int64_t row = 0; row < inputs; ++row) {
      if (x[row] * x[row] * prices[row] < kPrice) continue;
      expected += x[row] * element(row, column);
      size += std::fabs(x[row] * element(row, column));
    }
    if (!(std::fabs(alone[column] - expected) <= 1e-5 * size + 1e-6)) Fail("a sum is wrong", inputs, weight.columns, 1);
  }
  const int64_t chunks = tda::RowChunks<Format>(weight, inputs, 1).count;
  for (const int64_t threads : {2, 3, 4, 6, 16, 96, 1000}) {
    const tda::RowChunks<Format> own(weight, inputs, threads);
    if (own.count != chunks) Fail("chunks depend on the threads", inputs, weight.columns, threads);
    const std::vector<float> y = Sum(weight, x.data(), 1, prices, threads);
    if (std::memcmp(y.data(), alone.data(), y.size() * sizeof(float)) != 0) {
      Fail("bits depend on the threads", inputs, weight.columns, threads);
    }
  }
  const std::vector<float> together = Sum(weight, x.data(), kTokens, prices, 3);
  for (int64_t t = 0; t < kTokens; ++t) {
    const std::vector<float> y = Sum(weight, x.data() + t * inputs, 1, prices, 1);
    if (std::memcmp(y.data(), together.data() + t * weight.columns, y.size() * sizeof(float)) != 0) {
      Fail("bits depend on other tokens", inputs, weight.columns, 3);
    }
  }
}

template <int kBits>
void CompareCodes(int64_t inputs, int64_t outputs, int group_shift) {
  const int64_t groups = ((outputs - 1) >> group_shift) + 1;
  const int64_t row_bytes = (outputs * kBits + 7) / 8, zero_bytes = (groups * kBits + 7) / 8;
  std::vector<uint8_t> codes(inputs * row_bytes), zeros(inputs * zero_bytes);
  std::vector<uint16_t> scales(inputs * groups);
  for (uint8_t& byte : codes) byte = Random();
  for (uint8_t& byte : zeros) byte = Random();
  for (uint16_t& scale : scales) scale = 0x2000 + Random() % 2048;  // 2^-7 to 2^-5
  Made<tda::LargestScales> made_largest;
  new (&made_largest.format.of_group) std::vector<float>(groups + 16, 1.0f / 32);
  made_largest.format.most = 1.0f / 32;
  Made<tda::CodeFormat<kBits>> made;
  tda::CodeFormat<kBits>& weight = made.format;
  weight.codes = codes.data();
  weight.scales = scales.data();
  weight.zeros = zeros.data();
  weight.rows = inputs;
  weight.columns = outputs;
  weight.row_bytes = row_bytes;
  weight.groups = groups;
  weight.zero_bytes = zero_bytes;
  weight.group_shift = group_shift;
  for (const bool bytes : {false, true}) {
    if (bytes && !tda::MultipliesBytesOf<kLanes, tda::CodeFormat<kBits>>()) continue;
    weight.largest = bytes ? &made_largest.format : nullptr;
    Compare(weight, inputs, [&](int64_t row, int64_t column) {
      const auto code_of = [](const uint8_t* bytes, int64_t at) {
        return kBits == 8 ? bytes[at] : bytes[at / 2] >> 4 * (at % 2) & 15;
      };
      const int64_t group = column >> group_shift;
      const double scale = tda::HalfToFloat(scales[row * groups + group]);
      return scale * (code_of(codes.data() + row * row_bytes, column) - code_of(zeros.data() + row * zero_bytes, group));
    });
  }
  using Floats = std::vector<float>;
  made_largest.format.of_group.~Floats();
}

}  // namespace

int main() {
  struct Size {
    int64_t inputs, outputs;
  };
  for (const Size size : {Size{576, 960}, {576, 576}, {1536, 576}, {576, 3072}, {109, 577}, {33, 1}, {700, 1037},
                          {96, 9000}, {3000, 2048}}) {
    const int64_t inputs = size.inputs, outputs = size.outputs;
    for (const int group_shift : {5, 6, 7}) {
      CompareCodes<4>(inputs, outputs, group_shift);
      CompareCodes<8>(inputs, outputs, group_shift);
    }
    std::vector<float> elements(inputs * outputs);
    for (float& element : elements) element = RandomFloat();
    Compare(tda::FloatFormat{elements.data(), outputs}, inputs,
            [&](int64_t row, int64_t column) -> double { return elements[row * outputs + column]; });
  }
  return failures > 0;
}
