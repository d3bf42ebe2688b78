// A Format says how the rows of a weight matrix lie in memory. Kernels reach weights through one, and never by address:
//
//   kWidth                          columns of one load of a thread
//   kLoads                          loads that a warp of Products has under way at once
//   kRowLoads                       and of AddRows, each of one row: an even number that divides a warp's lanes
//   kRowsBy                         how a warp of AddRows reads the rows of one token (row_sums.cuh)
//   kRingRows                       rows that it has under way by a ring
//   kRingWords                      words of a thread for each of them
//   Lanes                           which columns a lane of AddRows sums
//
// CodeMatrixFormat (row_sums_matrices.cuh), for MatrixReader alone, has other members beside kWidth, kRowsBy, Lanes and From.
//
//   Format(matrix)
//   Row At(row)                     a row, with loads of the kWidth columns from column + offset on, as a pack; offset is
//                                   a constant, so that loads side by side share an address
//     Load(column, offset)          read
//     LoadIf(wanted, column, offset)  read where it is wanted; otherwise nothing is read, and all is zero
//   Column From(slice)              a lane's kWidth columns, of a slice that begins at this column, in every row, with loads of
//                                   a row as a pack; lanes past the end of a row have its last columns
//     Load(row)
//     Start(row, place)           with a ring: the same, but words come in place, where Finish(place, pack) takes them
//
// A pack has ToFloats, and kScale, whether what that writes is still to be multiplied with Scale(); kHalfSums says that it
// has AddHalves as well, which adds in float16.
//
// A row index may be anything below 2^31, and a row as long, so the product has 64 bits: one instruction, of two
// unsigned numbers of 32.
static __device__ __forceinline__ size_t Product(int a, int b) {
  return static_cast<size_t>(static_cast<unsigned>(a)) * static_cast<unsigned>(b);
}

// How a warp of AddRows reads its rows: RegisterReader, RingReader (row_sums.cuh) and MatrixReader (row_sums_matrices.cuh).
enum class RowsBy { kRegisters, kRing, kMatrices };

// Lanes sum kWidth neighbouring columns each.
template <int kWidth>
struct LanesInOrder {
  static constexpr int kRun = kWidth % 4 == 0 ? 4 : 1;  // neighbours in runs of so many

  // Return the column, within the slice, of a lane's sum i.
  static __device__ __forceinline__ int Column(int lane, int i) { return lane * kWidth + i; }
};

// Return the first of this lane's columns in a slice, kWidth of them a lane, or the last that there are so many from.
template <int kWidth>
static __device__ __forceinline__ int LaneColumn(int slice, int columns) {
  return min(slice + static_cast<int>(threadIdx.x % kWarp) * kWidth, columns - kWidth);
}

// A matrix as it is stored, [rows, columns]. Of elements there are weights alone.
struct StoredMatrix {
  const void* weights;               // elements, or codes
  const unsigned short* scales;      // float16 [rows, groups]
  const unsigned char* zero_points;  // [rows, bytes]
  int columns;
  int group_shift;  // a group has 1 << group_shift columns
};

// Elements in a row of their own, as activations are.
template <int kElements>
struct ElementFormat {
  static constexpr int kWidth = kElements;
  static constexpr int kLoads = 16;
  static constexpr int kRowLoads = 8;
  static constexpr RowsBy kRowsBy = RowsBy::kRegisters;
  using Lanes = LanesInOrder<kWidth>;

  struct Row {
    const Element* first;

    __device__ __forceinline__ Pack<kWidth> Load(int column, int offset = 0) const {
      return LoadWeights<kWidth>(first + column + offset);
    }
    __device__ __forceinline__ Pack<kWidth> LoadIf(bool wanted, int column, int offset = 0) const {
      return LoadWeightsIf<kWidth>(wanted, first + column + offset);
    }
  };

  struct Column {
    const Element* first;
    int columns;

    __device__ __forceinline__ Pack<kWidth> Load(int row) const {
      return LoadWeights<kWidth>(first + Product(row, columns));
    }
  };

  __device__ __forceinline__ ElementFormat(const Element* weights, int columns) : weights(weights), columns(columns) {}
  __device__ __forceinline__ explicit ElementFormat(const StoredMatrix& matrix)
      : ElementFormat(static_cast<const Element*>(matrix.weights), matrix.columns) {}

  __device__ __forceinline__ Row At(int row) const { return {weights + Product(row, columns)}; }
  __device__ __forceinline__ Column From(int slice) const {
    return {weights + LaneColumn<kWidth>(slice, columns), columns};
  }

  const Element* weights;
  int columns;
};
