// A Format says how the rows of a weight matrix lie in memory. Kernels reach weights through one, and never by address:
//
//   kWidth                          columns of one load of a thread
//   kLoads                          loads that a warp of Products has under way at once
//   Format(matrix)
//   Row At(row)                     a row, with loads of the kWidth columns from column + offset on, as a pack; offset is
//                                   a constant, so that loads side by side share an address
//     Load(column, offset)          read
//     LoadIf(wanted, column, offset)  read where it is wanted; otherwise nothing is read, and all is zero
//
// A pack has kScale, whether what ToFloats writes is still to be multiplied with Scale().
//
// A row index may be anything below 2^31, so a Format multiplies it in 64 bits.

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

  struct Row {
    const Element* first;

    __device__ __forceinline__ Pack<kWidth> Load(int column, int offset = 0) const {
      return LoadWeights<kWidth>(first + column + offset);
    }
    __device__ __forceinline__ Pack<kWidth> LoadIf(bool wanted, int column, int offset = 0) const {
      return LoadWeightsIf<kWidth>(wanted, first + column + offset);
    }
  };

  __device__ __forceinline__ ElementFormat(const Element* weights, int columns) : weights(weights), columns(columns) {}
  __device__ __forceinline__ explicit ElementFormat(const StoredMatrix& matrix)
      : ElementFormat(static_cast<const Element*>(matrix.weights), matrix.columns) {}

  __device__ __forceinline__ Row At(int row) const { return {weights + static_cast<size_t>(row) * columns}; }

  const Element* weights;
  int columns;
};
