// Host side of the portable kernels; the arguments are those of the operators, contiguous and checked.
#pragma once

#include <tuple>

#include "ntxent/ntxent.h"

namespace cellfast::ntxent::cuda::portable {

std::tuple<Tensor, Tensor> shard_forward(const Tensor& zhat, const Tensor& temperature, int64_t index, int64_t count);

// Gradient in float64 for float64 rows, else in float32, and zhat_i . dloss/dzhat_i * M * temperature / grad_loss of every local row.
std::tuple<Tensor, Tensor> shard_backward(const Tensor& grad_loss, const Tensor& zhat, const Tensor& inv_norm, const Tensor& lse,
                                          const Tensor& temperature, bool normalize_rows, int64_t index, int64_t count);

}  // namespace cellfast::ntxent::cuda::portable
