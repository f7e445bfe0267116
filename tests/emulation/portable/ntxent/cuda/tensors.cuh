// Stands in for csrc/ntxent/cuda/tensors.cuh when the portable kernels are compiled for the CPU.
#pragma once

#include "fibers.h"
#include "ntxent/schedule.h"

#define __shared__ static  // one for all threads of a block

namespace cellfast::ntxent::cuda {

using std::exp, std::isnan;

template <typename S>
struct Accumulator {
  using type = S;
};
inline float load(float value) { return value; }
inline double load(double value) { return value; }

struct Shard {
  int64_t index, count, num_rows;
  int64_t row(int64_t local) const { return shard_row(local, index, count, num_rows); }
  int64_t num_local() const { return num_rows / count; }
};

}  // namespace cellfast::ntxent::cuda
