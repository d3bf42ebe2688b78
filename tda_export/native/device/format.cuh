// A Format says how the rows of a weight matrix lie in memory. Kernels reach weights through one, and never by address:
//
//   kWidth                          columns of one load of a thread
//   kLoads                          loads that a warp of Products has under way at once
//   kRowLoads                       and of AddRows, each of one row: an even number that divides a warp's lanes
//   kRingRows                       rows that a warp of AddRows has under way through shared memory, for one token; 0: none
//   kRingWords                      words of a thread for each of them
//   Format(matrix)
//   Row At(row)                     a row, with loads of the kWidth columns from column + offset on, as a pack; offset is
//                                   a constant, so that loads side by side share an address
//     Load(column, offset)          read
//     LoadIf(wanted, column, offset)  read where it is wanted; otherwise nothing is read, and all is zero
//   Column From(column)             the kWidth columns from there on of every row, with loads of a row as a pack
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
  static constexpr int kRingRows = 0, kRingWords = 0;

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
  __device__ __forceinline__ Column From(int column) const { return {weights + column, columns}; }

  const Element* weights;
  int columns;
};
