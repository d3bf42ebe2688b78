// Rows of codes of 4 or 8 bits (codes.h): element = (code - zero point) * scale, both of the group that a column is of.

// Write the differences of a word's eight codes of four bits from a zero point. 1024 + a code is a float16 whose lowest
// bits are the code, so that two codes at once are one instruction away, and their differences are exact.
static __device__ __forceinline__ void FourBitsToFloats(unsigned word, unsigned zero_point, float* values) {
  const unsigned both_zeros = (0x6400u + zero_point) * 0x10001u;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    unsigned codes;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(codes) : "r"(word >> (4 * k)));
    asm("{\n"
        ".reg .b32 differences;\n"
        ".reg .b16 low, high;\n"
        "sub.f16x2 differences, %2, %3;\n"
        "mov.b32 {low, high}, differences;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(values[k]), "=f"(values[k + 4])
        : "r"(codes), "r"(both_zeros));
  }
}

// The same of four codes of eight bits, by way of 2^23 + a code.
static __device__ __forceinline__ void EightBitsToFloats(unsigned word, unsigned zero_point, float* values) {
  const float zero = __uint_as_float(0x4b000000u + zero_point);
#pragma unroll
  for (int k = 0; k < 4; ++k) values[k] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + k)) - zero;
}

// What a thread loads at once: words of codes of one group, its scale, and the byte that holds its zero point.
template <int kBits, int kWords>
struct CodePack {
  static constexpr bool kScale = true;
  static constexpr int kPerWord = 32 / kBits;

  __device__ __forceinline__ void ToFloats(float* values) const {
    const unsigned zero_point = zero_byte >> zero_shift & ((1u << kBits) - 1);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kBits == 4) {
        FourBitsToFloats(words[w], zero_point, values + w * kPerWord);
      } else {
        EightBitsToFloats(words[w], zero_point, values + w * kPerWord);
      }
    }
  }

  __device__ __forceinline__ float Scale() const { return HalfToFloat(scale); }

  unsigned words[kWords];
  unsigned short scale;
  unsigned char zero_byte;
  int zero_shift;
};

// One code.
template <int kBits>
struct CodePack<kBits, 0> {
  static constexpr bool kScale = true;

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

// kWords words of codes a load, all of one group: a row begins where such a load may, and has a whole number of them. Of
// 0 words, one code.
template <int kBits, int kWords>
struct CodeFormat {
  static constexpr int kWidth = kWords == 0 ? 1 : kWords * 32 / kBits;
  static constexpr int kLoads = 8;

  struct Row {
    const unsigned char* codes;
    const unsigned short* scales;
    const unsigned char* zero_points;
    int group_shift;

    __device__ __forceinline__ CodePack<kBits, kWords> Load(int column, int offset = 0) const {
      return LoadIf(true, column, offset);
    }
    __device__ __forceinline__ CodePack<kBits, kWords> LoadIf(bool wanted, int column, int offset = 0) const {
      CodePack<kBits, kWords> pack;
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

  __device__ __forceinline__ explicit CodeFormat(const StoredMatrix& matrix)
      : matrix(matrix),
        row_bytes((matrix.columns * kBits + 7) / 8),
        groups((matrix.columns + (1 << matrix.group_shift) - 1) >> matrix.group_shift),
        zero_bytes((groups * kBits + 7) / 8) {}

  __device__ __forceinline__ Row At(int row) const {
    const size_t place = row;
    return {static_cast<const unsigned char*>(matrix.weights) + place * row_bytes, matrix.scales + place * groups,
            matrix.zero_points + place * zero_bytes, matrix.group_shift};
  }

  const StoredMatrix matrix;
  const int row_bytes, groups, zero_bytes;
};
