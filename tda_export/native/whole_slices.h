// How blocks that stay share a product of one token (device/row_whole_slices.cuh). The choice depends on the GPU and the
// shape alone, and so does the order in which rows are added.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace tda {

constexpr int64_t kWholeWarps = 16, kWholeSlice = 256;

// Shared memory of 16 rows of a slice that are under way (device/row_sums_matrices.cuh).
constexpr int64_t MatrixRowsBytes(int64_t bits) { return bits == 4 ? 2432 : 4608; }

constexpr int64_t kWholeMostRanks = 16;  // blocks of a cluster

// What a GPU has for the kernel.
struct WholeKernelLimits {
  int64_t bits;      // of a code
  int64_t matrices;  // that a warp has under way
  int64_t multiprocessors;
  int64_t shared_bytes;                             // dynamic, of a block, at most
  int resident_clusters[kWholeMostRanks + 1] = {};  // by blocks of a cluster
};

struct WholeShares {
  // Whether the kernel of large blocks is slower, which has work for that part of the multiprocessors on average over its
  // rounds. With fewer rows, warps spend too much on their beginning and end (measured on an H200).
  bool Pays(int64_t bits, double large_busy) const;

  int64_t ranks = 0;         // blocks of a cluster; 0: there is no way
  int64_t clusters = 0;      // each with so many slices or, the last, fewer
  int64_t rows = 0;          // of a warp
  int64_t shared_bytes = 0;  // dynamic, of a block
  double worth = 0;          // part of the multiprocessors that read what is needed, as far as more of them read faster
};

namespace whole_slices {

// Of all multiprocessors, and of all warps that these have places for: more read no faster (measured on an H200).
constexpr double kEnough = 0.85, kEnoughWarps = 0.6;

constexpr int64_t Ceil(int64_t number, int64_t unit) { return (number + unit - 1) / unit; }

// The bytes of memory that are read, on average, for each run of so many at a multiple of that: whole sectors.
inline int64_t SectorBytes(int64_t bytes) {
  constexpr int64_t kSector = 32;
  return bytes + kSector - std::gcd(bytes, kSector);
}

// Which part of all bytes that are read is needed, where a block reads neighbouring slices of a row.
inline double NeededBytes(int64_t slices, int64_t bits) {
  const int64_t codes = slices * kWholeSlice * bits / 8, scales = slices * 16, zero_points = slices * bits;
  return static_cast<double>(codes + scales + zero_points) /
         (SectorBytes(codes) + SectorBytes(scales) + SectorBytes(zero_points));
}

}  // namespace whole_slices

inline bool WholeShares::Pays(int64_t bits, double large_busy) const {
  constexpr double kNearlyAsGood = 0.95;
  return ranks > 0 && rows >= (bits == 4 ? 170 : 256) &&
         worth >= kNearlyAsGood * std::min(large_busy, whole_slices::kEnough);
}

// Choose the blocks of a cluster. Most multiprocessors should have work, on average over the clusters, and enough warps;
// and blocks should read whole sectors.
inline WholeShares ChooseWholeShares(int64_t all_slices, int64_t inputs, const WholeKernelLimits& limits) {
  using namespace whole_slices;
  constexpr int64_t kRowsTogether = 4, kRows = 16, kGroups = 8, kPortableRanks = 8;
  WholeShares best;
  for (int64_t ranks = 2; ranks <= kWholeMostRanks; ++ranks) {
    if (limits.resident_clusters[ranks] == 0) continue;
    const int64_t fewest = Ceil(all_slices, limits.resident_clusters[ranks]);
    // Groups of so many slices have whole sectors of zero points.
    for (const int64_t wanted : {fewest, Ceil(fewest, kGroups) * kGroups}) {
      const int64_t clusters = Ceil(all_slices, wanted), slices = Ceil(all_slices, clusters);
      if (slices > kWholeWarps) continue;
      const int64_t parts = kWholeWarps / slices, shares = ranks * parts;
      WholeShares found;
      found.ranks = ranks;
      found.clusters = clusters;
      found.rows = Ceil(inputs, kRowsTogether * shares) * kRowsTogether;
      int64_t adding = kGroups;  // blocks that add up parts of a slice
      while (adding > ranks) adding /= 2;
      found.shared_bytes = kWholeWarps * limits.matrices * MatrixRowsBytes(limits.bits) +
                           slices * shares * kWholeSlice / adding * static_cast<int64_t>(sizeof(float)) +
                           parts * Ceil(found.rows, kRows) * kRows * static_cast<int64_t>(sizeof(int) + sizeof(uint16_t));
      if (found.shared_bytes > limits.shared_bytes) continue;
      const double busy = static_cast<double>(all_slices * ranks) / (slices * limits.multiprocessors);
      const double warps = busy * static_cast<double>(slices * parts) / kWholeWarps;
      found.worth = std::min({busy, kEnough, warps / kEnoughWarps * kEnough}) * NeededBytes(slices, limits.bits);
      if (found.worth > best.worth || (found.worth == best.worth && ranks <= kPortableRanks)) best = found;
    }
  }
  return best;
}

}  // namespace tda
