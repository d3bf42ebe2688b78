// Rows of codes of 4 or 8 bits (codes.h): element = (code - zero point) * scale, both of the group that a column is of.

static __device__ __forceinline__ void HalvesToFloats(unsigned halves, float& low, float& high) {
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n"
      "}"
      : "=f"(low), "=f"(high)
      : "r"(halves));
}

// Twice in a word, as float16: what is subtracted from 1024 + a code, and added to 64 + a code.
struct ZeroHalves {
  unsigned subtracted, added;

  __device__ __forceinline__ explicit ZeroHalves(unsigned zero_point) {
    const unsigned both = zero_point * 0x10001u;
    subtracted = 0x64006400u + both;     // 1024 + zero point
    added = 0xd400d400u + (both << 4);  // -(64 + zero point)
  }
};

// Return the differences of the codes k and k + 4 of a word from a zero point, as float16. Bits of a code below the
// exponent of 1024 are the number 1024 + c, or 1024 + 16 c: two codes at once are one instruction away, a second one
// gives their differences, and all of it is exact.
template <int k>
static __device__ __forceinline__ unsigned Differences(unsigned word, const ZeroHalves& zero) {
  unsigned codes, differences;
  const unsigned shifted = k < 2 ? word : word >> 8;
  if constexpr (k % 2 == 0) {
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(codes) : "r"(shifted));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(differences) : "r"(codes), "r"(zero.subtracted));
  } else {
    asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(codes) : "r"(shifted));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(differences) : "r"(codes), "r"(0x2c002c00u), "r"(zero.added));
  }
  return differences;
}

// Write the differences of a word's eight codes of four bits from a zero point.
static __device__ __forceinline__ void FourBitsToFloats(unsigned word, const ZeroHalves& zero, float* values) {
  HalvesToFloats(Differences<0>(word, zero), values[0], values[4]);
  HalvesToFloats(Differences<1>(word, zero), values[1], values[5]);
  HalvesToFloats(Differences<2>(word, zero), values[2], values[6]);
  HalvesToFloats(Differences<3>(word, zero), values[3], values[7]);
}

// The same of four codes of eight bits, by way of 2^23 + a code.
static __device__ __forceinline__ void EightBitsToFloats(unsigned word, unsigned zero_point, float* values) {
  const float zero = __uint_as_float(0x4b000000u + zero_point);
#pragma unroll
  for (int k = 0; k < 4; ++k) values[k] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + k)) - zero;
}

// A thread's load: words of codes of one group, the group's scale, and the byte that holds its zero point.
template <int kBits, int kWords>
struct CodePack {
  static constexpr bool kScale = true;
  static constexpr bool kHalfSums = kBits == 4 && !TDA_BF16;  // bfloat16 may be larger than any float16
  static constexpr int kPerWord = 32 / kBits;

  __device__ __forceinline__ void ToFloats(float* values) const {
    const ZeroHalves halves(ZeroPoint());
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kBits == 4) {
        FourBitsToFloats(words[w], halves, values + w * kPerWord);
      } else {
        EightBitsToFloats(words[w], ZeroPoint(), values + w * kPerWord);
      }
    }
  }

  __device__ __forceinline__ float Scale() const { return HalfToFloat(scale); }

  // Add value times what this stands for: halves[4 w + k] is of the codes k and k + 4 of word w.
  __device__ __forceinline__ void AddHalves(float value, unsigned* halves) const {
    const ZeroHalves zero(ZeroPoint());
    unsigned factor;
    asm("{\n"
        ".reg .b16 half;\n"
        "cvt.rn.f16.f32 half, %1;\n"
        "mov.b32 %0, {half, half};\n"
        "}"
        : "=r"(factor)
        : "f"(value * Scale()));
    const auto add = [&](unsigned differences, unsigned& sum) {
      asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(differences), "r"(factor));
    };
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      add(Differences<0>(words[w], zero), halves[4 * w]);
      add(Differences<1>(words[w], zero), halves[4 * w + 1]);
      add(Differences<2>(words[w], zero), halves[4 * w + 2]);
      add(Differences<3>(words[w], zero), halves[4 * w + 3]);
    }
  }

  __device__ __forceinline__ unsigned ZeroPoint() const { return zero_byte >> zero_shift & ((1u << kBits) - 1); }

  unsigned words[kWords];
  unsigned short scale;
  unsigned char zero_byte;
  int zero_shift;
};

// One code.
template <int kBits>
struct CodePack<kBits, 0> {
  static constexpr bool kScale = true, kHalfSums = false;

  __device__ __forceinline__ void ToFloats(float* values) const {
    constexpr unsigned kMask = (1u << kBits) - 1;
    values[0] = static_cast<float>(static_cast<int>(code_byte >> code_shift & kMask) -
                                   static_cast<int>(zero_byte >> zero_shift & kMask));
  }

  __device__ __forceinline__ float Scale() const { return HalfToFloat(scale); }

  unsigned short scale;
  unsigned char code_byte, zero_byte;
  int code_shift, zero_shift;
};

// Load words of codes, as LoadWeights does.
template <int kWords>
static __device__ __forceinline__ void LoadWords(const void* address, unsigned (&words)[kWords]) {
  if constexpr (kWords == 4) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(address));
  } else if constexpr (kWords == 2) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(address));
  } else {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(address));
  }
}

