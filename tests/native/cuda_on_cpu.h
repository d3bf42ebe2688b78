// Device code on the CPU, one cluster of blocks at a time: a block is a thread, and a thread is a fiber, which gives way to
// others at barriers and wherever a warp exchanges values. Slow, and only for tests. `cuda_on_cpu.py` replaces the
// instructions that device code writes in PTX with the functions at the end.
#pragma once

#include <pthread.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
To Reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostNaps = 60000;  // of 100 microseconds or more

struct Fiber {
  ucontext_t context;
  bool ended = false;
  unsigned cluster_waits = 0;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};
struct Barrier {
  unsigned waiting = 0, generation = 0;
};
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
// Of a block.
inline thread_local ucontext_t scheduler;
inline thread_local std::vector<Fiber> fibers;
inline thread_local unsigned current = 0;
inline thread_local Index block;
inline thread_local bool all_wait_for_blocks;
inline thread_local Barrier of_block;
inline thread_local std::vector<Barrier> of_warps;
constexpr unsigned kWords = 6;
inline thread_local std::vector<uint32_t> exchanged;  // kWords for each thread

// Of all blocks.
inline Index grid;
inline std::function<void()> kernel;
inline std::vector<char*> shared_memories;  // of the blocks of a cluster, by rank
inline std::atomic<unsigned> arrived_in_cluster;

// `to_blocks`: the thread waits for another block of its cluster.
inline void GiveWay(bool to_blocks = false) {
  all_wait_for_blocks = all_wait_for_blocks && to_blocks;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void Arrive(Barrier& barrier, unsigned members) {
  const unsigned generation = barrier.generation;
  if (++barrier.waiting == members) {
    barrier.waiting = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) GiveWay();
}

// Show words to the other threads of the warp, and call read(word(lane, number)).
template <class Read>
auto Exchange(std::initializer_list<uint32_t> words, const Read& read) {
  Barrier& barrier = of_warps[current / kWarp];
  const unsigned first = current / kWarp * kWarp;
  unsigned number = 0;
  for (uint32_t word : words) exchanged[current * kWords + number++] = word;
  Arrive(barrier, kWarp);
  const auto result = read([&](unsigned lane, unsigned word) { return exchanged[(first + lane) * kWords + word]; });
  Arrive(barrier, kWarp);
  return result;
}

inline void Enter() {
  kernel();
  fibers[current].ended = true;
  GiveWay();
}

inline void RunBlock(unsigned threads) {
  fibers.resize(threads);
  exchanged.assign(threads * kWords, 0);
  of_warps.assign(threads / kWarp, {});
  of_block = {};
  for (Fiber& fiber : fibers) {
    fiber.ended = false;
    fiber.cluster_waits = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, Enter, 0);
  }
  unsigned naps = 0;
  for (bool running = true; running;) {
    running = false;
    all_wait_for_blocks = true;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].ended) continue;
      swapcontext(&scheduler, &fibers[current].context);
      running = running || !fibers[current].ended;
    }
    if (!running || !all_wait_for_blocks) {
      naps = 0;
      continue;
    }
    if (++naps == kMostNaps) {
      std::fputs("a block waits for others of its cluster for too long\n", stderr);
      std::abort();
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

// Where the block's shared memory begins: its variables lie at the same distances from here in every block.
inline thread_local char shared_memory;

// Run the blocks of a rank, each together with those of the other ranks.
inline void RunRank(unsigned rank, unsigned threads, pthread_barrier_t* together) {
  const unsigned ranks = shared_memories.size();
  shared_memories[rank] = &shared_memory;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = rank; x < grid.x; x += ranks) {
        block = {x, y, z};
        pthread_barrier_wait(together);
        if (rank == 0) arrived_in_cluster = 0;
        pthread_barrier_wait(together);
        RunBlock(threads);
      }
    }
  }
}

// Every `cluster` blocks along x form a cluster.
inline void Launch(Index blocks, unsigned cluster, unsigned threads, std::function<void()> work) {
  kernel = std::move(work);
  grid = blocks;
  shared_memories.assign(cluster, nullptr);
  pthread_barrier_t together;
  pthread_barrier_init(&together, nullptr, cluster);
  std::vector<std::thread> others;
  for (unsigned rank = 1; rank < cluster; ++rank) others.emplace_back(RunRank, rank, threads, &together);
  RunRank(0, threads, &together);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&together);
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return current; }
  } x;
};

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;
#define blockIdx emulator::block
#define gridDim emulator::grid
#define blockDim emulator::Index{static_cast<unsigned>(emulator::fibers.size()), 1, 1}

inline void __syncwarp() { emulator::Arrive(emulator::of_warps[emulator::current / emulator::kWarp], emulator::kWarp); }
inline void __threadfence() {}
inline void __syncthreads() { emulator::Arrive(emulator::of_block, emulator::fibers.size()); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::Exchange({Reinterpret<uint32_t>(value)}, [&](const auto& word) {
    return Reinterpret<T>(word(emulator::current % emulator::kWarp ^ mask, 0));
  });
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::Exchange({Reinterpret<uint32_t>(value)}, [&](const auto& word) { return Reinterpret<T>(word(lane, 0)); });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulator::Exchange({vote}, [&](const auto& word) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < emulator::kWarp; ++lane) votes |= word(lane, 0) << lane;
    return votes;
  });
}
inline unsigned atomicAdd(unsigned* place, unsigned value) {
  const unsigned before = *place;
  *place += value;
  return before;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __int_as_float(int bits) { return Reinterpret<float>(bits); }
inline float __uint_as_float(unsigned bits) { return Reinterpret<float>(bits); }
inline unsigned __float_as_uint(float value) { return Reinterpret<unsigned>(value); }
inline float __log2f(float value) { return std::log2(value); }
inline float __expf(float value) { return std::exp(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }

// PTX

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
