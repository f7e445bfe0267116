// The operators' parts that the kernels for compute capability 9.0 take over, and what they need.
#pragma once

#include <tuple>

#include "ntxent/ntxent.h"

namespace cellfast::ntxent::sm90 {

// Why these kernels cannot serve rows of this dtype, size and device, or an empty text when they can.
std::string unsuitable(const Tensor& zhat);

// The same as the operators of these names; zhat is contiguous and suitable.
std::tuple<Tensor, Tensor> shard_forward(const Tensor& zhat, const Tensor& temperature, int64_t index, int64_t count);

// Gradient in `dtype` (float32 or zhat's dtype), and zhat_i . dloss/dzhat_i * M * temperature / grad_loss of every local row.
std::tuple<Tensor, Tensor> shard_backward(const Tensor& grad_loss, const Tensor& zhat, const Tensor& inv_norm, const Tensor& lse,
                                          const Tensor& temperature, bool normalize_rows, int64_t index, int64_t count, ScalarType dtype);

}  // namespace cellfast::ntxent::sm90
