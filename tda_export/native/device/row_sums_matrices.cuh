// AddRows of one token by tensor cores: a column's sum over 16 rows of code times factor is a row of a matrix product.
//
// Codes need almost no work. Transposed on their way out of shared memory, a register holds the same columns' codes of
// two neighbouring rows, and what a mask leaves of it are two float16: bits of a code below float16's exponent are the
// code times a power of two, exactly. So the sums of code * factor, and of zero point * factor, are as exact as tensor cores
// add in float32, where factor = value * scale is rounded to float16. Values are first multiplied by a power of two, so
// that the largest of a list is from 256 to 512: factors are neither too large for float16 nor, unless they count
// nothing beside others, too small.

// In bfloat16, factors would have too few bits.
#define TDA_HALF_CODES (TDA_BITS && !TDA_BF16 && __CUDA_ARCH__ >= 800)

#if TDA_HALF_CODES

// Codes in groups of 32, and slices of 256 columns; a row has a whole number of these.
template <int kBits, int kMatrices>
struct CodeMatrixFormat {
  static constexpr int kWidth = 8;  // sums of a lane
  static constexpr RowsBy kRowsBy = RowsBy::kMatrices;
  static constexpr int kBitsOfCode = kBits;
  static constexpr int kGroups = 8;  // of a slice
  static constexpr int kSliceBytes = kWarp * kWidth * kBits / 8, kZeroBytes = kGroups * kBits / 8;
  static constexpr int kSlots = kMatrices;  // of rows, that a warp has under way

  // With g = lane / 4 and c = lane % 4, a lane gets the sums of columns of groups 2 c and 2 c + 1.
  struct Lanes {
    static constexpr int kRun = 16 / kBits;  // codes of 16 bits
    static __device__ __forceinline__ int Column(int lane, int i) {
      return lane % 4 * 64 + i / kRun * (kRun * 8) + lane / 4 * kRun + i % kRun;
    }
  };

  struct Column {
    const unsigned char* codes;  // 16 bytes of a lane
    const unsigned char* scales;
    const unsigned char* zero_points;
    unsigned row_bytes, scale_bytes, zero_bytes;
  };

  __device__ __forceinline__ explicit CodeMatrixFormat(const StoredMatrix& matrix) : matrix(matrix) {}

  __device__ __forceinline__ Column From(int slice) const {
    const int lane = threadIdx.x % kWarp;
    return {static_cast<const unsigned char*>(matrix.weights) + slice * kBits / 8 + lane * 16 % kSliceBytes,
            reinterpret_cast<const unsigned char*>(matrix.scales + slice / 32),
            matrix.zero_points + slice / 32 * kBits / 8,
            static_cast<unsigned>(matrix.columns) * kBits / 8,
            static_cast<unsigned>(matrix.columns) / 16,
            static_cast<unsigned>(matrix.columns) / 32 * kBits / 8};
  }

  const StoredMatrix matrix;
};

// Load two or four matrices [8, 8] of 16 bits, transposed; lanes 8 i to 8 i + 7 say where the rows of matrix i are. A lane
// gets rows 2 c and 2 c + 1 of column g.
static __device__ __forceinline__ void LoadTransposed(unsigned place, HalfPair (&loaded)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(loaded[0]), "=r"(loaded[1])
               : "r"(place)
               : "memory");
}
static __device__ __forceinline__ void LoadTransposed(unsigned place, HalfPair (&loaded)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded[0]), "=r"(loaded[1]), "=r"(loaded[2]), "=r"(loaded[3])
               : "r"(place)
               : "memory");
}

// Return 16 ones for each that is not 0; NaN is not.
static __device__ __forceinline__ unsigned NonzeroMask(HalfPair pair) {
  unsigned mask;
  asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(0u));
  return mask;
}

template <int kBytes>
static __device__ __forceinline__ void StartSmallCopy(unsigned place, const void* address) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(address), "n"(kBytes) : "memory");
}

// Rows and values of one token in arrays of their own, so that values of neighbours are one load.
struct HalfRowList {
  int rows[kMostListed];
  alignas(4) unsigned short values[kMostListed];

  __device__ __forceinline__ void Put(int at, int row, const float (&value)[1]) {
    rows[at] = row;
    values[at] = static_cast<unsigned short>(ToHalves(value[0], 0.0f));
  }
};

// Sums of 16 rows at a time, which are a matrix in shared memory.
template <class Format>
struct MatrixSums {
  using Column = typename Format::Column;
  static constexpr int kBits = Format::kBitsOfCode, kRows = 16;
  static constexpr int kRun = Format::Lanes::kRun;  // codes in 16 bits
  static constexpr int kFraction = 10;              // bits of a float16
  static constexpr int kParts = kBits;              // of 16 times 16 bits of a row
  static constexpr int kLoads = Format::kSliceBytes / 16, kLoadRows = kWarp / kLoads;
  static_assert(Format::kSliceBytes % 128 == 0, "parts change places within 128 bytes");

