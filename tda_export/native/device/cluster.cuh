// How the blocks of a cluster, those along the grid's x, send each other floats.

#if TDA_CLUSTERS

constexpr int kMostRanks = 16;  // blocks of a cluster

// Counts what is sent to a block's shared memory. `bytes_to_come` is a barrier of shared memory that opens when all floats
// are there, without any block waiting for another's memory.
struct ClusterInbox {
  unsigned long long bytes_to_come;

  static __device__ __forceinline__ unsigned Address(const void* own) {
    return static_cast<unsigned>(__cvta_generic_to_shared(own));
  }

  static __device__ __forceinline__ unsigned AtRank(unsigned own, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
    return there;
  }

  // Called when the block begins: so many floats will come, and tell the other blocks that this one can be written to.
  __device__ __forceinline__ void Begin(int floats) {
    if (threadIdx.x == 0) {
      const unsigned barrier = Address(&bytes_to_come);
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(floats * static_cast<int>(sizeof(float)))
                   : "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }

  // Wait for the other blocks to begin.
  __device__ __forceinline__ void WaitForBlocks() const {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }

  // Send 1, 2 or 4 floats to where another block has what this one has at `own`, which is aligned to their size.
  template <int kCount>
  __device__ __forceinline__ void Send(const float* own, int rank, const float (&values)[kCount]) const {
    const unsigned place = AtRank(Address(own), rank), barrier = AtRank(Address(&bytes_to_come), rank);
    if constexpr (kCount == 1) {
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(place),
                   "r"(__float_as_uint(values[0])), "r"(barrier)
                   : "memory");
    } else if constexpr (kCount == 2) {
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(place),
                   "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])), "r"(barrier)
                   : "memory");
    } else {
      static_assert(kCount == 4, "1, 2 or 4 floats");
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                   ::"r"(place), "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])),
                   "r"(__float_as_uint(values[2])), "r"(__float_as_uint(values[3])), "r"(barrier)
                   : "memory");
    }
  }

  // Wait for all floats.
  __device__ __forceinline__ void WaitForFloats() const {
    unsigned there = 0;
    while (there == 0) {
      asm volatile(
          "{\n"
          ".reg .pred there;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%1], 0;\n"
          "selp.u32 %0, 1, 0, there;\n"
          "}"
          : "=r"(there)
          : "r"(Address(&bytes_to_come))
          : "memory");
    }
  }
};

#endif
