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

}  // namespace cellfast::ntxent