  struct Slot {
    alignas(Format::kSliceBytes) unsigned char codes[kRows][Format::kSliceBytes];
    alignas(16) unsigned short scales[kRows][Format::kGroups];
    alignas(16) unsigned char zero_points[kRows][Format::kZeroBytes];
  };

  const Column& column;
  float (&sums)[1][Format::kWidth];

  static __device__ __forceinline__ unsigned Address(const void* place) {
    return static_cast<unsigned>(__cvta_generic_to_shared(place));
  }

  static __device__ __forceinline__ const unsigned char* At(const unsigned char* first, int row, unsigned row_bytes) {
    return first + static_cast<unsigned long long>(static_cast<unsigned>(row)) * row_bytes;
  }

  // Start to copy a matrix, whose row r is row_at(r). Parts of 16 bytes change places within 128, by row, so that neither
  // copies nor loads meet in a bank.
  template <class RowAt>
  __device__ __forceinline__ void Start(Slot& slot, const RowAt& row_at) const {
    const int lane = threadIdx.x % kWarp;
    const unsigned own = Address(slot.codes[lane / kLoads]) + (lane % kLoads ^ lane / kLoads) * 16;
    int rows[kRows / kLoadRows];
#pragma unroll
    for (int i = 0; i < kRows / kLoadRows; ++i) rows[i] = row_at(i * kLoadRows + lane / kLoads);
    const int r = lane % kRows, row = row_at(r);
#pragma unroll
    for (int i = 0; i < kRows / kLoadRows; ++i) {
      const unsigned place = (own ^ i * kLoadRows % 8 * 16) + i * kLoadRows * Format::kSliceBytes;
      StartCopy(place, At(column.codes, rows[i], column.row_bytes));
    }
    if (lane < kRows) {
      StartCopy(Address(slot.scales[r]), At(column.scales, row, column.scale_bytes));
    } else {
      StartSmallCopy<Format::kZeroBytes>(Address(slot.zero_points[r]), At(column.zero_points, row, column.zero_bytes));
    }
    CommitCopies();
  }

  // Return the exponent, as float16 has it, of the power of two that values are multiplied with: 2^8 to 2^9 for the
  // largest, of this magnitude, if float16 has such a power, and 1 where it is not finite.
  static __device__ __forceinline__ unsigned PowerOf(unsigned largest) {
    constexpr unsigned kMostExponent = 30, kOne = 15, kWanted = kOne + 8;
    const unsigned exponent = largest >> kFraction;
    return exponent > kMostExponent ? kOne : min(kWanted + kOne - exponent, kMostExponent);
  }

  // Return 2^24, which a float16 of bit 0 alone lacks to 1, divided by the power.
  static __device__ __forceinline__ float FullCode(unsigned power) {
    return __uint_as_float((127 + 24 + 15 - power) << 23);
  }

  // Add the products of a matrix: element (unit, group) of products[k] is of code k in 16 bits. `power`: of values, float16.
  __device__ __forceinline__ void AddMatrix(const Slot& slot, const unsigned short* list_values, unsigned power,
                                            float (&products)[kRun][4], float (&zero_products)[4]) const {
    constexpr unsigned kLowCodes = kBits == 4 ? 0x000f000fu : 0x00ff00ffu, kHighCodes = 0x00f000f0u;
    const int lane = threadIdx.x % kWarp, group = lane / 4, c = lane % 4;
    HalfPair scales[2], factors[2], zero_points[4] = {};
    LoadTransposed(Address(slot.scales[lane % kRows]), scales);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const HalfPair values = reinterpret_cast<const HalfPair*>(list_values)[c + 4 * i];
      // A row that is not needed may have any scale.
      factors[i] = ProductOf(ProductOf(values, power * 0x10001u), scales[i]) & NonzeroMask(values);
      const unsigned char* zeros = slot.zero_points[2 * c + 8 * i] + group * kBits / 8;
      const unsigned both = zeros[0] | zeros[Format::kZeroBytes] << 16;
      zero_points[2 * i] = both >> group * kBits % 8 & kLowCodes;
    }
    AddProduct(zero_products, zero_points, factors);
    const unsigned place = Address(slot.codes[lane % 8 + lane / 16 * 8]) + (lane / 8 % 2 ^ lane % 8) * 16;
    HalfPair loaded[2][4];
    LoadTransposed(place, loaded[0]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const HalfPair(&codes)[4] = loaded[part % 2];
      if (part + 1 < kParts) LoadTransposed(place ^ (part + 1) * 32, loaded[(part + 1) % 2]);
      const unsigned own = (kBits == 4 ? group / 2 : group) == part ? ~0u : 0u;
      const HalfPair own_factors[2] = {factors[0] & own, factors[1] & own};
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        HalfPair differences[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const unsigned shifted = k * kBits < 8 ? codes[i] : codes[i] >> 8;
          differences[i] = shifted & (k * kBits % 8 ? kHighCodes : kLowCodes);
        }
        AddProduct(products[k], differences, own_factors);
      }
    }
  }

  // `full`: what a code in the lowest bits of a float16 lacks to its value, and its product to the sum.
  __device__ __forceinline__ void Finish(const float (&products)[kRun][4], const float (&zero_products)[4],
                                         float full) const {
    const int c = threadIdx.x % 4;
    // Of zero points only those of a group with its own factors count: the diagonal.
    const float zeros[2] = {__shfl_sync(0xffffffffu, zero_products[0], 9 * c) * full,
                            __shfl_sync(0xffffffffu, zero_products[1], 9 * c + 4) * full};
#pragma unroll
    for (int i = 0; i < Format::kWidth; ++i) {
      const int run = i / kRun, k = i % kRun;
      // Of four bits a unit is of the group of its half; of eight, units of one group are in both halves.
      const int odd = kBits == 4 ? run : run / 2, at = kBits == 4 ? 3 * run : run / 2 + run % 2 * 2;
      sums[0][i] += products[k][at] * (k * kBits % 8 ? full / 16 : full) - zeros[odd];
    }
  }
};