// Load words of codes where they are wanted, as LoadWeightsIf does.
template <int kWords>
static __device__ __forceinline__ void LoadWordsIf(bool wanted, const void* address, unsigned (&words)[kWords]) {
  if constexpr (kWords == 4) {
    asm("{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %5, 0;\n"
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(address), "r"(static_cast<int>(wanted)));
  } else if constexpr (kWords == 2) {
    asm("{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %3, 0;\n"
        "mov.u32 %0, 0; mov.u32 %1, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
        "}"
        : "=&r"(words[0]), "=&r"(words[1])
        : "l"(address), "r"(static_cast<int>(wanted)));
  } else {
    asm("{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %2, 0;\n"
        "mov.u32 %0, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.u32 %0, [%1];\n"
        "}"
        : "=&r"(words[0])
        : "l"(address), "r"(static_cast<int>(wanted)));
  }
}

// Copy 16 bytes to an address of shared memory. CommitCopies and WaitForCopies (row_sums.cuh) tell the thread that copied
// when they are there; other lanes read them after a __syncwarp.
static __device__ __forceinline__ void StartCopy(unsigned place, const void* address) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(address) : "memory");
#endif
}

static __device__ __forceinline__ void ReadCopy(unsigned place, unsigned (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(place)
               : "memory");
}

// kWords words of codes a load, all of one group: a row begins where such a load may, and has a whole number of them. Of
// 0 words, one code.
template <int kBits, int kWords>
struct CodeFormat {
  static constexpr int kWidth = kWords == 0 ? 1 : kWords * 32 / kBits;
  static constexpr int kLoads = 8;
  static constexpr int kRowLoads = kWords == 4 ? 4 : 8;
  // Where a thread loads less, registers hold enough rows, and the ring was slower.
  static constexpr RowsBy kRowsBy =
      __CUDA_ARCH__ >= 800 && kBits == 4 && kWords == 4 ? RowsBy::kRing : RowsBy::kRegisters;
  static constexpr int kRingRows = 8, kRingWords = kWords;
  using Lanes = LanesInOrder<kWidth>;

  using Weights = CodePack<kBits, kWords>;

  struct Row {
    const unsigned char* codes;
    const unsigned short* scales;
    const unsigned char* zero_points;
    int group_shift;

    __device__ __forceinline__ Weights Load(int column, int offset = 0) const { return LoadIf(true, column, offset); }
    __device__ __forceinline__ Weights LoadIf(bool wanted, int column, int offset = 0) const {
      Weights pack;
      const int at = column + offset;
      const int group = at >> group_shift;
      if constexpr (kWords > 0) {
        LoadWordsIf<kWords>(wanted, codes + at * kBits / 8, pack.words);
      } else {
        pack.code_byte = wanted ? __ldg(codes + at * kBits / 8) : 0;
        pack.code_shift = at * kBits % 8;
      }
      pack.scale = wanted ? __ldg(scales + group) : 0;
      pack.zero_byte = wanted ? __ldg(zero_points + group * kBits / 8) : 0;
      pack.zero_shift = group * kBits % 8;
      return pack;
    }
  };

  struct Column {
    const unsigned char* codes;
    const unsigned short* scales;
    const unsigned char* zero_points;
    int row_bytes, groups, zero_bytes;
    int code_shift, zero_shift;

    __device__ __forceinline__ Weights Load(int row) const {
      Weights pack;
      const unsigned char* first = codes + Product(row, row_bytes);
      if constexpr (kWords > 0) {
        LoadWords<kWords>(first, pack.words);
      } else {
        pack.code_byte = __ldg(first);
        pack.code_shift = code_shift;
      }
      pack.scale = __ldg(scales + Product(row, groups));
      pack.zero_byte = __ldg(zero_points + Product(row, zero_bytes));
      pack.zero_shift = zero_shift;
      return pack;
    }

    // The same in two parts: the codes go to `place` meanwhile.
    __device__ __forceinline__ Weights Start(int row, unsigned place) const {
      Weights pack;
      StartCopy(place, codes + Product(row, row_bytes));
      pack.scale = __ldg(scales + Product(row, groups));
      pack.zero_byte = __ldg(zero_points + Product(row, zero_bytes));
      pack.zero_shift = zero_shift;
      return pack;
    }
    __device__ __forceinline__ void Finish(unsigned place, Weights& pack) const { ReadCopy(place, pack.words); }
  };

  __device__ __forceinline__ explicit CodeFormat(const StoredMatrix& matrix)
      : matrix(matrix),
        row_bytes((matrix.columns * kBits + 7) / 8),
        groups((matrix.columns + (1 << matrix.group_shift) - 1) >> matrix.group_shift),
        zero_bytes((groups * kBits + 7) / 8) {}

  __device__ __forceinline__ const unsigned char* Codes() const {
    return static_cast<const unsigned char*>(matrix.weights);
  }

  __device__ __forceinline__ Row At(int row) const {
    return {Codes() + Product(row, row_bytes), matrix.scales + Product(row, groups),
            matrix.zero_points + Product(row, zero_bytes), matrix.group_shift};
  }

  __device__ __forceinline__ Column From(int slice) const {
    const int column = LaneColumn<kWidth>(slice, matrix.columns);
    const int group = column >> matrix.group_shift;
    return {Codes() + column * kBits / 8,
            matrix.scales + group,
            matrix.zero_points + group * kBits / 8,
            row_bytes,
            groups,
            zero_bytes,
            column * kBits % 8,
            group * kBits % 8};
  }

  const StoredMatrix matrix;
  const int row_bytes, groups, zero_bytes;
};
