// Device code on the CPU, one cluster of blocks at a time: a block is a thread, and a thread is a fiber, which gives way to
// others at barriers and wherever a warp exchanges values. Slow, and only for tests. `cuda_on_cpu.py` replaces the
// instructions that device code writes in PTX with the functions of `ptx_on_cpu.h`.
#pragma once

#include <pthread.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
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
#define TDA_DYNAMIC_MEMORY(name) static thread_local __align__(256) unsigned char name[160 << 10]

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
  ucontext_t start;
  jmp_buf place;  // where it gave way
  bool started = false, ended = false;
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
inline thread_local jmp_buf scheduler;
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
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

// Run a fiber until it gives way. Jumps, unlike swapcontext, make no system call.
inline void Resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
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
    fiber.started = fiber.ended = false;
    fiber.cluster_waits = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, Enter, 0);
  }
  unsigned naps = 0;
  for (bool running = true; running;) {
    running = false;
    all_wait_for_blocks = true;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].ended) continue;
      Resume(fibers[current]);
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

// Where the block's shared memory begins: its variables lie at the same distances from here in every block, aligned as they
// are themselves.
alignas(256) inline thread_local char shared_memory;

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
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulator::Exchange({value}, [&](const auto& word) {
    unsigned largest = 0;
    for (unsigned lane = 0; lane < emulator::kWarp; ++lane) largest = std::max(largest, word(lane, 0));
    return largest;
  });
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  return emulator::Exchange({value}, [&](const auto& word) {
    unsigned sum = 0;
    for (unsigned lane = 0; lane < emulator::kWarp; ++lane) sum += word(lane, 0);
    return sum;
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
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
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

#include "ptx_on_cpu.h"