// By way of matrices: 16 rows of the list at a time, in shared memory, while the next ones are under way.
template <class Format>
struct MatrixReader {
  using Sums = MatrixSums<Format>;
  using Column = typename Format::Column;
  using List = HalfRowList;
  static constexpr int kRows = Sums::kRows, kSlots = Format::kSlots;
  static constexpr int kEarlySlots = kSlots < 2 ? kSlots : 2, kEarly = kRows * kEarlySlots;
  static constexpr bool kEarlyListed = true;
  static_assert(kEarly <= kWarp, "early rows are first candidates of a lane");

  struct Room {
    typename Sums::Slot slots[kSlots];
  };

  // What the host asks for (row_product_cuda.cc).
  static_assert(sizeof(List) == 768 && sizeof(Room) == kSlots * (Sums::kBits == 4 ? 2432 : 4608), "the host knows these");

  const Column& column;
  WarpRows<1, Format>& shared;
  float (&sums)[1][Format::kWidth];

  __device__ __forceinline__ void Begin(int row) const {
    const Sums matrices = {column, sums};
#pragma unroll
    for (int s = 0; s < kEarlySlots; ++s) {
      matrices.Start(shared.room.slots[s], [&](int r) { return max(__shfl_sync(0xffffffffu, row, s * kRows + r), 0); });
    }
  }

  __device__ __forceinline__ void Add(bool begun, const float (&)[1], int listed_rows) const {
    const int lane = threadIdx.x % kWarp;
    const Sums matrices = {column, sums};
    List& list = shared.list;
    const auto start = [&](int s, int at) {
      if (at < listed_rows) {
        matrices.Start(shared.room.slots[s], [&](int r) { return list.rows[at + r]; });
      } else {
        CommitCopies();
      }
    };
    // The last row fills the last matrix up, times 0.
    if (listed_rows + lane < (listed_rows + kRows - 1) / kRows * kRows) {
      list.Put(listed_rows + lane, list.rows[listed_rows - 1], {0.0f});
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (!begun || s >= kEarlySlots) start(s, s * kRows);
    }
    const unsigned power = Sums::PowerOf(Largest(listed_rows));
    float products[Sums::kRun][4] = {}, zero_products[4] = {};
#pragma unroll 1
    for (int at = 0; at < listed_rows; at += kSlots * kRows) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const int first = at + s * kRows;
        if (first >= listed_rows) break;
        WaitForCopies<kSlots - 1>();
        __syncwarp();
        matrices.AddMatrix(shared.room.slots[s], list.values + first, power << Sums::kFraction, products, zero_products);
        __syncwarp();
        start(s, first + kSlots * kRows);
      }
    }
    matrices.Finish(products, zero_products, Sums::FullCode(power));
  }

  // Return the largest magnitude of the list's values.
  __device__ __forceinline__ unsigned Largest(int listed_rows) const {
    constexpr unsigned kMagnitude = 0x7fff;
    unsigned largest = 0;
    for (int i = threadIdx.x % kWarp; i < listed_rows; i += kWarp) {
      largest = max(largest, static_cast<unsigned>(shared.list.values[i]) & kMagnitude);
    }
    return __reduce_max_sync(0xffffffffu, largest);
  }
};

template <class Format>
struct ReaderChoice<RowsBy::kMatrices, 1, Format> {
  using Type = MatrixReader<Format>;
};

#endif
