// Which rows meet which, shared by the CPU and the CUDA code and tested on the CPU. Every index is 64-bit: M*M passes 2^31 at M = 46341.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CELLFAST_HD __host__ __device__
#else
#define CELLFAST_HD
#endif

namespace cellfast::ntxent {

// The row that shows the same cell as row i among num_rows = 2N rows: (i + N) mod 2N.
CELLFAST_HD inline int64_t positive_of(int64_t i, int64_t num_rows) {
  const int64_t half = num_rows / 2;
  return i < half ? i + half : i - half;
}

// Global row of a shard's row `local`. A shard holds num_rows / num_shards rows, its first views and then its second views;
// globally all first views (shard by shard) come before all second views.
CELLFAST_HD inline int64_t shard_row(int64_t local, int64_t shard, int64_t num_shards, int64_t num_rows) {
  const int64_t per_view = num_rows / (2 * num_shards);
  const int64_t view = local / per_view;
  return view * (num_rows / 2) + shard * per_view + (local - view * per_view);
}

CELLFAST_HD inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Blocks are paired as in a round-robin tournament: within a round no two pairs share a block, so that pairs of one round can write to
// both their blocks at once without locks, in an order that does not depend on the number of threads. Over all num_blocks rounds every
// unordered pair of different blocks meets once and every block meets itself once.
struct BlockPair {
  int64_t first, second;  // first <= second
};

CELLFAST_HD inline int64_t pairs_in_round(int64_t num_blocks, int64_t round) {
  if (num_blocks % 2 == 1) {
    return (num_blocks + 1) / 2;
  }
  return round == num_blocks - 1 ? num_blocks : num_blocks / 2;
}

// The circle method: one player stays, the others go round. With an odd number of blocks the one that sits out meets itself; with an even
// number the last round is every block with itself.
CELLFAST_HD inline BlockPair pair_of_round(int64_t num_blocks, int64_t round, int64_t slot) {
  const bool odd = num_blocks % 2 == 1;
  if (!odd && round == num_blocks - 1) {
    return {slot, slot};
  }
  const int64_t circle = odd ? num_blocks : num_blocks - 1;
  // The block that sits out (or meets the one that stays) comes last: it is the smaller task of an odd round.
  const int64_t step = slot + 1;
  if (slot == pairs_in_round(num_blocks, round) - 1) {
    return odd ? BlockPair{round, round} : BlockPair{round, num_blocks - 1};
  }
  const int64_t a = (round + step) % circle, b = (round - step + circle) % circle;
  return a < b ? BlockPair{a, b} : BlockPair{b, a};
}

}  // namespace cellfast::ntxent
