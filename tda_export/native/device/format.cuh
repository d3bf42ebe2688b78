// A Format says how the rows of a weight matrix lie in memory. Kernels reach weights through one, and never by address:
//
//   kWidth                          columns of one load of a thread
//   Format(weights, columns)
//   Row At(row)                     a row, with loads of the kWidth columns from column + offset on, as a pack that has
//                                   ToFloats; offset is a constant, so that loads side by side share an address
//     Load(column, offset)          read
//     LoadIf(wanted, column, offset)  read where it is wanted; otherwise nothing is read, and all is zero
//
// A row index may be anything below 2^31, so a Format multiplies it in 64 bits.

// Elements in a row of their own, as activations are.
template <int kElements>
struct ElementFormat {
  static constexpr int kWidth = kElements;

  struct Row {
    const Element* first;

    __device__ __forceinline__ Pack<kWidth> Load(int column, int offset = 0) const {
      return LoadWeights<kWidth>(first + column + offset);
    }
    __device__ __forceinline__ Pack<kWidth> LoadIf(bool wanted, int column, int offset = 0) const {
      return LoadWeightsIf<kWidth>(wanted, first + column + offset);
    }
  };

  const Element* weights;
  int columns;

  __device__ __forceinline__ Row At(int row) const { return {weights + static_cast<size_t>(row) * columns}; }
};

