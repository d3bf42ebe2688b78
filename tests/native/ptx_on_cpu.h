// What PTX instructions do, for cuda_on_cpu.h.
#pragma once

inline float HalfOf(unsigned bits) {
  const unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
  if (exponent == 31) value = fraction ? std::nanf("") : INFINITY;
  return bits & 0x8000 ? -value : value;
}
inline unsigned short ToHalf(float value) {
  const unsigned sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < std::ldexp(1.0f, -14)) return sign | static_cast<unsigned>(std::rint(std::ldexp(magnitude, 24)));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // 0.5 to 1
  // A fraction that is rounded up to 2048 carries into the exponent.
  return sign | static_cast<unsigned>((exponent + 14) * 1024 + std::rint(fraction * 2048.0f) - 1024);
}
inline unsigned short ToBfloat16(float value) {
  const uint32_t bits = Reinterpret<uint32_t>(value);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned Halves(float low, float high) { return ToHalf(low) | static_cast<unsigned>(ToHalf(high)) << 16; }
inline unsigned AddHalves(unsigned a, unsigned b) {
  return Halves(HalfOf(a & 0xffff) + HalfOf(b & 0xffff), HalfOf(a >> 16) + HalfOf(b >> 16));
}

inline unsigned FmaHalves(unsigned a, unsigned b, unsigned c) {
  const auto fma = [&](int shift) {
    const auto half = [&](unsigned pair) { return HalfOf(pair >> shift & 0xffff); };
    return static_cast<float>(double{half(a)} * half(b) + half(c));  // a double holds all but the rarest sums exactly
  };
  return Halves(fma(0), fma(16));
}

// Addresses of shared memory have 32 bits: distances from `shared_memory`, below 1 + the rank whose memory it is; 0 is the
// block's own.
constexpr unsigned kDistanceBits = 24, kMiddle = 1u << (kDistanceBits - 1);
inline unsigned __cvta_generic_to_shared(const void* place) {
  return static_cast<unsigned>(static_cast<const char*>(place) - &emulator::shared_memory) + kMiddle;
}
inline unsigned AtRankOf(unsigned own, unsigned rank) {
  return own % (1u << kDistanceBits) | (rank + 1) << kDistanceBits;
}
inline char* SharedPlace(unsigned address) {
  const unsigned rank = address >> kDistanceBits;
  char* memory = rank == 0 ? &emulator::shared_memory : emulator::shared_memories.at(rank - 1);
  return memory + address % (1u << kDistanceBits) - kMiddle;
}

// barrier.cluster: every thread arrives once for each time that it waits.
inline void ArriveInCluster() { ++emulator::arrived_in_cluster; }
inline void WaitForCluster() {
  const unsigned threads = emulator::fibers.size() * emulator::shared_memories.size();
  const unsigned all = ++emulator::fibers[emulator::current].cluster_waits * threads;
  while (emulator::arrived_in_cluster < all) emulator::GiveWay(true);
}

// mbarrier, for one phase: what is still to come until it opens.
struct ToCome {
  int arrivals, bytes;
};
inline std::mutex barriers;
template <class Change>
void ChangeBarrier(unsigned address, const Change& change) {
  const std::lock_guard<std::mutex> lock(barriers);
  change(*reinterpret_cast<ToCome*>(SharedPlace(address)));
}
inline void InitBarrier(unsigned address) {
  ChangeBarrier(address, [](ToCome& barrier) { barrier = {1, 0}; });
}
inline void ArriveAndExpect(unsigned address, int bytes) {
  ChangeBarrier(address, [&](ToCome& barrier) { barrier = {barrier.arrivals - 1, barrier.bytes + bytes}; });
}
inline bool HasOpened(unsigned address) {
  bool opened;
  ChangeBarrier(address, [&](ToCome& barrier) { opened = barrier.arrivals == 0 && barrier.bytes == 0; });
  if (!opened) emulator::GiveWay(true);
  return opened;
}

// st.async: like the GPU, it takes only places that are aligned to what is sent.
template <int kCount>
void SendFloats(unsigned place, const float (&values)[kCount], unsigned barrier) {
  if (reinterpret_cast<uintptr_t>(SharedPlace(place)) % sizeof values) abort();
  std::memcpy(SharedPlace(place), values, sizeof values);
  ChangeBarrier(barrier, [](ToCome& there) { there.bytes -= sizeof values; });
}

// cp.async: a copy is made when its group is waited for and no earlier, so what does not wait reads what was there.
struct Copy {
  unsigned place;
  const void* address;
  unsigned bytes;
};
// By thread and group, the last one not yet committed.
inline thread_local std::vector<std::vector<std::vector<Copy>>> copies;
inline std::vector<std::vector<Copy>>& OwnCopies() {
  if (copies.size() < emulator::fibers.size()) copies.resize(emulator::fibers.size());
  auto& own = copies[emulator::current];
  if (own.empty()) own.emplace_back();
  return own;
}
inline void BeginCopy(unsigned place, const void* address, unsigned bytes) {
  OwnCopies().back().push_back({place, address, bytes});
}
inline void CommitGroup() { OwnCopies().emplace_back(); }
inline void WaitForGroups(size_t pending) {
  auto& own = OwnCopies();
  while (own.size() > pending + 1) {
    for (const Copy& copy : own.front()) std::memcpy(SharedPlace(copy.place), copy.address, copy.bytes);
    own.erase(own.begin());
  }
}

// movmatrix.sync.aligned.m8n8.trans.b16
inline unsigned Transpose(unsigned pair) {
  const unsigned lane = emulator::current % emulator::kWarp, row = lane / 4, column = lane % 4 * 2;
  return emulator::Exchange({pair}, [&](const auto& word) {
    const auto at = [&](unsigned r, unsigned c) { return word(r * 4 + c / 2, 0) >> 16 * (c % 2) & 0xffff; };
    return at(column, row) | at(column + 1, row) << 16;
  });
}

// ldmatrix.sync.aligned.m8n8.trans.shared.b16: lanes 8 i to 8 i + 7 say where the rows of matrix i are.
template <unsigned kMatrices>
void LoadMatrices(unsigned place, unsigned (&loaded)[kMatrices]) {
  const unsigned lane = emulator::current % emulator::kWarp, column = lane / 4, row = lane % 4 * 2;
  if (reinterpret_cast<uintptr_t>(SharedPlace(place)) % 16) abort();
  emulator::Exchange({place}, [&](const auto& word) {
    for (unsigned i = 0; i < kMatrices; ++i) {
      uint16_t pair[2];
      for (unsigned r = 0; r < 2; ++r) std::memcpy(&pair[r], SharedPlace(word(8 * i + row + r, 0)) + 2 * column, 2);
      loaded[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
    return 0;
  });
}

// set.neu.u32.f16x2, with zero
inline unsigned NonzeroHalves(unsigned pair) {
  return (HalfOf(pair & 0xffff) != 0.0f ? 0xffffu : 0u) | (HalfOf(pair >> 16) != 0.0f ? 0xffff0000u : 0u);
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
inline void MultiplyAdd(float* sum, const unsigned* a, const unsigned* b) {
  const unsigned lane = emulator::current % emulator::kWarp;
  emulator::Exchange({a[0], a[1], a[2], a[3], b[0], b[1]}, [&](const auto& word) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (unsigned k = 0; k < 16; ++k) {
        const unsigned pair = k % 8 / 2, shift = 16 * (k % 2);
        const unsigned of_a = word(row % 8 * 4 + pair, row / 8 + k / 8 * 2) >> shift & 0xffff;
        const unsigned of_b = word(column * 4 + pair, 4 + k / 8) >> shift & 0xffff;
        sum[i] += HalfOf(of_a) * HalfOf(of_b);
      }
    }
    return 0;
  });
}
