// What all device code shares: elements of 16 bits, wide loads, and the order of dependent launches.
//
// NVRTC compiles this for the user's GPU, so nothing is included. TDA_BF16 selects the element type.

constexpr int kWarp = 32;

typedef unsigned short Element;  // float16 or bfloat16, as bits

static __device__ __forceinline__ float HalfToFloat(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

static __device__ __forceinline__ float ToFloat(Element bits) {
#if TDA_BF16
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
#else
  return HalfToFloat(bits);
#endif
}

static __device__ __forceinline__ Element FromFloat(float value) {
  Element bits;
#if TDA_BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

// Elements that a thread loads at once: 8 (16 bytes) where rows allow it, otherwise 1.
template <int kWidth>
struct Pack;

template <>
struct Pack<8> {
  static constexpr bool kScale = false, kHalfSums = false;
  uint4 bits;

  __device__ __forceinline__ void ToFloats(float* values) const {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = ToFloat(static_cast<Element>(words[i] & 0xffffu));
      values[2 * i + 1] = ToFloat(static_cast<Element>(words[i] >> 16));
    }
  }
};

template <>
struct Pack<1> {
  static constexpr bool kScale = false, kHalfSums = false;
  Element bits;

  __device__ __forceinline__ void ToFloats(float* values) const { values[0] = ToFloat(bits); }
};

// Load weights. Each is read once, so it should evict nothing from the first-level cache.
template <int kWidth>
static __device__ __forceinline__ Pack<kWidth> LoadWeights(const Element* address) {
  Pack<kWidth> pack;
  if constexpr (kWidth == 8) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.bits.x), "=r"(pack.bits.y), "=r"(pack.bits.z), "=r"(pack.bits.w)
                 : "l"(address));
  } else {
    pack.bits = *address;
  }
  return pack;
}

// Load weights where `wanted`; otherwise nothing is read, and the pack is zero.
template <int kWidth>
static __device__ __forceinline__ Pack<kWidth> LoadWeightsIf(bool wanted, const Element* address) {
  Pack<kWidth> pack;
  if constexpr (kWidth == 8) {
    asm("{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %5, 0;\n"
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(pack.bits.x), "=&r"(pack.bits.y), "=&r"(pack.bits.z), "=&r"(pack.bits.w)
        : "l"(address), "r"(static_cast<int>(wanted)));
  } else {
    pack.bits = wanted ? *address : Element(0);
  }
  return pack;
}

// Load what an earlier kernel of the stream has written.
template <int kWidth>
static __device__ __forceinline__ Pack<kWidth> Load(const Element* address) {
  Pack<kWidth> pack;
  if constexpr (kWidth == 8) {
    pack.bits = *reinterpret_cast<const uint4*>(address);
  } else {
    pack.bits = *address;
  }
  return pack;
}

// Round and store what a thread has computed.
template <int kWidth>
static __device__ __forceinline__ void Store(Element* address, const float* values) {
  if constexpr (kWidth == 8) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = FromFloat(values[2 * i]) | static_cast<unsigned>(FromFloat(values[2 * i + 1])) << 16;
    }
    *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *address = FromFloat(values[0]);
  }
}

template <class Number>
static __device__ __forceinline__ Number WarpSum(Number value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// A kernel launched with the programmatic attribute starts before the previous kernel in the stream has ended. Nothing
// that an earlier kernel wrote may be read before this returns, unless a wrong value does no harm (PrefetchPart).
static __device__ __forceinline__ void WaitForEarlierKernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Memory whose size the host gives at the launch.
#ifndef TDA_DYNAMIC_MEMORY
#define TDA_DYNAMIC_MEMORY(name) extern __shared__ __align__(256) unsigned char name[]
#endif

// Return memory that a block shares, of a size that is known when this is compiled, or dynamic.
template <class Memory, bool kDynamic>
static __device__ __forceinline__ Memory& BlockMemory() {
  if constexpr (kDynamic) {
    TDA_DYNAMIC_MEMORY(memory);
    return *reinterpret_cast<Memory*>(memory);
  } else {
    __shared__ Memory memory;
    return memory;
  }
}

// Let the next kernel of the stream start where it fits. Call it only after WaitForEarlierKernels, so that memory that
// the next kernel reads before its own wait can only have been written by this kernel.
static __device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits for earlier kernels when it is first called, and then lets the next one start.
struct LaunchBarrier {
  mutable bool passed = false;

  __device__ __forceinline__ void operator()() const {
    if (passed) return;
    passed = true;
    WaitForEarlierKernels();
    LetNextKernelStart();
  }
};
